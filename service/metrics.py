"""Every instrument of the service, in one place, in the field's names with the prefix `attendant_`.

Each process has its own registry; `service.exposition` joins their texts for one scrape. The engine observes once a
step and once a request, the ingress once a delivery. No label holds anything that a client chose, so the number of
series is fixed. `python -m service.metrics` prints the table of docs/observability.md.
"""

import platform
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, get_args

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from model.engine.stats import StepPhases, StepStats
from service import __version__
from service.admission import Reason
from service.instruments import Instruments
from service.receipt import Timing

if TYPE_CHECKING:
    from model.engine.engine import Engine

# A small model answers within milliseconds, so the fine end starts there.
TOKEN_BUCKETS_S = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075),
    *(0.01, 0.015, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.2, 0.5, 1, 5),
)
PHASE_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.045, 0.06),
    *(0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 30, 60, 120),
)
LENGTH_BUCKETS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)

FINISH_REASONS = ("stop", "length")  # of a choice that succeeded
ERROR_TYPES = ("invalid_request_error", "rate_limit_error", "timeout_error", "server_error")
IDLE = StepStats(0.0, 0, 0, 0, 0, 0.0, 0, 0, 0, 0, 0, 0, StepPhases())  # before the first step


class EngineMetrics:
    """What an engine replica knows: its queue, its cache, the time of its steps and of its requests."""

    def __init__(self, model: str, replica: str) -> None:
        self._own = own = Instruments(deployment="Engine", model=model, replica=replica)
        self._stats = IDLE
        self._phases = [0.0] * len(IDLE.phases)
        self._declare_steps(own)
        self._queue = own.distribution(
            "request_queue_time_seconds",
            "From a request's arrival at the engine until the first of its choices is computed on.",
            PHASE_BUCKETS_S,
        )
        self._prefill = own.distribution(
            "request_prefill_time_seconds", "From there to its first token.", PHASE_BUCKETS_S
        )
        self._decode = own.distribution(
            "request_decode_time_seconds", "From there to the last token of all its choices.", PHASE_BUCKETS_S
        )
        rejections = own.counter(
            "admission_rejections", "Calls refused because of the queue, by what was too much.", "reason"
        )
        self._rejections = {reason: own.count(rejections, reason=reason) for reason in get_args(Reason)}
        _declare_build(own, "torch", "ray")

    def _declare_steps(self, own: Instruments) -> None:
        def last(field: str) -> Callable[[], float]:
            return lambda: getattr(self._stats, field)

        own.gauge("num_requests_running", "Requests in the running batch.", last("num_running"))
        own.gauge("num_requests_waiting", "Requests that wait for a place in the batch.", last("num_waiting"))
        own.gauge(
            "kv_cache_usage_ratio", "Share of the KV cache's blocks held by requests, 0 to 1.", last("kv_cache_usage")
        )
        own.total("num_preemptions", "Requests sent back to wait: blocks ran out.", last("num_preemptions"))
        own.total("prefix_cache_queries", "Tokens looked up in the prefix cache.", last("prefix_queries"))
        own.total("prefix_cache_hits", "Tokens found in the prefix cache.", last("prefix_hits"))
        own.total("spec_decode_num_draft_tokens", "Tokens guessed ahead.", last("num_drafted"))
        own.total("spec_decode_num_accepted_tokens", "Tokens guessed ahead, and right.", last("num_accepted"))
        own.total("engine_failed_steps", "Steps that raised; their requests ended.", last("num_failed_steps"))
        own.totals(
            "engine_step_phase_seconds",
            "Time spent in each part of the steps.",
            "phase",
            lambda: dict(zip(StepPhases._fields, self._phases, strict=True)),
        )
        self._step_seconds = own.distribution("engine_step_seconds", "Wall time of one engine step.", TOKEN_BUCKETS_S)
        self._step_tokens = own.distribution("iteration_tokens", "Tokens computed in one engine step.", LENGTH_BUCKETS)

    @property
    def registry(self) -> CollectorRegistry:
        """For an exporter of its own."""
        return self._own.registry

    def observe_backlog(self, read: Callable[[], float]) -> None:
        """Declare where the backlog is read. Called once."""
        self._own.gauge("backlog_tokens", "Tokens that running and waiting requests may still need.", read)

    def observe_channels(self, read: Callable[[], float]) -> None:
        """Declare where the open channels are counted. Called once."""
        self._own.gauge("open_channels", "Ingresses that have a channel open to this engine.", read)

    def describe(self, model: Mapping[str, object], cache: Mapping[str, object]) -> None:
        """Say what was loaded, and what the cache is made of. Called once."""
        self._own.info("model", "The model that is served, and how it is computed.", model)
        self._own.info("cache_config", "What the KV cache is made of.", cache)

    def observe_step(self, stats: StepStats) -> None:
        """Record one step, in the engine's thread. What it counts since its start is read from the newest one."""
        self._stats = stats
        if stats.num_tokens:
            self._step_seconds.observe(stats.seconds)
            self._step_tokens.observe(stats.num_tokens)
            self._phases = [total + part for total, part in zip(self._phases, stats.phases, strict=True)]

    def observe_request(self, timing: Timing) -> None:
        """Record what a request came to before all of its choices had ended, or were given up."""
        for phase, seconds in (
            (self._queue, timing.queue),
            (self._prefill, timing.prefill),
            (self._decode, timing.decode),
        ):
            if seconds is not None:
                phase.observe(seconds)

    def refused(self, reason: Reason) -> None:
        """Count a call that found the queue too long."""
        self._rejections[reason].inc()

    def expose(self) -> str:
        """The registry in Prometheus' text format."""
        return self._own.expose()


