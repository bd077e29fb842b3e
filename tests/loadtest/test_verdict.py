"""A run is believed when client and server agree and the client kept up; it passes when it met its objectives."""

import math

import pytest
from test_results import record

from loadtest.health import Health
from loadtest.histogram import Histogram
from loadtest.server import read_counters, reconcile
from loadtest.slo import SloError, is_good, parse, seconds, verdicts

CONSTANT = ("--arrivals", "constant:rate=10", "-t", "1s")


def exposition(requests: int, prompt: int, completion: int, prefix: str = "attendant_") -> str:
    return (
        f"# HELP {prefix}generation_tokens_total Tokens generated.\n"
        f'{prefix}request_success_total{{model="a b",finished_reason="stop"}} {requests - 1}.0\n'
        f'{prefix}request_success_total{{model="a b",finished_reason="length"}} 1.0\n'
        f'{prefix}request_success_total{{model="a b",finished_reason="abort"}} 7.0\n'
        f"{prefix}prompt_tokens_total {prompt}\n"
        f'{prefix}generation_tokens_total{{replica="1"}} {completion - 2}\n'
        f'{prefix}generation_tokens_total{{replica="2"}} 2\n'
    )


@pytest.mark.fast
@pytest.mark.parametrize("prefix", ["attendant_", "vllm:"])
def test_counters_are_summed_over_their_labels_without_what_was_aborted(prefix):
    counters = read_counters(exposition(5, 30, 40, prefix), when=1.0)
    assert counters is not None
    assert (counters.requests, counters.prompt_tokens, counters.completion_tokens) == (5, 30, 40)


@pytest.mark.fast
def test_llama_cpp_is_compared_by_its_generated_tokens_alone():
    counters = read_counters("llamacpp:prompt_tokens_total 5\nllamacpp:tokens_predicted_total 40\n", when=1.0)
    assert counters is not None
    assert (counters.requests, counters.prompt_tokens, counters.completion_tokens) == (None, None, 40)


@pytest.mark.fast
def test_a_server_without_counters_that_we_know_is_not_compared():
    assert read_counters("python_info 1.0\n", when=1.0) is None


def agreement(records: list, requests: int, prompt: int, completion: int) -> dict[str, bool]:
    before = read_counters(exposition(10, 100, 1000), when=0.0)
    after = read_counters(exposition(10 + requests, 100 + prompt, 1000 + completion), when=1.0)
    assert before is not None
    assert after is not None
    return {check.name: check.agrees for check in reconcile(before, after, records)}


@pytest.mark.fast
def test_finished_requests_must_agree_exactly():
    records = [record(prompt_tokens=3, completion_tokens=8) for _ in range(4)]
    assert all(agreement(records, 4, 12, 32).values())
    for index, name in enumerate(("requests", "prompt_tokens", "completion_tokens")):
        for error in (-1, 1):
            counts = [4, 12, 32]
            counts[index] += error
            assert [key for key, agrees in agreement(records, *counts).items() if not agrees] == [name]


@pytest.mark.fast
def test_a_request_that_was_left_may_have_had_anything_from_what_was_seen_to_what_was_asked_for():
    left = record(outcome="cancelled", prompt_tokens=0, completion_tokens=0, chunks=16, max_tokens=256)
    records = [record(prompt_tokens=3, completion_tokens=8), left]
    assert all(agreement(records, 1, 3, 8 + 16).values())
    assert all(agreement(records, 2, 90, 8 + 256).values())
    assert not agreement(records, 0, 3, 24)["requests"]
    assert not agreement(records, 1, 2, 24)["prompt_tokens"]
    assert not agreement(records, 1, 3, 8 + 15)["completion_tokens"]
    assert not agreement(records, 1, 3, 8 + 257)["completion_tokens"]


