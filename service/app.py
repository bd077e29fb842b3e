"""The application, as Ray Serve builds it: `service.app:build`, with typed arguments.

serve run service.app:build model=model/checkpoints/storyteller replicas=2
"""

import warnings
from pathlib import Path
from typing import Annotated, Any, Self

import ray
from pydantic import AfterValidator, ConfigDict, Field, model_validator
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from model import machine
from model.config import CacheDtype, Device, Dtype, EngineConfig
from service.autoscaling import Autoscaling
from service.door import Door
from service.exposition import Watching, address
from service.hub import EMBEDDED
from service.ingress import Ingress
from service.replica import EngineReplica, Queue

# Serve's own queues must never be the ones that fill: the engine knows its backlog and refuses by itself.
UNBOUNDED = 100_000
# In an update the new replica starts before the old one stops: one more at a time, of up to four.
SURGE_PERCENT = 25
METRICS_INTERVAL_S = 1.0  # between two reports of a replica to Serve's autoscaler
ROUTER = "service.router:PinnedRouter"
A_LITTLE = 0.001  # of a processor: a bundle of a placement group may not be empty


class AppArgs(Door):
    """What an operator may choose. `None` means: decided from the checkpoint and the machine. Raises `ConfigError` for
    what no engine can be, and pydantic's own for what is of the wrong kind.

    model: a Hugging Face directory, at the same place on every node; the embedded one by default.
    model_name: what clients call it, the directory's own name by default.
    autoscaling: as many engines as their load needs, instead of `replicas`.
    tensor_parallel: processes that hold each engine's model together, on one node.
    replica_cpus: what Ray sets aside for each engine, or for each of its processes. 0 lets it have as many on a machine
    as there are; more makes it look for room, and its own autoscaler add nodes.
    device: `cuda` sets a GPU aside for each engine, or for each of its processes, which see no other. `auto` means
    `cuda` where Ray has GPUs now; a cluster that has yet to add such nodes must be told.
    max_waiting: requests that may wait in one replica beyond those that run; the next one gets a 429. So does one with
    which they all together may need more than max_backlog_tokens.
    drain_seconds: how long a replica that is to go may still work on what it has; of an ingress at least the longest
    generation, or streams are cut. One that has nothing left goes at once. engine_drain_seconds: the same for engines,
    where it may be short: streams that are not through by then move to another engine, and go on.
    max_num_batched_tokens, kv_cache_dtype, gpu_memory_utilization, overlap, cuda_graphs: see
    `model.config.EngineConfig`.
    speculative_tokens: how far an engine guesses ahead; deterministic: the same bits whatever else runs, at a price.
    metrics_host: where each process exposes its metrics on a port of its own; vllm_metrics: under vLLM's names, too.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str = str(EMBEDDED)
    model_name: str | None = None
    replicas: Annotated[int, Field(ge=1)] = 1
    autoscaling: Autoscaling | None = None
    tensor_parallel: Annotated[int, Field(ge=1)] = 1
    replica_cpus: Annotated[float, Field(ge=0)] = 0.0
    dtype: Dtype = "auto"
    device: Device = "auto"
    max_model_len: Annotated[int, Field(ge=1)] | None = None
    max_num_seqs: Annotated[int, Field(ge=1)] = 64
    max_num_batched_tokens: Annotated[int, Field(ge=1)] = 512
    kv_cache_tokens: Annotated[int, Field(ge=1)] | None = None
    kv_cache_dtype: CacheDtype = "auto"
    gpu_memory_utilization: float | None = None
    overlap: bool | None = None
    cuda_graphs: bool | None = None
    max_waiting: Annotated[int, Field(ge=0)] = 256
    max_backlog_tokens: Annotated[int, Field(ge=1)] | None = None
    num_threads: Annotated[int, Field(ge=1)] | None = None
    drain_seconds: Annotated[float, Field(gt=0)] = 300.0
    engine_drain_seconds: Annotated[float, Field(gt=0)] | None = None
    speculative_tokens: Annotated[int, Field(ge=0)] = 0
    deterministic: bool = False
    metrics_host: Annotated[str, AfterValidator(address)] | None = None
    vllm_metrics: bool = False

    @model_validator(mode="after")
    def _be_an_engines(self) -> Self:
        """Raises `ConfigError` here, before Ray starts or a replica is sent for."""
        EngineConfig(**self.engine_options)
        return self

    @property
    def engine_options(self) -> dict[str, Any]:
        """What becomes of it in a replica: the arguments of `EngineConfig`."""
        serving = {"replicas", "autoscaling", "tensor_parallel", "replica_cpus", "metrics_host", "vllm_metrics"}
        serving |= {"drain_seconds", "engine_drain_seconds"}
        own = {"model", "model_name", *serving, *Queue._fields, *Door.model_fields}
        options = self.model_dump(exclude=own)
        # Who is given processors uses them; else the engine decides, when it knows its kernels.
        options["num_threads"] = self.num_threads or int(self.replica_cpus) or None
        options["processes_per_machine"] = self.processes_per_machine
        return options

    @property
    def cores(self) -> int:
        """Of those that we may use here, for each of the processes that engines may have on one machine."""
        return max(1, machine.cores() // self.processes_per_machine)

    @property
    def processes_per_machine(self) -> int:
        """All that engines may have together, or as many as find the processors on one machine that Ray sets aside."""
        most = int(machine.cores() / self.replica_cpus) if self.replica_cpus else self.max_ranks
        return max(1, min(most, self.max_ranks))

    @property
    def max_ranks(self) -> int:
        """Processes of all engines together, at most."""
        most = self.autoscaling.max_replicas if self.autoscaling else self.replicas
        return most * self.tensor_parallel

    @property
    def room(self) -> dict[str, Any]:
        """What becomes of it in Ray: the options of an engine's deployment that set its processors and GPUs aside."""
        num_gpus = 1 if self.device == "cuda" else 0
        options = {"ray_actor_options": {"num_cpus": self.replica_cpus, "num_gpus": num_gpus}}
        if self.tensor_parallel == 1:
            return options
        bundle = {"CPU": self.replica_cpus or A_LITTLE} | ({"GPU": num_gpus} if num_gpus else {})
        return options | {
            "placement_group_bundles": [bundle] * self.tensor_parallel,
            "placement_group_strategy": "STRICT_PACK",  # what they say to one another does not leave the node
        }

    def can_surge(self, num_gpus: int | None) -> bool:
        """Whether there is a place for one engine more than there may be; without one, an update would wait for ever.

        num_gpus: of all nodes; None: nobody knows.
        """
        return self.device != "cuda" or num_gpus is None or num_gpus >= self.max_ranks + self.tensor_parallel

    @property
    def sleeps(self) -> bool:
        """Whether there may be no replica at all."""
        return self.autoscaling is not None and self.autoscaling.min_replicas == 0

    @property
    def idle_channel_s(self) -> float | None:
        """After how long ingresses let go of an idle engine. Their questions would wake one that has gone to sleep."""
        return self.autoscaling.idle_s / 2 if self.autoscaling is not None and self.sleeps else None

    @property
    def scaling(self) -> dict[str, Any]:
        """What becomes of it in Serve: the options of a deployment."""
        if self.autoscaling is None:
            return {"num_replicas": self.replicas}
        with warnings.catch_warnings():
            # Serve asks to set the interval in the environment instead, where 2.60 does not read it.
            warnings.filterwarnings("ignore", "The `metrics_interval_s` field", DeprecationWarning)
            policy = AutoscalingPolicy(  # type: ignore[no-untyped-call]
                policy_function="service.autoscaling:TokenPolicy", policy_kwargs=self.autoscaling.model_dump()
            )
            config = AutoscalingConfig(
                min_replicas=self.autoscaling.min_replicas,
                # Also where none is to stay: a model that cannot be loaded is found out at the start.
                initial_replicas=max(1, self.autoscaling.min_replicas),
                max_replicas=self.autoscaling.max_replicas,
                policy=policy,
                metrics_interval_s=METRICS_INTERVAL_S,
                look_back_period_s=2 * METRICS_INTERVAL_S,
                upscale_delay_s=0,  # the policy has its own delays
                downscale_delay_s=0,
            )
        return {"autoscaling_config": config}


