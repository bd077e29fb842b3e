"""What the engines last said of their room, so that under overload most calls end at the ingress.

Asking costs both processes more than the whole refusal does, and takes longer the more calls are under way. So behind
a refusal only those ask who have a reason to: one for each request of ours that has left, and one every moment, since
requests of other ingresses come and go, too.
"""

import time
from collections.abc import Collection
from dataclasses import dataclass

from service.channel import Refused
from service.errors import Overloaded

PROBE_S = 0.1
# Without a refusal for so long, some twenty calls have been taken, or nobody has asked.
FORGET_S = 2.0


@dataclass
class _Full:
    """A replica that has said that it has no place. places: left since by requests of ours, and not asked for yet."""

    refused: Refused
    refused_at: float
    probed_at: float
    places: int = 0

    def may_be_asked(self, now: float) -> bool:
        return self.places > 0 or now - self.probed_at >= PROBE_S

    def ask(self, now: float) -> None:
        if self.places:
            self.places -= 1
        else:
            self.probed_at = now


class Fullness:
    """Which replicas are full, and whether it is worth a call to ask again."""

    def __init__(self) -> None:
        self._full: dict[str, _Full] = {}

    def note(self, refused: Refused) -> None:
        """A replica has refused. That a request was too large says nothing of the next one; that it was full does."""
        if refused.kind != "full":
            return
        now = time.monotonic()
        full = self._full.setdefault(refused.replica_id, _Full(refused, now, now))
        full.refused, full.refused_at = refused, now

    def left(self, replica_id: str | None) -> None:
        """A request of ours has ended there."""
        if replica_id in self._full:
            self._full[replica_id].places += 1

    def check(self, replica_ids: Collection[str], *, asks: bool) -> None:
        """Raises `Overloaded` when all of these are known to be full. asks: a call follows."""
        if not self._full:
            return
        now = time.monotonic()
        self._full = {name: full for name, full in self._full.items() if now - full.refused_at < FORGET_S}
        if not self._full or not self._full.keys() >= set(replica_ids):
            return
        for full in self._full.values():
            if full.may_be_asked(now):
                if asks:
                    full.ask(now)
                return
        refused = full.refused
        raise Overloaded(refused.message, retry_after_s=refused.retry_after_s)
