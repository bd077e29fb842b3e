"""Who holds which block. Pure Python: reference counts, and the free blocks in order of last use.

A free block keeps what it holds until it is handed out again, which is what makes a prefix cache cost nothing: the
least recently used free block is handed out first, and only then is its content lost.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence


class BlockPool:
    """Blocks 1 to `num_blocks`; block 0 is the null block of `KVPool`, never handed out. All costs are O(1) a block.

    on_reuse: called with a block's id just before the block is handed out with its old content lost.
    """

    def __init__(self, num_blocks: int, on_reuse: Callable[[int], None]) -> None:
        self.num_blocks = num_blocks
        self._references = [0] * (num_blocks + 1)
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks + 1))
        self._on_reuse = on_reuse

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, whether or not they still carry a cached prefix."""
        return len(self._free)

    def references(self, block: int) -> int:
        """How many requests hold this block."""
        return self._references[block]

    def allocate(self, count: int) -> list[int]:
        """Hand out the `count` least recently used free blocks. The caller has checked `num_free`."""
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._on_reuse(block)
            self._references[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Take one more reference on each block, free or not, content kept."""
        for block in blocks:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference on each block of a table. The end of the table becomes the first to be reused: a prefix
        is worth more than what follows it.
        """
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert that these tables are all the references there are, and that every other block is free."""
        held = [0] * (self.num_blocks + 1)
        for table in tables:
            for block in table:
                held[block] += 1
        assert held[0] == 0, "the null block is on a table"
        assert held == self._references, "reference counts disagree with the block tables"
        free = {block for block in range(1, self.num_blocks + 1) if held[block] == 0}
        assert free == set(self._free), "the free list disagrees with the reference counts"
