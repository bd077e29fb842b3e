"""Chooses the engine replica for a call: the pinned one, or the one with the fewest open streams.

`submit` may go to any replica; the `channel`, `abort` and `ping` that follow must reach the very replica that
accepted, and carry its id as the keyword `pin`. Serve's own queue length says nothing here, since submitting is over
in a millisecond while the stream lives on; so `submit` carries `open_streams`, the caller's count for each replica.
"""

import random

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from model.errors import AttendantError


class ReplicaGone(AttendantError):  # noqa: N818 - named for what happened
    """The pinned replica no longer takes calls: it died, or it is being drained."""


class PinnedRouter(RequestRouter):
    """Serve keeps the books and the connections; which replica comes first is decided here."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranked groups for one attempt: Serve tries each in turn, and asks again when none accepts."""
        call = {} if pending_request is None else pending_request.kwargs
        pin = call.get("pin")
        if pin is None:
            return rank_by_load(candidate_replicas, call.get("open_streams", {}))
        pinned = [replica for replica in candidate_replicas if replica.replica_id.unique_id == pin]
        if pinned:
            return [pinned]
        # Serve would look for the replica for ever. Failing the future tells the caller at once; candidates must
        # still be named, because an empty answer makes Serve's loop spin without yielding.
        if pending_request is not None and not pending_request.future.done():
            pending_request.future.set_exception(ReplicaGone(f"replica {pin} takes no more calls"))
        return [candidate_replicas]


def rank_by_load(replicas: list[RunningReplica], open_streams: dict[str, int]) -> list[list[RunningReplica]]:
    """Groups of one, the least loaded first; equals in random order, so that several ingresses do not move as one."""
    shuffled = random.sample(replicas, len(replicas))
    shuffled.sort(key=lambda replica: open_streams.get(replica.replica_id.unique_id, 0))
    return [[replica] for replica in shuffled]