def build(args: AppArgs) -> serve.Application:
    """Ingress and engines, bound together."""
    num_gpus = int(ray.cluster_resources().get("GPU", 0)) if ray.is_initialized() else None  # type: ignore[no-untyped-call]
    if args.device == "auto" and num_gpus is not None:
        # An engine that asks Ray for no GPU sees all of them, and takes the first, as the next one does.
        args = args.model_copy(update={"device": "cuda" if num_gpus else "cpu"})
    directory = str(Path(args.model).resolve())
    name = args.model_name or Path(directory).name
    engines = serve.deployment(
        name="Engine",
        **args.scaling,
        **args.room,
        max_ongoing_requests=UNBOUNDED,
        max_constructor_retry_count=1,
        health_check_period_s=1,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=args.engine_drain_seconds or args.drain_seconds,
        max_surge_percent=SURGE_PERCENT if args.can_surge(num_gpus) else 0,
        graceful_shutdown_wait_loop_s=0.5,
        request_router_config={"request_router_class": ROUTER, "request_routing_stats_period_s": 1},
    )(EngineReplica)
    ingress = serve.deployment(
        name="Ingress",
        num_replicas=args.ingresses,
        max_ongoing_requests=UNBOUNDED,
        max_constructor_retry_count=1,
        health_check_period_s=1,
        graceful_shutdown_timeout_s=args.drain_seconds,
        max_surge_percent=SURGE_PERCENT,
        graceful_shutdown_wait_loop_s=0.5,
        ray_actor_options={"num_cpus": 0},
    )(serve.ingress()(Ingress))
    queue = Queue(args.max_waiting, args.max_backlog_tokens)
    wanted = args.autoscaling.min_replicas if args.autoscaling else args.replicas
    watching = Watching(args.metrics_host, args.vllm_metrics, wanted)
    engine = engines.bind(
        *(directory, name, args.engine_options, queue, args.telemetry),
        *(watching.exporter_host, args.idle_channel_s, args.cores, args.tensor_parallel),
    )
    return ingress.bind(engine, directory, name, args, args.sleeps, watching)
