"""Writes the dashboards: `python deploy/grafana/generate.py`.

A panel is a title, a unit and its queries; Grafana's JSON is three quarters punctuation, the same in every panel. What
is written is committed, and a test holds the two together.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

DASHBOARDS = Path(__file__).parent / "dashboards"
SOURCE = {"type": "prometheus", "uid": "${source}"}
WIDTH, HEIGHT = 24, 8  # of a row, in Grafana's units
QUANTILES = ("0.5", "0.9", "0.99")
PHASES = ("request_queue_time", "request_prefill_time", "request_decode_time", "framework_overhead")


class Query(NamedTuple):
    """An expression of PromQL, and what its series are called."""

    expr: str
    legend: str = ""


class Panel(NamedTuple):
    """unit: Grafana's name of it. kind: timeseries, stat or heatmap. width: of 24. stacked: areas upon one another."""

    title: str
    unit: str
    queries: Sequence[Query]
    kind: str = "timeseries"
    width: int = 8
    stacked: bool = False


def series(name: str, **labels: str) -> str:
    """A metric of ours, of the chosen model."""
    matchers = ['model=~"$model"', *(f'{label}=~"{value}"' for label, value in labels.items())]
    return f"attendant_{name}{{{', '.join(matchers)}}}"


def total(name: str, by: str = "") -> str:
    """The sum of a gauge."""
    return f"sum{_by(by)}({series(name)})"


def rate(name: str, by: str = "", **labels: str) -> str:
    """How fast a counter grows."""
    return f"sum{_by(by)}(rate({series(name, **labels)}[$__rate_interval]))"


def quantiles(name: str) -> list[Query]:
    """Of a histogram: p50, p90, p99."""
    return [
        Query(f"histogram_quantile({q}, {rate(f'{name}_bucket', 'le')})", f"p{float(q) * 100:g}") for q in QUANTILES
    ]


def mean(name: str) -> str:
    """The mean of a histogram."""
    return f"{rate(f'{name}_sum')} / {rate(f'{name}_count')}"


def within(name: str, bound: str) -> str:
    """The share of a histogram's values below one of its bounds."""
    return f"{rate(f'{name}_bucket', le=bound)} / {rate(f'{name}_count')}"


def heatmap(title: str, name: str) -> Panel:
    """A histogram over time."""
    return Panel(title, "s", [Query(rate(f"{name}_bucket", "le"), "{{le}}")], kind="heatmap", width=12)


def _by(label: str) -> str:
    return f" by ({label}) " if label else ""


TTFT, TPOT = "time_to_first_token_seconds", "request_time_per_output_token_seconds"
ITL, E2E = "inter_token_latency_seconds", "e2e_request_latency_seconds"
REQUESTS = Panel(
    "Answers by status", "reqps", [Query(rate("http_responses_total", "status", route="/v1/.*"), "{{status}}")]
)
TOKENS = Panel(
    "Tokens",
    "short",
    [
        Query(rate("generation_tokens_total"), "generated/s"),
        Query(rate("prompt_tokens_total"), "of prompts/s"),
        Query(rate("prompt_tokens_cached_total"), "of these cached/s"),
    ],
)
FIRST_TOKEN = Panel("Time to first token", "s", quantiles(TTFT))
PER_TOKEN = Panel("Time per output token", "s", quantiles(TPOT))
QUEUE = Panel(
    "Requests in the engines",
    "short",
    [Query(total("num_requests_running"), "running"), Query(total("num_requests_waiting"), "waiting")],
)
CACHE = Panel("KV cache in use", "percentunit", [Query(series("kv_cache_usage_ratio"), "{{replica}}")])
REFUSED = Panel(
    "Refused for load",
    "reqps",
    [
        Query(rate("request_errors_total", type="rate_limit_error"), "requests refused"),
        Query(rate("admission_rejections_total", "reason"), "by an engine, for {{reason}}"),
    ],
)
STEP_TOKENS = Panel("Tokens in a step", "short", quantiles("iteration_tokens"))

