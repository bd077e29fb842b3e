"""The real Prometheus scrapes the running service, and its answers agree with what clients counted."""

import subprocess
import time
from bisect import bisect_left
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import NamedTuple

import httpx
import pytest

from service.metrics import PHASE_BUCKETS_S
from tests.observe.conftest import Prometheus, configure, installed, until
from tests.service.conftest import Running

pytestmark = pytest.mark.slow


REQUESTS = 32


class Answer(NamedTuple):
    """One stream as its client saw it."""

    first: float
    prompt_tokens: int
    completion_tokens: int


def stream(client: httpx.Client, number: int) -> Answer:
    """A long prompt that no other shares: most of what the client waits for is the engine's work."""
    prompt = [5 + (number + i * i) % 300 for i in range(600)]
    body: dict[str, object] = {"prompt": prompt, "max_tokens": 8 + number % 9, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    asked, first, usage = time.perf_counter(), 0.0, {}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == httpx.codes.OK
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - asked
                if '"usage":{' in line:
                    usage = httpx.Response(200, text=line.removeprefix("data: ")).json()["usage"]
    return Answer(first, usage["prompt_tokens"], usage["completion_tokens"])


class Traffic(NamedTuple):
    """What clients saw between two moments that Prometheus has seen, too."""

    answers: list[Answer]
    begin: float
    end: float


@pytest.fixture(scope="module")
def traffic(watched: Running, prometheus: Prometheus) -> Traffic:
    begin = prometheus.catch_up()
    with ThreadPoolExecutor(4) as pool, httpx.Client(base_url=watched.url, timeout=60) as client:
        answers = list(pool.map(lambda number: stream(client, number), range(REQUESTS)))
    return Traffic(answers, begin, prometheus.catch_up())


def grown(expr: str, traffic: Traffic) -> str:
    """By how much a sum of counters has grown over the traffic, exactly: `increase` would extrapolate."""
    return f"{expr.format(at=f'@ {traffic.end:.3f}')} - {expr.format(at=f'@ {traffic.begin:.3f}')}"


def test_requests_and_tokens_are_counted_to_the_last_one(prometheus: Prometheus, traffic: Traffic) -> None:
    def counted(name: str) -> float:
        return prometheus.value(grown(f"sum(attendant_{name}_total {{at}})", traffic))

    assert counted("request_success") == REQUESTS
    assert counted("generation_tokens") == sum(answer.completion_tokens for answer in traffic.answers)
    assert counted("prompt_tokens") == sum(answer.prompt_tokens for answer in traffic.answers)


def test_every_first_token_has_been_observed(prometheus: Prometheus, traffic: Traffic) -> None:
    assert prometheus.value(grown("sum(attendant_time_to_first_token_seconds_count {at})", traffic)) == REQUESTS


def test_the_median_time_to_first_token_is_the_clients_within_a_bucket(
    prometheus: Prometheus, traffic: Traffic
) -> None:
    buckets = grown("sum by (le) (attendant_time_to_first_token_seconds_bucket {at})", traffic)
    theirs = prometheus.value(f"histogram_quantile(0.5, {buckets})")
    ours = median(answer.first for answer in traffic.answers)
    assert abs(bisect_left(PHASE_BUCKETS_S, theirs) - bisect_left(PHASE_BUCKETS_S, ours)) <= 1


def test_the_parts_of_the_requests_add_up_to_their_whole(prometheus: Prometheus, traffic: Traffic) -> None:
    """Engine and ingress are different processes; each observes its part."""
    names = ["request_queue_time", "request_prefill_time", "request_decode_time", "framework_overhead"]
    parts = [prometheus.value(grown(f"sum(attendant_{name}_seconds_sum {{at}})", traffic)) for name in names]
    whole = prometheus.value(grown("sum(attendant_e2e_request_latency_seconds_sum {at})", traffic))
    assert sum(parts) == pytest.approx(whole, rel=0.001)


def test_each_process_has_series_of_its_own(prometheus: Prometheus, traffic: Traffic) -> None:
    found = [sample["metric"] for sample in prometheus.vector("attendant_build_info")]
    assert sorted(labels["deployment"] for labels in found) == ["Engine", "Engine", "Ingress"]
    assert len({labels["replica"] for labels in found}) == 3
    assert {labels["model"] for labels in found} == {"tiny"}
    assert prometheus.value("attendant_engine_replicas_answering") == 2


def test_vllms_names_give_the_same_numbers(prometheus: Prometheus, traffic: Traffic) -> None:
    ours = prometheus.value("sum(attendant_generation_tokens_total)")
    assert prometheus.value('sum(vllm:generation_tokens_total{model_name="tiny"})') == ours > 0


def test_every_rule_is_evaluated_without_an_error(prometheus: Prometheus, traffic: Traffic) -> None:
    def rules() -> list[dict[str, str]]:
        found = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
        return found if all(rule["health"] != "unknown" for rule in found) else []

    found = until(rules)
    assert len(found) == 18
    assert [rule for rule in found if rule["health"] != "ok"] == []
    assert until(lambda: prometheus.vector("model:attendant_ttft_seconds:p50_5m > 0"))
    raised = {alert["labels"]["alertname"] for alert in prometheus.get("alerts")["alerts"]}
    assert raised <= {"AttendantTTFTBurnsFast", "AttendantTTFTBurnsSlowly"}, "a slow machine is none of our errors"


def test_the_processes_of_a_cluster_are_discovered_and_scraped_one_by_one(
    watched: Running, traffic: Traffic, tmp_path: Path
) -> None:
    server = configure(tmp_path, "cluster.yml", watched.url)
    process = server.start()
    try:
        tokens = "sum(attendant_generation_tokens_total)"
        until(lambda: len(server.vector('up{job="attendant-processes"} == 1')) == 3 and server.vector(tokens))
        replicas = {sample["metric"]["replica"] for sample in server.vector("attendant_build_info")}
        assert len(replicas) == 3
        assert server.value(tokens) == watched.metrics()["attendant_generation_tokens_total"]
        assert len(server.vector("attendant_engine_step_seconds_count > 0")) == 2
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_promtool_has_nothing_to_say_against_the_page(watched: Running, traffic: Traffic) -> None:
    """The names of vLLM are not ours to choose: it writes colons, and a histogram that ends in `_total`."""
    page = httpx.get(f"{watched.url}/metrics").text
    ours = page[: page.index("# HELP vllm:")]
    assert ours.count("# HELP ") > 35
    checked = subprocess.run(
        [installed("promtool"), "check", "metrics"], input=ours, capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