def facts(engine: "Engine") -> tuple[dict[str, object], dict[str, object]]:
    """What does not change while an engine lives: of its model, and of its cache."""
    config, pool = engine.config, engine.runner.compute.pool
    model = {
        "dtype": config.dtype,
        "kernels": type(engine.runner.compute).__name__.removesuffix("Forward").lower(),
        "device": str(engine.device),
        "max_model_len": engine.max_model_len,
    }
    num_blocks = engine.scheduler.blocks.num_blocks
    cache = {
        "block_size": config.block_size,
        "num_blocks": num_blocks,
        "num_tokens": num_blocks * config.block_size,
        "cache_dtype": str(pool.dtype).removeprefix("torch."),
        "prefix_caching": config.prefix_cache,
    }
    return model, cache


class IngressMetrics:
    """What only the ingress sees: requests as clients know them, and the times that clients feel.

    replicas_wanted, replicas_answering: of engines; the second as of the last scrape.
    """

    def __init__(self, model: str, replica: str = "local", replicas_wanted: int = 1) -> None:
        self._own = own = Instruments(deployment="Ingress", model=model, replica=replica)
        self.replicas_wanted = self.replicas_answering = replicas_wanted
        own.gauge("engine_replicas_wanted", "Engine replicas that there should be.", lambda: self.replicas_wanted)
        own.gauge(
            "engine_replicas_answering",
            "Engine replicas that answered the last scrape.",
            lambda: self.replicas_answering,
        )
        finished = own.counter("request_success", "Choices finished, by why they ended.", "finished_reason")
        self._finished = {reason: own.count(finished, finished_reason=reason) for reason in FINISH_REASONS}
        errors = own.counter(
            "request_errors",
            "Requests refused or broken off, by the type of the error; the answer may have begun.",
            "type",
        )
        self._errors = {kind: own.count(errors, type=kind) for kind in ERROR_TYPES}
        self._responses = own.counter("http_responses", "HTTP answers, by route and status.", "route", "status")
        self.prompt_tokens = own.tally("prompt_tokens", "Prompt tokens taken in.")
        self.cached_tokens = own.tally("prompt_tokens_cached", "Prompt tokens found in a cache.")
        self.generation_tokens = own.tally("generation_tokens", "Tokens generated.")
        self.disconnects = own.tally("client_disconnects", "Requests whose client left early.")
        self.resumes = own.tally("stream_resumes", "Streams moved to another replica.")
        self.ttft = own.distribution(
            "time_to_first_token_seconds", "Of a choice: from arrival to the first token.", PHASE_BUCKETS_S
        )
        self.itl = own.distribution("inter_token_latency_seconds", "Time between tokens of a choice.", TOKEN_BUCKETS_S)
        self.tpot = own.distribution(
            "request_time_per_output_token_seconds", "(E2E - TTFT) / (output tokens - 1).", TOKEN_BUCKETS_S
        )
        self.e2e = own.distribution(
            "e2e_request_latency_seconds", "Of a choice: from arrival to the last token.", PHASE_BUCKETS_S
        )
        self.overhead = own.distribution(
            "framework_overhead_seconds",
            "Of a choice that the engine ended: E2E less its time in the engine, so HTTP, text, Ray and failovers.",
            TOKEN_BUCKETS_S,
        )
        self.prompt_length = own.distribution("request_prompt_tokens", "Prompt tokens of a request.", LENGTH_BUCKETS)
        self.generation_length = own.distribution("request_generation_tokens", "Tokens of a choice.", LENGTH_BUCKETS)
        _declare_build(own, "ray")

    @property
    def registry(self) -> CollectorRegistry:
        """For an exporter of its own."""
        return self._own.registry

    def finished(self, reason: str) -> None:
        """Count one choice that ended."""
        self._finished[reason].inc()

    def failed(self, error_type: str) -> None:
        """Count one request that did not get what it asked for."""
        self._errors[error_type].inc()

    def responded(self, route: str, status: int) -> None:
        """Count one HTTP answer. `route` is a route of ours or "none", never the path that was asked for."""
        self._own.count(self._responses, route=route, status=str(status)).inc()

    def expose(self) -> str:
        """The registry in Prometheus' text format."""
        return self._own.expose()


def _declare_build(own: Instruments, *packages: str) -> None:
    facts = {"version": __version__, "python": platform.python_version()}
    own.info("build", "Versions of what runs.", facts | {package: version(package) for package in packages})


def table() -> str:
    """Every family, as rows of Markdown."""
    engine = EngineMetrics("", "")
    engine.observe_backlog(lambda: 0)
    engine.observe_channels(lambda: 0)
    engine.describe({"dtype": "", "cache_dtype": "", "kernels": "", "device": "", "max_model_len": ""}, {})
    families: dict[str, tuple[Metric, list[str]]] = {}
    ingress = IngressMetrics("")
    ingress.responded("", 200)
    for registry, deployment in ((engine.registry, "Engine"), (ingress.registry, "Ingress")):
        for family in registry.collect():
            families.setdefault(family.name, (family, []))[1].append(deployment)
    rows = ["| metric | kind | of | labels | |", "|---|---|---|---|---|"]
    return "\n".join(rows + [_row(family, owners) for family, owners in families.values()])


def _row(family: Metric, owners: list[str]) -> str:
    is_info = family.name.endswith("_info")
    own = {"deployment", "model", "replica", "le"}
    labels = "facts" if is_info else ", ".join(f"`{label}`" for label in family.samples[0].labels if label not in own)
    name = family.name + ("_total" if family.type == "counter" else "")
    return f"| `{name}` | {family.type} | {', '.join(owners)} | {labels} | {family.documentation} |"


if __name__ == "__main__":
    print(table())