@pytest.mark.fast
def test_a_refused_request_has_no_tokens():
    refused = record(outcome="refused", prompt_tokens=0, completion_tokens=0, max_tokens=100)
    assert all(agreement([record(), refused], 1, 3, 8).values())
    assert not agreement([record(), refused], 1, 3, 9)["completion_tokens"]


def lag(milliseconds: float, share: float = 1.0) -> Histogram:
    histogram = Histogram()
    for number in range(1000):
        histogram.record(milliseconds / 1e3 if number < 1000 * share else 1e-4)
    return histogram


@pytest.mark.fast
def test_a_client_that_was_short_of_time_complains():
    health = Health()
    assert health.complaints(lag(1), 0.01) == []
    assert "requests were sent" in health.complaints(lag(20, share=0.02), 0.01)[0]
    assert health.complaints(lag(20, share=0.009), 0.01) == []
    health.lag = lag(15)
    assert "event loop was" in health.complaints(lag(1), 0.01)[0]
    health.lag, health.cpu = lag(1), 0.95
    assert "95% of a core" in health.complaints(lag(1), 0.01)[0]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("text", "metric", "stat", "bound"),
    [
        ("ttft_p99=300ms", "ttft", "p99", 0.3),
        ("itl_p99.9=2.5ms", "itl", "p99.9", 0.0025),
        ("e2e_mean=3s", "e2e", "mean", 3.0),
        ("goodput=95%", "goodput", "", 0.95),
        ("goodput_rate=4.5/s", "goodput_rate", "", 4.5),
        ("error_rate=0%", "error_rate", "", 0.0),
    ],
)
def test_an_objective_is_read_with_its_unit(text, metric, stat, bound):
    slo = parse(text)
    assert (slo.metric, slo.stat) == (metric, stat)
    assert slo.bound == pytest.approx(bound)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ttft_p99", "is no objective"),
        ("ttft=300ms", "does not say of what"),
        ("ttft_p99=300", "needs a unit of time"),
        ("ttft_p0=300ms", "between 0 and 100"),
        ("speed_p99=3ms", "none of ttft, tpot"),
        ("goodput=95", "written goodput=NUMBER%"),
        ("goodput_p99=95%", "written goodput=NUMBER%"),
        ("ttft_p99=1.2.3ms", "is no objective"),
    ],
)
def test_an_objective_that_cannot_be_is_refused_in_words(text, words):
    with pytest.raises(SloError, match=words):
        parse(text)


@pytest.mark.fast
def test_a_duration_has_a_unit():
    assert (seconds("500ms"), seconds("1.5s")) == (0.5, 1.5)
    with pytest.raises(SloError):
        seconds("3")


@pytest.mark.fast
def test_a_request_is_good_when_it_met_every_bound_at_once():
    slos = [parse("ttft_p99=1s"), parse("tpot_p50=200ms"), parse("error_rate=50%")]
    assert is_good(record(), slos)
    assert not is_good(record(ttft=0.8), slos)  # it was sent 0.25 s late, and its reader waited for that too
    assert not is_good(record(tpot=0.3), slos)
    assert is_good(record(tpot=None), slos)
    assert not is_good(record(outcome="refused"), slos)


@pytest.mark.fast
def test_an_objective_about_nothing_is_missed():
    summary = {"latencies": {"ttft": {}}, "goodput": math.nan, "error_rate": 0.0}
    met = {each["slo"]: each["met"] for each in verdicts(list(map(parse, ("ttft_p99=1s", "goodput=1%"))), summary)}
    assert met == {"ttft_p99=1s": False, "goodput=1%": False}
    assert verdicts([parse("error_rate=0%")], summary)[0]["met"]


@pytest.mark.slow
def test_a_run_within_its_objectives_exits_with_0(serve, load):
    _, host = serve()
    done = load(host, *CONSTANT, "--slo", "ttft_p99=30s", "--slo", "goodput=100%", "--slo", "error_rate=0%")
    assert done.exit_code == 0, done.output
    assert [each["met"] for each in done.report["slos"]] == [True, True, True]


