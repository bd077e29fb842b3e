"""One scrape of many processes."""

import asyncio
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service import exposition
from service.app import AppArgs
from service.exposition import Exposition, Replicas, View, as_vllm, export, merge, targets
from service.metrics import EngineMetrics, IngressMetrics
from tests.service.test_metrics import STEP, samples


def engine(replica: str, num_running: int = 2) -> str:
    metrics = EngineMetrics("tiny", replica)
    metrics.observe_step(STEP._replace(num_running=num_running))
    return metrics.expose()


HTTP_REQUEST: ContextVar[str] = ContextVar("request", default="nobody's")


class Handle:
    """Serve's handle over replicas that answer or hang."""

    def __init__(self, *names: str) -> None:
        self.names = list(names)
        self.hung: set[str] = set()
        self.broken: set[str] = set()
        self.callers: list[str] = []
        self.count = 0
        self.metrics = self

    def broadcast(self, method: str) -> "Handle":
        assert method == "metrics"
        return self

    async def results_async(self, timeout_s: float, return_exceptions: bool) -> list[Any]:
        assert return_exceptions
        if self.hung:
            raise TimeoutError
        return [RuntimeError(name) if name in self.broken else self.answer(name) for name in self.names]

    async def remote(self, pin: str) -> Exposition:
        self.callers.append(HTTP_REQUEST.get())
        if pin in self.hung:
            await asyncio.Event().wait()
        return self.answer(pin)

    def answer(self, name: str) -> Exposition:
        self.count += 1
        return Exposition("Engine", name, str(self.count))


def replicas(handle: Handle, *, pins: bool = True) -> Replicas:
    return Replicas(handle, pins=pins)  # type: ignore[arg-type]


async def read(of: Replicas) -> tuple[dict[str, str], int]:
    found, new = await of.read(0.01)
    return {one.replica: one.text for one in found}, new


async def test_all_replicas_are_read() -> None:
    assert await read(replicas(Handle("a", "b"))) == ({"a": "1", "b": "2"}, 2)


async def test_a_replica_that_hangs_is_shown_as_it_was_and_the_others_as_they_are() -> None:
    handle = Handle("a", "b")
    of = replicas(handle)
    await read(of)
    handle.hung = {"a"}
    assert await read(of) == ({"a": "1", "b": "3"}, 1)


async def test_calls_to_several_replicas_at_once_do_not_bear_one_requests_name() -> None:
    """Two of one name stop the event loop of Serve's router for 10 s."""
    handle = Handle("a", "b")
    of = replicas(handle)
    await read(of)
    handle.hung = {"a"}
    HTTP_REQUEST.set("a scrape's")
    await read(of)
    assert handle.callers == ["nobody's"] * 2


async def test_where_no_call_can_be_pinned_all_are_shown_as_they_were() -> None:
    handle = Handle("a", "b")
    of = replicas(handle, pins=False)
    await read(of)
    handle.hung = {"a"}
    assert await read(of) == ({"a": "1", "b": "2"}, 0)


async def test_a_replica_that_answers_with_an_error_is_shown_as_it_was() -> None:
    handle = Handle("a", "b")
    of = replicas(handle)
    await read(of)
    handle.broken = {"b"}
    assert await read(of) == ({"a": "3", "b": "2"}, 1)


async def test_a_replica_that_is_gone_is_shown_no_more() -> None:
    handle = Handle("a", "b")
    of = replicas(handle)
    await read(of)
    handle.names.remove("a")
    assert await read(of) == ({"b": "3"}, 1)


