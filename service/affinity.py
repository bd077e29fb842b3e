"""Which prefixes each replica's cache holds, as far as one ingress can know. Pure Python: no torch, no Ray, no clock.

A replica keeps the blocks of its cache in the order of last use and loses the oldest first. This index keeps the same
order for each replica from the requests that this ingress sent there, and loses what the replica must have lost. It
believes at once that a replica holds what it was sent, and is put right by what comes back: each request's first output
says how many of its prompt's tokens were found. A block that should have been there was overwritten, and then so was
everything that had been used before it.

Other ingresses send their own requests to the same replicas; each has its own view, and learns of the others' only by
being put right. A wrong belief costs a prefill that was not needed, never a wrong answer.
"""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from model.cache.prefix import chain, root

BLOCK_TOKENS = 32  # the index' own unit: twice the engine's usual block, for half of the work
MAX_BLOCKS = 262_144  # known over all replicas, in about 50 MB


class Prefix:
    """The blocks of a text of token ids. A block's key chains over those before it and the salt, as in the engine."""

    def __init__(self, token_ids: Sequence[int], salt: str) -> None:
        self.keys: list[bytes] = []
        self.num_tokens = 0
        self._rest: list[int] = []
        self._last = root(salt)
        self.extend(token_ids)

    def extend(self, token_ids: Sequence[int]) -> None:
        """More of the same text. Costs what the new tokens cost."""
        self.num_tokens += len(token_ids)
        tokens = [*self._rest, *token_ids]
        whole = len(tokens) - len(tokens) % BLOCK_TOKENS
        for start in range(0, whole, BLOCK_TOKENS):
            self._last = chain(self._last, tokens[start : start + BLOCK_TOKENS])
            self.keys.append(self._last)
        self._rest = tokens[whole:]


@dataclass
class Visit:
    """One request at one replica, from the sending to its end.

    believed: for each block that the replica was thought to hold, when it was last used; None for one that is still
        being computed. brought: the blocks that it did not have, and when they were noted. uncached: the tokens
        that it has to compute before the first one comes out; 0 once that is there.
    """

    replica_id: str
    prefix: Prefix
    believed: list[int | None]
    brought: list[tuple[bytes, int]]
    uncached: int


@dataclass
class _Cache:
    """A replica's blocks, the least recently used first, and of those the ones that nobody has seen computed yet."""

    used: "OrderedDict[bytes, int]" = field(default_factory=OrderedDict)
    promised: set[bytes] = field(default_factory=set)

    def held(self, keys: Sequence[bytes]) -> int:
        """How many of the first keys are here. Where one is missing, so are all that build on it."""
        return bisect_left(keys, True, key=lambda key: key not in self.used)


class PrefixIndex:
    """All replicas' caches. Costs are of the order of a prompt's blocks; `match` looks at each replica beside.

    capacity_tokens: what one replica's cache holds; None until it is known.
    """

    def __init__(self, max_blocks: int = MAX_BLOCKS) -> None:
        self.capacity_tokens: int | None = None
        self._max_blocks = max_blocks
        self._caches: dict[str, _Cache] = {}
        self._now = 0  # counts uses

    def match(self, prefix: Prefix) -> dict[str, int]:
        """Tokens of the prompt that each replica is believed to hold; those with none are left out."""
        keys = _findable(prefix)
        held = {replica_id: cache.held(keys) for replica_id, cache in self._caches.items()}
        return {replica_id: count * BLOCK_TOKENS for replica_id, count in held.items() if count}

    def sent(self, replica_id: str, prefix: Prefix) -> Visit:
        """A replica has taken this prompt: it will hold it. Keep the visit until its end."""
        if replica_id not in self._caches:
            self._caches[replica_id] = _Cache()
            for other in self._caches.values():  # each has a smaller share of the whole now
                self._trim(other)
        cache = self._caches[replica_id]
        keys = _findable(prefix)
        count = cache.held(keys)
        believed = [None if key in cache.promised else cache.used[key] for key in keys[:count]]
        self._touch(cache, keys)
        brought = [(key, cache.used[key]) for key in keys[count:] if key in cache.used]
        cache.promised.update(key for key, _ in brought)
        return Visit(replica_id, prefix, believed, brought, prefix.num_tokens - count * BLOCK_TOKENS)

    def heard(self, visit: Visit, num_cached_tokens: int) -> None:
        """The first output is here: the prompt is computed, and so many of its tokens were found in the cache."""
        visit.uncached = 0
        cache = self._caches.get(visit.replica_id)
        if cache is None:
            return
        cache.promised.difference_update(key for key, _ in visit.brought)
        found = num_cached_tokens // BLOCK_TOKENS
        if found < len(visit.believed) and (missed := visit.believed[found]) is not None:
            while cache.used and next(iter(cache.used.values())) <= missed:
                del cache.used[next(iter(cache.used))]

    def ended(self, visit: Visit, output_ids: Sequence[int]) -> None:
        """The request is through. What it said stays in the cache, too, for whoever goes on from there."""
        if cache := self._caches.get(visit.replica_id):
            visit.prefix.extend(output_ids)
            self._touch(cache, _findable(visit.prefix))

    def withdrawn(self, visit: Visit) -> None:
        """The request was given up before its first output: what only it would have brought may never have come."""
        visit.uncached = 0
        if cache := self._caches.get(visit.replica_id):
            cache.promised.difference_update(key for key, _ in visit.brought)
            for key, noted in visit.brought:
                if cache.used.get(key) == noted:
                    del cache.used[key]

    def forget(self, replica_id: str) -> None:
        """The replica is gone."""
        self._caches.pop(replica_id, None)

    @property
    def num_blocks(self) -> int:
        """Blocks known, over all replicas."""
        return sum(len(cache.used) for cache in self._caches.values())

    @property
    def num_replicas(self) -> int:
        """Replicas of which anything is known."""
        return len(self._caches)

    def _touch(self, cache: _Cache, keys: Iterable[bytes]) -> None:
        """Note the use of these blocks, the last of a prompt first: it is what a cache gives up first."""
        for key in reversed(list(keys)):
            self._now += 1
            cache.used[key] = self._now
            cache.used.move_to_end(key)
        self._trim(cache)

    def _trim(self, cache: _Cache) -> None:
        limit = self._max_blocks // len(self._caches)
        if self.capacity_tokens is not None:
            limit = min(limit, self.capacity_tokens // BLOCK_TOKENS)
        while len(cache.used) > limit:
            cache.promised.discard(cache.used.popitem(last=False)[0])


def _findable(prefix: Prefix) -> list[bytes]:
    """The blocks that a cache can be asked for: an engine computes at least the last token of every prompt."""
    return prefix.keys[: max(0, prefix.num_tokens - 1) // BLOCK_TOKENS]
