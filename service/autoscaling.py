"""How many engine replicas there should be, by what they have to do. Pure Python: no Ray, no clock.

Serve asks `TokenPolicy` ten times a second, with what each replica last said of itself; the simulation in
`deploy/` asks the same one. Demand is counted in replicas: a replica under a load of 1 has no room left, so the sum
of all loads says how many full ones it would take, and that over `target_load` how many there should be.

Between the load from which on there are too few replicas and the one below which there are too many lies a band,
`slack`. After a change the demand stands inside it, and as long as it stays there nothing changes: a steady demand
never makes the number swing, whatever the delays.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Autoscaling(BaseModel):
    """What an operator decides. Raises pydantic's error for what contradicts itself.

    min_replicas: 0 lets an idle service go to sleep; the next request waits for a replica to start.
    target_load: the share of each replica that is to be in use; the rest is for what comes while another one starts.
    slack: replicas go once the load, spread over those that stay, is so much below the target.
    max_wait_s: prompts that wait longer than this, at the speed that was measured, are a load of 1.
    up_delay_s, down_delay_s: how long there must have been too few, or too many; idle_s: how long no request at all,
    before the last one goes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_replicas: Annotated[int, Field(ge=0)] = 1
    max_replicas: Annotated[int, Field(ge=1)]
    target_load: Annotated[float, Field(gt=0, le=1)] = 0.7
    slack: Annotated[float, Field(gt=0, lt=1)] = 0.3
    max_wait_s: Annotated[float, Field(gt=0)] = 2.0
    up_delay_s: Annotated[float, Field(ge=0)] = 1.0
    down_delay_s: Annotated[float, Field(ge=0)] = 60.0
    idle_s: Annotated[float, Field(ge=0)] = 300.0

    @model_validator(mode="after")
    def _check(self) -> "Autoscaling":
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas ({self.min_replicas}) exceeds max_replicas ({self.max_replicas})")
        return self


class Load(NamedTuple):
    """What a replica says of its work (`record_autoscaling_stats`).

    running, waiting: requests; max_running: how many may run. kv_usage: share of the cache's blocks in use.
    pending_tokens: of prompts, not computed yet; pending_kv: the share of the cache that they will take.
    tokens_per_second: as it was measured, prompt and output; 0 until it is known.
    """

    running: float
    waiting: float
    max_running: float
    kv_usage: float
    pending_kv: float
    pending_tokens: float
    tokens_per_second: float

    def of_one(self, max_wait_s: float) -> float:
        """1: no room left, by whichever of places, blocks and time is the scarcest."""
        places = (self.running + self.waiting) / self.max_running
        seconds = self.pending_tokens / self.tokens_per_second if self.tokens_per_second else 0.0
        return max(places, self.kv_usage + self.pending_kv, seconds / max_wait_s)


class TokenPolicy:
    """Serve makes one for a deployment, from the fields of `Autoscaling`, and calls it with its context."""

    def __init__(self, **options: Any) -> None:
        self._options = Autoscaling(**options)
        self._few_since: float | None = None
        self._many_since: float | None = None
        self._idle_since: float | None = None
        self._most_needed = 0  # since there have been too many

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """`ray.serve.config.AutoscalingContext` in; the number of replicas, and no state for Serve to keep."""
        loads = _newest(context.raw_metrics or {})
        return self.decide(loads, context.target_num_replicas, context.current_time), {}

    def decide(self, loads: Sequence[Load], target: int, now: float) -> int:
        """The number of replicas there should be, `target` being what was last decided.

        loads: of the replicas that run; others may still be starting. now: in seconds, on any clock.
        """
        options = self._options
        demand = sum(load.of_one(options.max_wait_s) for load in loads)
        self._note_idleness(loads, now)
        too_few = math.ceil(round(demand / options.target_load, 6))
        enough = math.ceil(round(demand / (options.target_load * (1 - options.slack)), 6))
        # While some are starting, nobody knows yet how much of the demand they will take.
        wants_more = too_few > target and len(loads) >= target
        wants_less = enough < target
        self._few_since = (now if self._few_since is None else self._few_since) if wants_more else None
        if wants_less:
            self._many_since = now if self._many_since is None else self._many_since
            self._most_needed = max(self._most_needed, enough)
        else:
            self._many_since, self._most_needed = None, 0
        if self._few_since is not None and now - self._few_since >= options.up_delay_s:
            return self._change(too_few)
        if self._many_since is not None and now - self._many_since >= options.down_delay_s and target > 1:
            return self._change(max(1, self._most_needed))
        if target == 1 and self._idle_since is not None and now - self._idle_since >= options.idle_s:
            return self._change(0)
        return self._bounded(target)

    def _note_idleness(self, loads: Sequence[Load], now: float) -> None:
        if not loads or any(load.running or load.waiting for load in loads):
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now

    def _change(self, number: int) -> int:
        self._few_since = self._many_since = self._idle_since = None
        self._most_needed = 0
        return self._bounded(number)

    def _bounded(self, number: int) -> int:
        return max(self._options.min_replicas, min(self._options.max_replicas, number))


def _newest(metrics: Any) -> list[Load]:
    """Of Serve's time series by metric and replica, each replica's last values."""
    replica_ids: Iterable[Any] = set().union(*(metrics.get(name, {}) for name in Load._fields))
    complete = [
        replica_id for replica_id in replica_ids if all(metrics.get(name, {}).get(replica_id) for name in Load._fields)
    ]
    return [Load(*(metrics[name][replica_id][-1].value for name in Load._fields)) for replica_id in complete]
