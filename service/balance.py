"""Which replica is the best for a request: the one that has to compute the least before its first token. Pure Python.

The price of a replica is counted in tokens: those of the prompt that its cache does not hold, those of other prompts
that are to be computed before it, and a share for each stream that is open there. So the longest cached prefix wins
until the work that waits there is more than what it saves. A replica whose places or blocks are all taken comes after
all that have room, whatever it holds: a hot prefix is computed once more elsewhere rather than waited for.
"""

from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import NamedTuple

# What one open stream weighs, in tokens of a prompt: with a thousand tokens cached in one place, a request still goes
# there while it has up to fifteen streams more than elsewhere.
STREAM_TOKENS = 64
# Share of the cache's blocks in use from which on a newcomer may have to wait for one, or push another request out.
FULL_CACHE = 0.9


class RouteHint(NamedTuple):
    """What an ingress knows that bears on where a request should go. By replica: `cached`, `pending`, `open_streams`.

    num_tokens: of all its prompts. cached: those of them that are believed to be in a replica's cache.
    pending: tokens of this ingress' other prompts that a replica has yet to compute. open_streams: this ingress'.
    avoid: replicas that must not be asked. session: requests of one session go to one replica; empty: of none.
    """

    num_tokens: int = 0
    cached: Mapping[str, int] = {}
    pending: Mapping[str, int] = {}
    open_streams: Mapping[str, int] = {}
    avoid: frozenset[str] = frozenset()
    session: str = ""


class Standing(NamedTuple):
    """What a replica says of itself every second or so, over all ingresses.

    running, waiting: requests. pending_tokens: of prompts, not computed yet. kv_usage: share of the blocks in use.
    """

    running: int = 0
    waiting: int = 0
    pending_tokens: int = 0
    kv_usage: float = 0.0

    @property
    def is_full(self) -> bool:
        """Whether a newcomer would have to wait for somebody else's end."""
        return self.waiting > 0 or self.kv_usage >= FULL_CACHE


def rank(standings: Mapping[str, Standing], hint: RouteHint) -> list[str]:
    """The replicas that may be asked, the best first. Of equals, the first in `standings`."""
    allowed = [replica_id for replica_id in standings if replica_id not in hint.avoid]
    home = choose_home(allowed, hint.session) if hint.session and allowed else None

    def price(replica_id: str) -> tuple[bool, bool, int]:
        standing = standings[replica_id]
        # An ingress' own counts are newer than what the replica last said, which in turn counts everybody's.
        pending = max(hint.pending.get(replica_id, 0), standing.pending_tokens)
        streams = max(hint.open_streams.get(replica_id, 0), standing.running + standing.waiting)
        uncached = hint.num_tokens - hint.cached.get(replica_id, 0)
        return standing.is_full, replica_id != home, uncached + pending + STREAM_TOKENS * streams

    return sorted(allowed, key=price)


def choose_home(replica_ids: Iterable[str], session: str) -> str:
    """The replica that a session belongs to: the same for every ingress, with no table to keep (rendezvous hashing,
    Thaler and Ravishankar 1998). When a replica goes, only its own sessions move.
    """
    return max(replica_ids, key=lambda replica_id: sha256(f"{replica_id} {session}".encode()).digest())
