"""Which blocks hold a prefix that another request may share. Pure Python.

A full block is known by a sha256 that chains over its parent's, so equal hashes mean equal tokens from the very start.
(A faster hash can be collided on purpose, and would serve one tenant's text to another.)
"""

from array import array
from collections.abc import Iterable, Sequence
from hashlib import sha256


def root(salt: str, prompt_length: int | None = None) -> bytes:
    """What the first block's hash builds on: only requests of one root share anything.

    salt: the tenant's. prompt_length: given where keys depend on it.
    """
    digest = sha256(b"attendant" + salt.encode()).digest()
    return digest if prompt_length is None else sha256(digest + b"prompt of %d tokens" % prompt_length).digest()


def chain(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The hash of a block, given the hash of the block before it (`root` for the first)."""
    return sha256(parent + array("q", token_ids).tobytes()).digest()


class PrefixCache:
    """A map from block hash to the block that holds those tokens' keys and values."""

    def __init__(self) -> None:
        self._block_by_hash: dict[bytes, int] = {}
        self._hash_by_block: dict[int, bytes] = {}
        self.queried_tokens = 0
        self.hit_tokens = 0

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest cached prefix of this chain."""
        blocks = []
        for block_hash in hashes:
            block = self._block_by_hash.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def register(self, block_hash: bytes, block: int) -> None:
        """Offer a full, computed block for sharing. Where the same tokens are cached already, the older block stays."""
        if self._block_by_hash.setdefault(block_hash, block) == block:
            self._hash_by_block[block] = block_hash

    def forget(self, block: int) -> None:
        """The block is about to hold something else."""
        block_hash = self._hash_by_block.pop(block, None)
        if block_hash is not None:
            del self._block_by_hash[block_hash]
