"""The application, as Ray Serve builds it: `service.app:build`, with typed arguments.

serve run service.app:build model=model/checkpoints/storyteller replicas=2
"""

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from ray import serve

from model.config import Device, Dtype
from service.door import Door
from service.ingress import Ingress
from service.replica import EngineReplica, Queue

# Serve's own queues must never be the ones that fill: the engine knows its backlog and refuses by itself.
UNBOUNDED = 100_000
# In an update the new replica starts before the old one stops: one more at a time, of up to four.
SURGE_PERCENT = 25
ROUTER = "service.router:PinnedRouter"


class AppArgs(Door):
    """What an operator may choose. `None` means: decided from the checkpoint and the machine.

    model: a Hugging Face directory; model_name: what clients call it, the directory's own name by default.
    max_waiting: requests that may wait in one replica beyond those that run; the next one gets a 429. So does one with
    which they all together may need more than max_backlog_tokens.
    drain_seconds: how long a replica that is to go may still work on what it has; at least the longest generation, or
    streams are cut. One that has nothing left goes at once.
    speculative_tokens: how far an engine guesses ahead; deterministic: the same bits whatever else runs, at a price.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str
    model_name: str | None = None
    replicas: Annotated[int, Field(ge=1)] = 1
    dtype: Dtype = "auto"
    device: Device = "auto"
    max_model_len: Annotated[int, Field(ge=1)] | None = None
    max_num_seqs: Annotated[int, Field(ge=1)] = 64
    kv_cache_tokens: Annotated[int, Field(ge=1)] | None = None
    max_waiting: Annotated[int, Field(ge=0)] = 256
    max_backlog_tokens: Annotated[int, Field(ge=1)] | None = None
    num_threads: Annotated[int, Field(ge=1)] | None = None
    drain_seconds: Annotated[float, Field(gt=0)] = 300.0
    speculative_tokens: Annotated[int, Field(ge=0)] = 0
    deterministic: bool = False

    @property
    def engine_options(self) -> dict[str, Any]:
        """What becomes of it in a replica: the arguments of `EngineConfig`."""
        own = {"model", "model_name", "replicas", "drain_seconds", *Queue._fields, *Door.model_fields}
        options = self.model_dump(exclude=own)
        # Half of the cores compute; HTTP, text and Ray have the others. With both of 2 cores the embedded model gave
        # a third fewer tokens (docs/benchmarks.md).
        options["num_threads"] = self.num_threads or max(1, (os.cpu_count() or 2) // (2 * self.replicas))
        return options


def build(args: AppArgs) -> serve.Application:
    """Ingress and engines, bound together."""
    directory = str(Path(args.model).resolve())
    name = args.model_name or Path(directory).name
    engines = serve.deployment(
        name="Engine",
        num_replicas=args.replicas,
        max_ongoing_requests=UNBOUNDED,
        max_constructor_retry_count=1,
        health_check_period_s=1,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=args.drain_seconds,
        max_surge_percent=SURGE_PERCENT,
        graceful_shutdown_wait_loop_s=0.5,
        ray_actor_options={"num_cpus": 0},
        request_router_config={"request_router_class": ROUTER, "request_routing_stats_period_s": 1},
    )(EngineReplica)
    ingress = serve.deployment(
        name="Ingress",
        max_ongoing_requests=UNBOUNDED,
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=args.drain_seconds,
        max_surge_percent=SURGE_PERCENT,
        graceful_shutdown_wait_loop_s=0.5,
        ray_actor_options={"num_cpus": 0},
    )(serve.ingress()(Ingress))
    queue = Queue(args.max_waiting, args.max_backlog_tokens)
    return ingress.bind(engines.bind(directory, name, args.engine_options, queue), directory, name, args)
