"""`attendant top`, over pages that were written for it."""

import itertools
import math
from collections.abc import Iterator

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner

from service import top as module
from service.cli import app
from service.client import Client, RequestFailed
from service.metrics import EngineMetrics, IngressMetrics
from service.scrapes import Scrape, Window
from service.top import look, screen, watch
from tests.service.test_metrics import STEP

URL = "http://service"


class Service:
    """Two engines and an ingress, in the state that a test gives them."""

    def __init__(self) -> None:
        self.engines = {name: EngineMetrics("tiny", name) for name in ("engine-a", "engine-b")}
        self.ingress = IngressMetrics("tiny", "ingress", replicas_wanted=2)

    def page(self) -> str:
        return "".join(metrics.expose() for metrics in (self.ingress, *self.engines.values()))

    def scrape(self, when: float) -> Scrape:
        return Scrape.read(self.page(), when)


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def window(service: Service) -> Window:
    """Two seconds with something of everything; before them there were other numbers."""
    service.ingress.generation_tokens.inc(5000)
    service.ingress.ttft.observe(50.0)
    before = service.scrape(100.0)
    service.ingress.generation_tokens.inc(600)
    service.ingress.prompt_tokens.inc(80)
    for _ in range(9):
        service.ingress.finished("length")
    service.ingress.failed("server_error")
    for _ in range(5):
        service.ingress.failed("rate_limit_error")
    for seconds, count in ((0.015, 90), (0.25, 10)):
        service.ingress.ttft.observe(seconds, count)
    service.engines["engine-a"].observe_step(STEP._replace(num_running=7, kv_cache_usage=0.25))
    service.engines["engine-b"].observe_step(STEP._replace(num_running=1, num_waiting=40, prefix_hits=100))
    return Window(before, service.scrape(102.0))


def test_a_rate_is_what_was_added_in_a_second(window: Window) -> None:
    assert window.rate("generation_tokens_total") == 300
    assert window.rate("request_success_total") == 4.5
    assert window.rate("request_errors_total", type="server_error") == 0.5


def test_a_counter_that_began_anew_has_grown_by_what_it_shows(service: Service) -> None:
    service.ingress.resumes.inc(10)
    before = service.scrape(0)
    service.ingress = IngressMetrics("tiny", "ingress")
    service.ingress.resumes.inc(3)
    assert Window(before, service.scrape(1)).increase("stream_resumes_total") == 3


def test_percentiles_are_of_the_window_alone(window: Window) -> None:
    """90 values lie between 10 and 20 ms and 10 between 0.2 and 0.4 s; one of 50 s was there before."""
    assert window.quantile(0.45, "time_to_first_token_seconds") == pytest.approx(0.015)
    assert window.quantile(0.95, "time_to_first_token_seconds") == pytest.approx(0.3)
    assert window.quantile(1, "time_to_first_token_seconds") == pytest.approx(0.4)


def test_a_percentile_beyond_the_last_bound_is_that_bound(service: Service) -> None:
    before = service.scrape(0)
    service.ingress.e2e.observe(1000)
    assert Window(before, service.scrape(1)).quantile(0.5, "e2e_request_latency_seconds") == 120


def test_where_nothing_happened_there_is_no_percentile_and_no_ratio(service: Service) -> None:
    window = Window(service.scrape(0), service.scrape(1))
    assert math.isnan(window.quantile(0.5, "time_to_first_token_seconds"))
    assert math.isnan(window.ratio("prefix_cache_hits_total", "prefix_cache_queries_total"))


def test_gauges_are_added_over_replicas_or_seen_one_by_one(window: Window) -> None:
    assert window.gauge("num_requests_running") == 8
    assert window.gauge("num_requests_running", replica="engine-a") == 7
    assert window.replicas("Engine") == ["engine-a", "engine-b"]


def shown(window: Window) -> list[str]:
    console = Console(width=140)
    with console.capture() as capture:
        console.print(screen(window, URL))
    return capture.get().splitlines()


def row(lines: list[str], title: str) -> list[str]:
    (line,) = (line for line in lines if title in line)
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_the_screen_shows_rates_percentiles_and_each_engine(window: Window) -> None:
    lines = shown(window)
    assert any("300 tokens/s out" in line and "4.5 finished/s" in line and "2 of 2 engines" in line for line in lines)
    assert any("0.5 errors/s" in line and "2.5 refused/s" in line for line in lines)
    assert row(lines, "first token") == ["first token", "15.6 ms", "20.0 ms", "380.0 ms"]
    assert row(lines, "engine-a")[:5] == ["engine-a", "7", "1", "25%", "40%"]
    assert row(lines, "engine-b")[:5] == ["engine-b", "1", "40", "50%", "100%"]


def test_a_service_that_does_nothing_has_dashes(service: Service) -> None:
    lines = shown(Window(service.scrape(0), service.scrape(1)))
    assert row(lines, "first token") == ["first token", "-", "-", "-"]
    assert row(lines, "engine-a")[4:7] == ["-", "-", "-"]


def test_two_ingresses_say_the_same_of_the_engines_and_it_is_shown_once(service: Service) -> None:
    page = service.page() + IngressMetrics("tiny", "other", replicas_wanted=2).expose()
    assert any("2 of 2 engines" in line for line in shown(Window(Scrape.read(page, 0), Scrape.read(page, 1))))


def test_a_service_that_is_away_for_a_while_is_waited_for(service: Service) -> None:
    script: Iterator[Scrape | None] = iter([service.scrape(0), None, service.scrape(4)])

    def scrape() -> Scrape:
        found = next(script)
        if found is None:
            raise RequestFailed("away")
        return found

    assert next(watch(scrape, lambda: None)).seconds == 4


def client(handler: "httpx.Response | Exception") -> Client:
    def answer(request: httpx.Request) -> httpx.Response:
        if isinstance(handler, Exception):
            raise handler
        return handler

    return Client(URL, transport=httpx.MockTransport(answer))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (httpx.Response(200, text="<html>"), "is not a page of this service"),
        (httpx.Response(200, text="# HELP x y\n# TYPE x gauge\nx 1\n"), "is not a page of this service"),
        (httpx.Response(401, json={"error": {"message": "no key"}}), "no key"),
        (httpx.ConnectError("refused"), "does not answer: refused"),
    ],
)
def test_what_is_no_service_is_told_in_words(answer: httpx.Response | Exception, words: str) -> None:
    with pytest.raises(RequestFailed, match=words):
        look(client(answer), URL)


def test_once_prints_once_what_happened_between_two_looks(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()

    def page(self: Client) -> str:
        service.ingress.generation_tokens.inc(100)
        return service.page()

    monkeypatch.setattr(Client, "metrics", page)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    said = CliRunner().invoke(app, ["top", "--once", "--url", URL], env={"COLUMNS": "140"})
    assert said.exit_code == 0
    assert said.output.count("100 tokens/s out") == 1