@pytest.mark.slow
def test_a_missed_objective_exits_with_1(serve, load):
    _, host = serve(first=0.3)
    done = load(host, *CONSTANT, "--slo", "ttft_p50=200ms", "--slo", "ttft_p99=30s")
    assert done.exit_code == 1
    assert done.report["missed"] == ["ttft_p50=200ms"]
    assert "SLO ttft_p50=200ms           MISSED" in done.output
    assert done.report["goodput"] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["requests", "prompt", "completion"])
def test_a_server_that_counts_one_too_many_makes_the_run_invalid(serve, load, name):
    _, host = serve(lies={name: 1}, lies_after=5)
    done = load(host, *CONSTANT)
    assert done.exit_code == 2
    assert "INVALID" in done.output
    assert [check["name"].startswith(name) for check in done.report["reconciliation"] if not check["agrees"]] == [True]


@pytest.mark.slow
def test_a_server_that_counts_a_little_after_its_answer_is_waited_for(serve, load):
    _, host = serve(counts_late=0.05)
    done = load(host, *CONSTANT)
    assert done.exit_code == 0, done.output


@pytest.mark.slow
def test_a_client_that_sends_late_makes_the_run_invalid(serve, load):
    _, host = serve()
    done = load(host, *CONSTANT, "--max-lag", "1us")
    assert done.exit_code == 2
    assert any("requests were sent" in reason for reason in done.report["reasons"])


@pytest.mark.slow
def test_refusals_are_timed_and_fail_a_run_unless_an_objective_allows_them(serve, load):
    _, host = serve(refuse_after=6)
    done = load(host, *CONSTANT)
    assert (done.exit_code, done.report["ok"], done.report["refused"]) == (1, 5, 5)
    assert done.report["latencies"]["refusal"]["count"] == 5
    assert done.report["retry_after"] == 5
    _, host = serve(refuse_after=6)
    allowed = load(host, *CONSTANT, "--slo", "error_rate=60%", "--slo", "refusal_p99=30s")
    assert allowed.exit_code == 0, allowed.output


@pytest.mark.slow
def test_a_server_without_metrics_is_measured_and_said_not_to_be_compared(serve, load):
    _, host = serve(metrics=False)
    done = load(host, *CONSTANT)
    assert done.exit_code == 0, done.output
    assert not done.report["reconciled"]
    assert "were not compared" in done.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--slo", "ttft=3"), "does not say of what"),
        (("--arrivals", "uniform:rate=1"), "no arrival process"),
        (("--workload", "none"), "has no workload 'none'"),
        (("--warmup", "30s", "-t", "20s"), "--run-time must be longer"),
    ],
)
@pytest.mark.slow
def test_options_that_cannot_be_stop_the_test_before_it_starts(load, options, words):
    done = load("http://127.0.0.1:9", *options)
    assert done.exit_code not in (0, 1)
    assert words in done.output


@pytest.mark.slow
@pytest.mark.parametrize("processes", [(), ("--processes", "2")], ids=["one process", "two workers"])
def test_a_server_that_is_not_there_is_an_invalid_run(load, processes):
    done = load("http://127.0.0.1:9", "-t", "5s", *processes)
    assert done.exit_code == 2
    assert "does not answer as an OpenAI-compatible server" in done.output


@pytest.mark.slow
def test_an_interrupted_run_still_reports_what_it_measured_and_an_open_loop_is_invalid(serve, load, tmp_path):
    stub, host = serve()
    options = ("--arrivals", "constant:rate=10", "-t", "60s")
    done = load(host, *options, interrupt_when=lambda: len(stub.streamed) >= 5)
    assert done.exit_code == 2
    assert 5 <= done.report["requests"] == len(stub.streamed) < 600
    assert done.report["reasons"] == [f"{len(stub.streamed)} of 600 arrivals of the schedule were sent"]