BOARDS: dict[str, tuple[str, Sequence[Panel]]] = {
    "overview": (
        "Attendant: service overview",
        (
            Panel("Requests", "reqps", [Query(rate("request_success_total"))], kind="stat", width=4),
            Panel("Tokens/s", "short", [Query(rate("generation_tokens_total"))], kind="stat", width=4),
            Panel("TTFT p99", "s", [quantiles(TTFT)[2]], kind="stat", width=4),
            Panel("TPOT p99", "s", [quantiles(TPOT)[2]], kind="stat", width=4),
            Panel(
                "Engines that answer", "short", [Query(f"min({series('engine_replicas_answering')})")], "stat", width=4
            ),
            Panel("Engines wanted", "short", [Query(f"max({series('engine_replicas_wanted')})")], "stat", width=4),
            REQUESTS,
            TOKENS,
            QUEUE,
            FIRST_TOKEN,
            PER_TOKEN,
            Panel("Whole requests", "s", quantiles(E2E)),
            Panel("Errors by type", "reqps", [Query(rate("request_errors_total", "type"), "{{type}}")]),
            Panel(
                "Left and moved",
                "reqps",
                [
                    Query(rate("client_disconnects_total"), "clients that left"),
                    Query(rate("stream_resumes_total"), "streams moved off a dead replica"),
                ],
            ),
            CACHE,
        ),
    ),
    "latency": (
        "Attendant: where the time goes",
        (
            FIRST_TOKEN._replace(width=12),
            heatmap("Time to first token", TTFT),
            Panel(
                "Mean request, by part",
                "s",
                [Query(mean(f"{phase}_seconds"), phase.removeprefix("request_").replace("_", " ")) for phase in PHASES],
                width=12,
                stacked=True,
            ),
            heatmap("Time between tokens", ITL),
            Panel("In the queue", "s", quantiles("request_queue_time_seconds")),
            Panel("Prefill", "s", quantiles("request_prefill_time_seconds")),
            Panel("Decode", "s", quantiles("request_decode_time_seconds")),
            Panel("Around the engine: HTTP, text, Ray", "s", quantiles("framework_overhead_seconds")),
            Panel("Between tokens", "s", quantiles(ITL)),
            Panel("Whole requests", "s", quantiles(E2E)),
        ),
    ),
    "scheduler": (
        "Attendant: cache and scheduler",
        (
            CACHE,
            Panel("Running, by replica", "short", [Query(series("num_requests_running"), "{{replica}}")]),
            Panel("Waiting, by replica", "short", [Query(series("num_requests_waiting"), "{{replica}}")]),
            Panel(
                "Found in the prefix cache",
                "percentunit",
                [Query(f"{rate('prefix_cache_hits_total')} / {rate('prefix_cache_queries_total')}", "of tokens")],
            ),
            Panel("Preemptions", "ops", [Query(rate("num_preemptions_total", "replica"), "{{replica}}")]),
            Panel("Tokens still to compute, at most", "short", [Query(series("backlog_tokens"), "{{replica}}")]),
            Panel("Steps", "s", quantiles("engine_step_seconds")),
            STEP_TOKENS,
            Panel(
                "Share of each part of a step",
                "percentunit",
                [
                    Query(
                        f"{rate('engine_step_phase_seconds_total', 'phase')} "
                        f"/ on() group_left() {rate('engine_step_phase_seconds_total')}",
                        "{{phase}}",
                    )
                ],
                stacked=True,
            ),
            Panel(
                "Guesses that were right",
                "percentunit",
                [
                    Query(
                        f"{rate('spec_decode_num_accepted_tokens_total')} "
                        f"/ {rate('spec_decode_num_draft_tokens_total')}",
                        "of tokens guessed",
                    )
                ],
            ),
            REFUSED,
            Panel("Failed steps", "ops", [Query(rate("engine_failed_steps_total", "replica"), "{{replica}}")]),
        ),
    ),
    "load": (
        "Attendant: under load",
        (
            REQUESTS,
            TOKENS,
            QUEUE,
            FIRST_TOKEN,
            PER_TOKEN,
            Panel(
                "Within bounds (goodput)",
                "percentunit",
                [
                    Query(within(TTFT, "0.4"), "first token within 0.4 s"),
                    Query(within(TPOT, "0.03"), "30 ms a token or less"),
                ],
            ),
            Panel("In the queue", "s", quantiles("request_queue_time_seconds")),
            STEP_TOKENS,
            REFUSED,
            CACHE,
            Panel(
                "Tokens in a second of stepping",
                "short",
                [Query(f"{rate('iteration_tokens_sum')} / {rate('engine_step_seconds_sum')}", "computed")],
            ),
            Panel("Clients that left", "reqps", [Query(rate("client_disconnects_total"), "left")]),
        ),
    ),
}


def dashboard(name: str) -> dict[str, Any]:
    """One dashboard, as Grafana reads it."""
    title, panels = BOARDS[name]
    return {
        "uid": f"attendant-{name}",
        "title": title,
        "tags": ["attendant"],
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [_source(), _model()]},
        "panels": list(_placed(panels)),
    }


def _source() -> dict[str, Any]:
    return {"name": "source", "type": "datasource", "query": "prometheus", "label": "Prometheus"}


def _model() -> dict[str, Any]:
    query = "label_values(attendant_build_info, model)"
    return {
        "name": "model",
        "type": "query",
        "label": "Model",
        "datasource": SOURCE,
        "query": {"query": query, "refId": "model"},
        "definition": query,
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _placed(panels: Sequence[Panel]) -> Iterator[dict[str, Any]]:
    x = y = height = 0
    for number, panel in enumerate(panels, 1):
        if x + panel.width > WIDTH:
            x, y = 0, y + height
        height = HEIGHT // 2 if panel.kind == "stat" else HEIGHT
        yield _panel(number, panel) | {"gridPos": {"x": x, "y": y, "w": panel.width, "h": height}}
        x += panel.width


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.kind == "timeseries":
        stacking = {"stacking": {"mode": "normal"}, "fillOpacity": 40} if panel.stacked else {}
        defaults["custom"] = {"showPoints": "never", **stacking}
    shape = {"format": "heatmap"} if panel.kind == "heatmap" else {}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": _options(panel),
        "targets": [
            {"refId": chr(ord("A") + i), "expr": query.expr, "legendFormat": query.legend or "__auto", **shape}
            for i, query in enumerate(panel.queries)
        ],
    }


def _options(panel: Panel) -> dict[str, Any]:
    if panel.kind == "heatmap":
        return {"calculate": False, "yAxis": {"unit": panel.unit}, "color": {"mode": "scheme", "scheme": "Oranges"}}
    if panel.kind == "stat":
        return {"reduceOptions": {"calcs": ["lastNotNull"]}, "graphMode": "area"}
    return {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}}


def text(name: str) -> str:
    """The file of one dashboard."""
    return json.dumps(dashboard(name), indent=2) + "\n"


if __name__ == "__main__":
    for board in BOARDS:
        (DASHBOARDS / f"{board}.json").write_text(text(board))
