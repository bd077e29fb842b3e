"""Chooses the engine replica for a call: the pinned one, or the one with the fewest open streams.

`submit` may go to any replica; the `channel`, `abort` and `ping` that follow must reach the very replica that
accepted, and carry its id as the keyword `pin`. Serve's own queue length says nothing here, since submitting is over
in a millisecond while the stream lives on; so `submit` carries `open_streams`, the caller's count for each replica.
"""

import random
from collections import Counter
from collections.abc import Mapping

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from model.errors import AttendantError


class ReplicaGone(AttendantError):  # noqa: N818 - named for what happened
    """The pinned replica no longer takes calls: it died, or it is being drained."""


class PinnedRouter(RequestRouter):
    """Serve keeps the books and the connections; which replica comes first is decided here."""

    def initialize_state(self, **kwargs: object) -> None:
        """Called by Serve once. `submit` calls chosen but not answered: the caller cannot count them yet."""
        self._in_flight: dict[str, str] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranked groups for one attempt: Serve tries each in turn, and asks again when none accepts."""
        call = {} if pending_request is None else pending_request.kwargs
        pin = call.get("pin")
        if pin is None:
            load = Counter(call.get("open_streams", {})) + Counter(self._in_flight.values())
            ranked = rank_by_load(candidate_replicas, load)
            if pending_request is not None:
                self._in_flight[pending_request.metadata.internal_request_id] = ranked[0][0].replica_id.unique_id
            return ranked
        pinned = [replica for replica in candidate_replicas if replica.replica_id.unique_id == pin]
        if pinned:
            return [pinned]
        # Serve would look for the replica for ever. Failing the future tells the caller at once; candidates must
        # still be named, because an empty answer makes Serve's loop spin without yielding.
        if pending_request is not None and not pending_request.future.done():
            pending_request.future.set_exception(ReplicaGone(f"replica {pin} takes no more calls"))
        return [candidate_replicas]

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called by Serve when a call is over, whichever way."""
        self._in_flight.pop(internal_request_id, None)


def rank_by_load(replicas: list[RunningReplica], load: Mapping[str, int]) -> list[list[RunningReplica]]:
    """Groups of one, the least loaded first; equals in random order, so that several ingresses do not move as one."""
    shuffled = random.sample(replicas, len(replicas))
    shuffled.sort(key=lambda replica: load.get(replica.replica_id.unique_id, 0))
    return [[replica] for replica in shuffled]
