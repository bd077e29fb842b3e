"""`attendant top`: a service's metrics live in the terminal, for where no Grafana is at hand."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table

from service.cli_chat import DEFAULT_URL, ApiKey, Url
from service.client import Client, RequestFailed
from service.scrapes import Scrape, Window

LATENCIES = {
    "first token": "time_to_first_token_seconds",
    "in the queue": "request_queue_time_seconds",
    "prefill": "request_prefill_time_seconds",
    "between tokens": "inter_token_latency_seconds",
    "per output token": "request_time_per_output_token_seconds",
    "around the engine": "framework_overhead_seconds",
    "whole request": "e2e_request_latency_seconds",
    "one step": "engine_step_seconds",
}
QUANTILES = (0.5, 0.9, 0.99)


def top(
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks, and what rates are over.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look twice, print once: for scripts.")] = False,
) -> None:
    """Watch a running service: rates, latencies and each engine, until Ctrl-C."""
    console = Console(highlight=False)
    with Client(url, api_key) as client:
        windows = watch(lambda: look(client, url), lambda: time.sleep(interval))
        if once:
            console.print(screen(next(windows), url))
            return
        with Live(console=console, screen=True, auto_refresh=False) as live:
            for window in windows:
                live.update(screen(window, url), refresh=True)


def look(client: Client, url: str) -> Scrape:
    """One scrape. Raises `RequestFailed`."""
    page = client.metrics()
    with contextlib.suppress(ValueError):
        scrape = Scrape.read(page, time.monotonic())
        if scrape.values("build_info"):
            return scrape
    raise RequestFailed(f"{url}/metrics is not a page of this service")


def watch(scrape: Callable[[], Scrape], wait: Callable[[], None]) -> Iterator[Window]:
    """One window after another, for ever. Raises `RequestFailed` when the first scrape fails.

    Later ones are passed over: whoever watches a service wants to see it come back.
    """
    before = scrape()
    while True:
        wait()
        try:
            after = scrape()
        except RequestFailed:
            continue
        yield Window(before, after)
        before = after


def screen(window: Window, url: str) -> RenderableType:
    """All that is shown."""
    return Group(_summary(window, url), _latencies(window), _engines(window))


def _summary(window: Window, url: str) -> Table:
    rows = Table(title=url, title_justify="left", show_header=False, box=None, padding=(0, 3, 0, 0))
    answering, wanted = window.gauge("engine_replicas_answering"), window.gauge("engine_replicas_wanted")
    ingresses = max(1, len(window.replicas("Ingress")))  # each of them says the same of all engines
    rows.add_row(
        f"{window.rate('request_success_total'):,.1f} finished/s",
        f"{window.rate('generation_tokens_total'):,.0f} tokens/s out",
        f"{window.rate('prompt_tokens_total'):,.0f} tokens/s in",
        f"{answering / ingresses:.0f} of {wanted / ingresses:.0f} engines",
    )
    rows.add_row(
        f"{window.rate('request_errors_total', type='server_error'):,.1f} errors/s",
        f"{window.rate('request_errors_total', type='rate_limit_error'):,.1f} refused/s",
        f"{window.rate('client_disconnects_total'):,.1f} left/s",
        f"{window.increase('stream_resumes_total'):.0f} moved",
    )
    return rows


def _latencies(window: Window) -> Table:
    table = Table("latency", *(f"p{q * 100:g}" for q in QUANTILES), title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for title, name in LATENCIES.items():
        table.add_row(title, *(_time(window.quantile(q, name)) for q in QUANTILES))
    return table


def _engines(window: Window) -> Table:
    columns = ("running", "waiting", "cache", "hits", "tokens/step", "step p50", "queue p50", "preempted")
    table = Table("engine", *columns)
    for column in table.columns[1:]:
        column.justify = "right"
    for replica in window.replicas("Engine"):
        table.add_row(
            replica,
            f"{window.gauge('num_requests_running', replica=replica):.0f}",
            f"{window.gauge('num_requests_waiting', replica=replica):.0f}",
            _share(window.gauge("kv_cache_usage_ratio", replica=replica)),
            _share(window.ratio("prefix_cache_hits_total", "prefix_cache_queries_total", replica=replica)),
            _number(window.ratio("iteration_tokens_sum", "iteration_tokens_count", replica=replica)),
            _time(window.quantile(0.5, "engine_step_seconds", replica=replica)),
            _time(window.quantile(0.5, "request_queue_time_seconds", replica=replica)),
            f"{window.increase('num_preemptions_total', replica=replica):.0f}",
        )
    return table


def _time(seconds: float) -> str:
    if math.isnan(seconds):
        return "-"
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _share(ratio: float) -> str:
    return "-" if math.isnan(ratio) else f"{ratio:.0%}"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"
