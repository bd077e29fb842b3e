"""Every instrument of the service, in one place, in the field's names with the prefix `attendant_`.

Each process has its own registry; `merge` joins their text for one scrape. The engine observes once a step and the
ingress once a delivery, never once a token. No label holds anything that a client chose.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from model.engine.stats import StepStats

prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each that nobody reads

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# A small model answers within milliseconds, so the fine end starts there.
TOKEN_BUCKETS_S = (
    0.0005,
    0.001,
    0.002,
    0.003,
    0.005,
    0.0075,
    0.01,
    0.015,
    0.02,
    0.03,
    0.05,
    0.075,
    0.1,
    0.2,
    0.5,
    1,
    5,
)
PHASE_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.045, 0.06, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 30, 60, 120)
LENGTH_BUCKETS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


class EngineMetrics:
    """What an engine replica knows: its queue, its cache and the time of its steps."""

    def __init__(self, model: str, replica: str) -> None:
        self._registry = CollectorRegistry()
        labels = {"model": model, "replica": replica}

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"attendant_{name}", text, list(labels), registry=self._registry).labels(**labels)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"attendant_{name}", text, list(labels), registry=self._registry).labels(**labels)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            whole = Histogram(f"attendant_{name}", text, list(labels), buckets=buckets, registry=self._registry)
            return whole.labels(**labels)

        self._running = gauge("num_requests_running", "Requests in the running batch.")
        self._waiting = gauge("num_requests_waiting", "Requests that wait for a place in the batch.")
        self._kv_usage = gauge("kv_cache_usage_ratio", "Share of the KV cache's blocks in use, 0 to 1.")
        self._preemptions = counter("num_preemptions", "Requests sent back to wait because blocks ran out.")
        self._prefix_queries = counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._prefix_hits = counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._rejections = Counter(
            "attendant_admission_rejections",
            "Calls refused because of the queue, by what was too much.",
            [*labels, "reason"],
            registry=self._registry,
        )
        self._labels = labels
        self.backlog = gauge("backlog_tokens", "Tokens that running and waiting requests may still need.")
        self._step_seconds = histogram("engine_step_seconds", "Wall time of one engine step.", TOKEN_BUCKETS_S)
        self._step_tokens = histogram("iteration_tokens", "Tokens computed in one engine step.", LENGTH_BUCKETS)
        self._totals = (0, 0, 0)

    def observe_step(self, stats: "StepStats") -> None:
        """Record one step. The engine counts preemptions and prefix tokens since its start; we add the difference."""
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        self._kv_usage.set(stats.kv_cache_usage)
        if stats.num_tokens:
            self._step_seconds.observe(stats.seconds)
            self._step_tokens.observe(stats.num_tokens)
        totals = (stats.num_preemptions, stats.prefix_queries, stats.prefix_hits)
        if totals != self._totals:
            counters = (self._preemptions, self._prefix_queries, self._prefix_hits)
            for counter, total, before in zip(counters, totals, self._totals, strict=True):
                counter.inc(total - before)
            self._totals = totals

    def refused(self, reason: str) -> None:
        """Count a call that found the queue too long."""
        self._rejections.labels(**self._labels, reason=reason).inc()

    def expose(self) -> str:
        """The registry in Prometheus' text format."""
        return generate_latest(self._registry).decode()


class IngressMetrics:
    """What only the ingress sees: requests as clients know them, and the times that clients feel."""

    def __init__(self, model: str) -> None:
        self._registry = CollectorRegistry()
        self._model = model

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"attendant_{name}", text, ["model", *labels], registry=self._registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            whole = Histogram(f"attendant_{name}", text, ["model"], buckets=buckets, registry=self._registry)
            return whole.labels(model=model)

        self._finished = counter("request_success", "Choices finished, by why they ended.", "finished_reason")
        self._responses = counter("http_responses", "HTTP answers, by route and status.", "route", "status")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens taken in.").labels(model=model)
        self.cached_tokens = counter("prompt_tokens_cached", "Prompt tokens found in a cache.").labels(model=model)
        self.generation_tokens = counter("generation_tokens", "Tokens generated.").labels(model=model)
        self.disconnects = counter("client_disconnects", "Requests whose client left early.").labels(model=model)
        self.resumes = counter("stream_resumes", "Streams moved to another replica.").labels(model=model)
        self.ttft = histogram("time_to_first_token_seconds", "From arrival to the first token.", PHASE_BUCKETS_S)
        self.itl = histogram("inter_token_latency_seconds", "Time between tokens of a choice.", TOKEN_BUCKETS_S)
        self.tpot = histogram(
            "request_time_per_output_token_seconds", "(E2E - TTFT) / (output tokens - 1).", TOKEN_BUCKETS_S
        )
        self.e2e = histogram("e2e_request_latency_seconds", "From arrival to the last token.", PHASE_BUCKETS_S)
        self.prompt_length = histogram("request_prompt_tokens", "Prompt tokens of a request.", LENGTH_BUCKETS)
        self.generation_length = histogram("request_generation_tokens", "Tokens of a choice.", LENGTH_BUCKETS)

    def finished(self, reason: str) -> None:
        """Count one choice that ended."""
        self._finished.labels(model=self._model, finished_reason=reason).inc()

    def responded(self, route: str, status: int) -> None:
        """Count one HTTP answer. `route` is a route of ours or "none", never the path that was asked for."""
        self._responses.labels(model=self._model, route=route, status=str(status)).inc()

    def expose(self) -> str:
        """The registry in Prometheus' text format."""
        return generate_latest(self._registry).decode()


def merge(texts: Iterable[str]) -> str:
    """Several registries' texts as one: each family keeps one header, followed by the samples of all.

    The format allows a family's header only once, so the texts cannot simply follow one another.
    """
    headers: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for text in texts:
        family = ""
        for line in text.splitlines():
            if line.startswith("# HELP "):
                family = line.split(" ", 3)[2]
                if family not in headers:
                    headers[family], samples[family] = [], []
                    headers[family].append(line)
            elif line.startswith("# "):
                if len(headers[family]) < 2:
                    headers[family].append(line)
            elif line:
                samples[family].append(line)
    return "".join("\n".join(headers[family] + samples[family]) + "\n" for family in headers)
