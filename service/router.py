"""Chooses the engine replica for a call: the pinned one, or the best one for the request.

`submit` may go to any replica; the `channel`, `abort` and `ping` that follow must reach the very replica that
accepted, and carry its id as the keyword `pin`. Serve's own queue length says nothing here, since submitting is over
in a millisecond while the stream lives on; so `submit` carries a `hint`, what its ingress knows (`service.balance`). It
also carries `chosen`, a list which the router, in the caller's process, adds its choice to: should the call hang, the
caller knows whom to blame.
"""

import random
import time
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from model.errors import AttendantError
from service.balance import RouteHint, Standing, rank

# As long as a call waits for its answer where engines run: `dispatch.RESUME_TIMEOUT_S`.
FORGET_S = 30.0


class ReplicaGone(AttendantError):  # noqa: N818 - named for what happened
    """The pinned replica no longer takes calls: it died, or it is being drained."""


class NoReplica(AttendantError):  # noqa: N818 - named for what is missing
    """There are replicas, and none of them may be asked now."""


class Sent(NamedTuple):
    """A `submit` that has been sent and not answered: its ingress cannot count it yet. at: on `time.monotonic`."""

    replica_id: str
    num_tokens: int
    at: float


class PinnedRouter(RequestRouter):
    """Serve keeps the books and the connections; which replica comes first is decided here."""

    def initialize_state(self, **kwargs: object) -> None:
        """Called by Serve once."""
        self._in_flight: dict[str, Sent] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranked groups for one attempt: Serve tries each in turn, and asks again when none accepts."""
        if pending_request is None:
            return [candidate_replicas]
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        call = pending_request.kwargs
        if (pin := call.get("pin")) is not None:
            order = [pin] if pin in replicas else []
        else:
            order = self._rank(candidate_replicas, call.get("hint", RouteHint()), pending_request)
        if order:
            return [[replicas[replica_id]] for replica_id in order]
        # Serve would look for a replica for ever. Failing the future tells the caller at once; candidates must
        # still be named, because an empty answer makes Serve's loop spin without yielding.
        if not pending_request.future.done():
            pending_request.future.set_exception(
                NoReplica("no engine replica may be asked now") if pin is None else ReplicaGone(f"{pin} is gone")
            )
        return [candidate_replicas]

    def _rank(self, replicas: list[RunningReplica], hint: RouteHint, call: PendingRequest) -> list[str]:
        tokens: Counter[str] = Counter(hint.pending)
        streams: Counter[str] = Counter(hint.open_streams)
        for replica_id, num_tokens, _ in self._sent_lately():
            tokens[replica_id] += num_tokens
            streams[replica_id] += 1
        # In random order, so that several ingresses do not choose the same one of several equals.
        shuffled = random.sample(replicas, len(replicas))
        standings = {replica.replica_id.unique_id: Standing(**(replica.routing_stats or {})) for replica in shuffled}
        order = rank(standings, hint._replace(pending=tokens, open_streams=streams))
        if order:
            call_id = call.metadata.internal_request_id
            self._in_flight.pop(call_id, None)  # of an attempt before: the newest is to be the last
            num_uncached = hint.num_tokens - hint.cached.get(order[0], 0)
            self._in_flight[call_id] = Sent(order[0], num_uncached, time.monotonic())
            call.kwargs.get("chosen", []).append(order[0])
            # One that is given up before it is sent never completes.
            call.future.add_done_callback(lambda future: future.cancelled() and self._in_flight.pop(call_id, None))
        return order

    def _sent_lately(self) -> Iterable[Sent]:
        """What is in flight. Serve does not always say that a call is over: not of one whose caller leaves between the
        choice of a replica and the sending.
        """
        oldest = time.monotonic() - FORGET_S
        while self._in_flight and next(iter(self._in_flight.values())).at <= oldest:
            del self._in_flight[next(iter(self._in_flight))]
        return self._in_flight.values()

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called by Serve when a call is over, whichever way."""
        self._in_flight.pop(internal_request_id, None)