async def test_a_replica_that_stays_silent_is_forgotten_some_time(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = Handle("a", "b")
    of = replicas(handle)
    await read(of)
    handle.hung = {"a"}
    monkeypatch.setattr(exposition, "KEEP_S", 0)
    assert await read(of) == ({"b": "3"}, 1)


async def test_an_ingress_is_not_among_the_others() -> None:
    view = View(replicas(Handle("me", "other"), pins=False), replica="me")
    assert [one.replica for one in await view.others(1)] == ["other"]
    assert view.own("now") == Exposition("Ingress", "me", "now")


def test_replicas_keep_their_own_series_under_one_header() -> None:
    text = merge([IngressMetrics("tiny").expose(), engine("a", 1), engine("b", 5)])
    got = samples(text, "replica")
    assert got["num_requests_running", "a"] == 1
    assert got["num_requests_running", "b"] == 5
    for kind in ("TYPE", "HELP"):
        assert text.count(f"# {kind} attendant_num_requests_running ") == 1


def test_no_two_samples_of_a_page_are_of_one_series() -> None:
    text = merge([IngressMetrics("tiny", "x").expose(), IngressMetrics("tiny", "y").expose(), engine("a"), engine("b")])
    series = [line.rsplit(" ", 1)[0] for line in text.splitlines() if not line.startswith("#")]
    assert len(series) == len(set(series))


def test_merging_one_text_changes_nothing() -> None:
    text = IngressMetrics("tiny").expose()
    assert merge([text]) == text


def test_vllms_words_carry_our_numbers_under_its_names_and_labels() -> None:
    page = View(speaks_vllm=True).page([Exposition("Engine", "a", engine("a"))])
    families = {family.name: family for family in text_string_to_metric_families(page)}
    usage = families["vllm:kv_cache_usage_perc"].samples[0]
    assert usage.value == 0.5
    assert usage.labels == {"deployment": "Engine", "model_name": "tiny", "engine": "a"}
    assert families["attendant_kv_cache_usage_ratio"].samples[0].value == 0.5
    assert families["vllm:iteration_tokens_total"].type == "histogram"
    assert families["vllm:prefix_cache_hits"].samples[0].value == 40


def test_vllms_words_are_told_only_where_they_are_wanted() -> None:
    assert "vllm:" not in View().page([Exposition("Engine", "a", engine("a"))])


def test_what_vllm_has_is_told_in_its_words_and_nothing_else() -> None:
    metrics = EngineMetrics("tiny", "a")
    metrics.describe({}, {})
    told = as_vllm(merge([metrics.expose(), IngressMetrics("tiny").expose()]))
    wanted = {f"vllm:{theirs or ours}" for ours, theirs in exposition.VLLM_NAMES.items()}
    assert {line.split()[2] for line in told.splitlines() if line.startswith("#")} == wanted
    assert all(line.startswith(("#", *wanted)) for line in told.splitlines())


def test_a_model_named_like_a_label_is_left_as_it_is() -> None:
    metrics = EngineMetrics('x,model="y"', "a")
    (labels,) = (
        family.samples[0].labels
        for family in text_string_to_metric_families(as_vllm(metrics.expose()))
        if family.name == "vllm:num_requests_running"
    )
    assert labels["model_name"] == 'x,model="y"'


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1:"), ("::1", "[::1]:")])
def test_an_exporter_listens_where_it_says(host: str, shown: str) -> None:
    metrics = EngineMetrics("tiny", "a")
    target = export(metrics.registry, host)
    assert target.startswith(shown)
    assert httpx.get(f"http://{target}/metrics").text == metrics.expose()


@pytest.mark.parametrize("host", ["nowhere", "127.0.0.1:80", ""])
def test_where_to_expose_is_an_address(host: str) -> None:
    with pytest.raises(ValueError, match="metrics_host"):
        AppArgs(model=".", metrics_host=host)
    assert AppArgs(model=".", metrics_host="0.0.0.0").metrics_host == "0.0.0.0"


def test_processes_that_expose_themselves_are_listed_as_http_sd_wants_it() -> None:
    listed = targets([Exposition("Engine", "a", "", "127.0.0.1:1"), Exposition("Ingress", "b", "")])
    assert listed == [
        {
            "targets": ["127.0.0.1:1"],
            "labels": {"__meta_attendant_deployment": "Engine", "__meta_attendant_replica": "a"},
        }
    ]


async def test_without_exporters_a_question_for_targets_says_how_to_have_them(live: httpx.AsyncClient) -> None:
    answer = await live.get("/metrics/targets")
    assert answer.status_code == 404
    assert "--metrics-host" in answer.json()["error"]["message"]


@pytest.fixture
def scrape(live: httpx.AsyncClient) -> Callable[[], Any]:
    async def now() -> dict[Any, float]:
        return samples((await live.get("/metrics")).text, "type")

    return now


async def test_the_time_of_a_request_is_split_between_the_engine_and_the_rest(
    live: httpx.AsyncClient, scrape: Callable[[], Any]
) -> None:
    await live.post("/v1/completions", json={"prompt": "a fox", "max_tokens": 6, "ignore_eos": True})
    got = await scrape()
    parts = sum(got[f"request_{phase}_time_seconds_sum", None] for phase in ("queue", "prefill", "decode"))
    rest = got["framework_overhead_seconds_sum", None]
    assert parts + rest == pytest.approx(got["e2e_request_latency_seconds_sum", None], rel=1e-6)
    assert 0 < rest < parts + rest


async def test_a_request_of_several_choices_is_in_the_queue_once_and_around_the_engine_for_each(
    live: httpx.AsyncClient, scrape: Callable[[], Any]
) -> None:
    await live.post("/v1/completions", json={"prompt": "a fox", "max_tokens": 6, "ignore_eos": True, "n": 2})
    got = await scrape()
    for phase in ("queue", "prefill", "decode"):
        assert got[f"request_{phase}_time_seconds_count", None] == 1, phase
    assert got["framework_overhead_seconds_count", None] == 2


async def test_gaps_between_tokens_are_counted_by_the_token(live: httpx.AsyncClient, scrape: Callable[[], Any]) -> None:
    await live.post("/v1/completions", json={"prompt": "a fox", "max_tokens": 9, "ignore_eos": True})
    assert (await scrape())["inter_token_latency_seconds_count", None] == 8


async def test_what_goes_wrong_is_counted_by_its_type(live: httpx.AsyncClient, scrape: Callable[[], Any]) -> None:
    await live.post("/v1/completions", json={"prompt": "a fox", "max_tokens": -1})
    await live.post("/v1/completions", json={"prompt": "a fox"}, headers={"x-request-deadline-ms": "0"})
    got = await scrape()
    assert got["request_errors_total", "invalid_request_error"] == 1
    assert got["request_errors_total", "timeout_error"] == 1
    assert got["request_errors_total", "server_error"] == 0


async def test_the_page_says_what_was_loaded_and_how_many_engines_answered(live: httpx.AsyncClient) -> None:
    families = {one.name: one for one in text_string_to_metric_families((await live.get("/metrics")).text)}
    cache = families["attendant_cache_config_info"].samples[0].labels
    assert (cache["block_size"], cache["num_blocks"], cache["num_tokens"]) == ("16", "512", "8192")
    assert families["attendant_model_info"].samples[0].labels["kernels"] == "torch"
    assert {sample.labels["deployment"] for sample in families["attendant_build_info"].samples} == {"Engine", "Ingress"}
    assert families["attendant_engine_replicas_answering"].samples[0].value == 1
