"""How full the engines are, so that under overload most calls end at the ingress.

Asking costs both processes more than the whole refusal does, and takes longer the more calls are under way. A replica
says how full it is with each answer (`service.channel.Occupancy`); what has changed since, of requests of ours, is
known here. What other ingresses have done meanwhile is not: so where requests of theirs take the room, every moment one
of ours asks all the same.
"""

import time
from collections.abc import Collection, Mapping
from typing import NamedTuple

from service.admission import objection
from service.channel import Occupancy, Share
from service.errors import Overloaded

PROBE_S = 0.1
# Without an answer for so long, nobody has asked, or the replica is gone.
FORGET_S = 2.0


class _Said(NamedTuple):
    """What a replica said of itself, and what of that was ours."""

    occupancy: Occupancy
    own: Share
    at: float

    @property
    def has_others(self) -> bool:
        """Whether not all of the work there was ours."""
        return self.occupancy.num_requests > self.own.num_requests

    def since(self, own: Share, sent: Share) -> Occupancy:
        """What it would say now, had nothing changed but what is ours, and with what may be on its way to it."""
        before = Share(-self.own.num_requests, -self.own.num_tokens)
        return self.occupancy.plus(own).plus(sent).plus(before)


class Fullness:
    """Which replicas have room, as far as one ingress can know, and whether it is worth a call to ask again."""

    def __init__(self) -> None:
        self._said: dict[str, _Said] = {}
        self._probed_at = -PROBE_S

    @property
    def knows_something(self) -> bool:
        """Whether any replica has said how full it is, not too long ago."""
        return bool(self._said)

    def note(self, replica_id: str, occupancy: Occupancy, own: Share) -> None:
        """A replica has answered, when so much there was ours."""
        self._said[replica_id] = _Said(occupancy, own, time.monotonic())

    def check(
        self, replica_ids: Collection[str], shares: Mapping[str | None, Share], need: Share, *, asks: bool
    ) -> None:
        """Raises `Overloaded` when none of these has room. shares: what of their work is ours; under None, what may
        be on its way to any of them. asks: a call follows.
        """
        now = time.monotonic()
        self._said = {replica_id: said for replica_id, said in self._said.items() if now - said.at < FORGET_S}
        if not self._said or not self._said.keys() >= set(replica_ids):
            return
        refusals, may_have_changed = [], False
        for replica_id, said in self._said.items():
            refusal = objection(said.since(shares.get(replica_id, Share()), shares.get(None, Share())), need)
            if refusal is None:
                return
            refusals.append(refusal)
            may_have_changed = may_have_changed or said.has_others
        if not may_have_changed or now - self._probed_at < PROBE_S:
            soonest = min(refusals, key=lambda refusal: refusal.retry_after_s)
            raise Overloaded(soonest.message, retry_after_s=soonest.retry_after_s)
        if asks:
            self._probed_at = now
