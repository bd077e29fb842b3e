"""Another way to choose a replica, which ours is measured against."""

import random

from ray.serve.request_router import PendingRequest, RunningReplica

from service.balance import RouteHint
from service.router import PinnedRouter


class PowerOfTwoRouter(PinnedRouter):
    """Of two replicas at random the less loaded one, whatever their caches hold (Mitzenmacher 2001)."""

    def _rank(self, replicas: list[RunningReplica], hint: RouteHint, call: PendingRequest) -> list[str]:
        blind = RouteHint(open_streams=hint.open_streams, avoid=hint.avoid)
        return super()._rank(random.sample(replicas, min(2, len(replicas))), blind, call)
