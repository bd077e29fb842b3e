"""What the load test says is what the server itself wrote down: delays, requests and tokens, in either loop."""

import re
from statistics import median

import pytest

from loadtest.schedule import arrivals
from loadtest.workload import Workloads

pytestmark = pytest.mark.slow

FIRST, GAP, TOKENS = 0.4, 0.05, 9


@pytest.mark.parametrize("processes", [(), ("--processes", "2")], ids=["one process", "two workers"])
@pytest.mark.parametrize("workload", ["story", "multi-turn"])
def test_latencies_are_within_two_percent_of_those_that_the_server_wrote_down(serve, load, workload, processes):
    stub, host = serve(first=FIRST, gap=GAP, tokens=TOKENS)
    done = load(host, "-u", "2", "-t", "5s", "--workload", workload, *processes)
    assert done.exit_code == 0, done.output
    served = [each for each in stub.streamed if len(each.sent) == TOKENS]
    records, latencies = done.report["records"], done.report["latencies"]
    assert len(records["sent"]) == len(served) > 4
    # Read in blocks of 1,024 bytes, the first token would come with the fourth or so.
    assert median(records["ttft"]) == pytest.approx(median(each.sent[0] - each.arrived for each in served), rel=0.02)
    spans = [(each.sent[-1] - each.sent[0]) / (TOKENS - 1) for each in served]
    assert median(records["tpot"]) == pytest.approx(median(spans), rel=0.02)
    assert median(records["e2e"]) == pytest.approx(median(each.sent[-1] - each.arrived for each in served), rel=0.02)
    gaps = [later - earlier for each in served for earlier, later in zip(each.sent, each.sent[1:], strict=False)]
    assert latencies["itl"]["p50"] == pytest.approx(median(gaps), rel=0.02)
    assert latencies["itl"]["count"] == len(gaps)
    assert done.report["completion_tokens"] == TOKENS * len(served)


def test_nothing_but_whole_requests_is_in_the_table_of_locust(serve, load):
    stub, host = serve(gap=0.02)
    done = load(host, "-u", "2", "-t", "2s")
    rows = re.findall(r"^(?:POST +(\S+)| +Aggregated) +(\d+) +0\(", done.output, re.MULTILINE)
    count = str(len(stub.streamed))
    assert rows == [("/v1/completions", count), ("", count)]


@pytest.mark.parametrize("processes", [(), ("--processes", "2")], ids=["one process", "two workers"])
def test_an_open_loop_sends_every_arrival_once_though_none_was_answered_yet(serve, load, processes):
    stub, host = serve(first=2.0, tokens=1)
    done = load(host, "--arrivals", "poisson:rate=20", "-t", "2s", "--seed", "5", "--workload", "fixed", *processes)
    assert done.exit_code == 0, done.output
    schedule = arrivals("poisson:rate=20", seconds=2.0, seed=5)
    words = Workloads("fixed", seed=5)
    expected = {words.conversation(arrival.index).turns[0].text for arrival in schedule}
    assert sorted(each.body["prompt"] for each in stub.streamed) == sorted(expected)
    last_send = max(each.arrived for each in stub.streamed)
    assert last_send < min(each.sent[0] for each in stub.streamed)
    starts = done.report["plan"]["starts_at"]
    intended = [start - starts for start in done.report["records"]["intended"]]
    assert intended == pytest.approx([arrival.seconds for arrival in schedule], abs=1e-3)


def test_latency_counts_from_the_intended_send_and_from_the_actual_one(serve, load):
    _, host = serve(first=0.05)
    done = load(host, "--arrivals", "constant:rate=20", "-t", "2s")
    latencies, records = done.report["latencies"], done.report["records"]
    late = [sent - intended for sent, intended in zip(records["sent"], records["intended"], strict=True)]
    assert min(late) >= 0
    difference = latencies["ttft"]["mean"] - latencies["ttft_sent"]["mean"]
    assert difference == pytest.approx(sum(late) / len(late), abs=1e-6)
    assert latencies["late"]["mean"] == pytest.approx(sum(late) / len(late))


def test_the_warm_up_is_sent_and_reconciled_but_not_measured(serve, load):
    stub, host = serve()
    done = load(host, "--arrivals", "constant:rate=10", "-t", "3s", "--warmup", "2s")
    assert done.exit_code == 0, done.output
    assert len(stub.streamed) == len(done.report["records"]["sent"]) == 30
    assert done.report["requests"] == done.report["latencies"]["ttft"]["count"] == 10


def test_a_reader_who_leaves_closes_the_connection_and_has_no_end_to_end_latency(serve, load):
    stub, host = serve(gap=0.01, tokens=None)
    done = load(host, "--arrivals", "constant:rate=4", "-t", "2s", "--workload", "cancel")
    assert done.exit_code == 0, done.output
    assert done.report["cancelled"] == done.report["requests"] == 8
    assert all(each.left and len(each.sent) < 256 for each in stub.streamed)
    assert done.report["latencies"]["e2e"] == {}
    assert done.report["latencies"]["ttft"]["count"] == 8


def test_a_slow_reader_is_left_out_of_the_latencies_that_it_makes_itself(serve, load):
    _, host = serve()
    done = load(host, "--arrivals", "constant:rate=4", "-t", "1s", "--workload", "slow")
    assert done.report["ok"] == done.report["latencies"]["ttft"]["count"] == 4
    assert done.report["latencies"]["e2e"] == done.report["latencies"]["itl"] == {}
    assert min(done.report["records"]["e2e"]) > 3 * 0.1  # it did pause after each chunk but the last


def test_connections_are_used_again_once_their_answer_has_ended(serve, load):
    stub, host = serve()
    load(host, "-u", "1", "-t", "2s")
    assert len(stub.streamed) > 10
    assert len({each.connection for each in stub.streamed}) == 1


def test_the_lengths_of_prompts_are_in_the_tokens_of_the_server(serve, load):
    stub, host = serve(tokens_per_word=2)
    load(host, "--arrivals", "constant:rate=4", "-t", "1s", "--workload", "fixed")
    assert {len(each.body["prompt"].split()) for each in stub.streamed} == {64}


def test_an_answer_that_is_not_the_json_asked_for_is_a_failure_and_still_counted(serve, load):
    _, host = serve(reason="stop")
    done = load(host, "--arrivals", "constant:rate=4", "-t", "1s", "--workload", "json")
    assert done.exit_code == 1
    assert done.report["failed"] == 4
    assert "not JSON" in next(iter(done.report["errors"]))
    assert all(check["agrees"] for check in done.report["reconciliation"])
