"""Histograms keep their precision, and what workers measured adds up to what one process would have."""

import json
import math
import random

import pytest

from loadtest.histogram import Histogram
from loadtest.results import METRICS, Record, Results

pytestmark = pytest.mark.fast


def record(intended: float = 100.0, **changes: object) -> Record:
    values: dict = {"index": 0, "turn": 0, "kind": "chat", "intended": intended, "sent": intended + 0.25, "e2e": 2.0}
    values |= {"outcome": "ok", "ttft": 0.5, "tpot": 0.125, "prompt_tokens": 3, "completion_tokens": 8}
    return Record(**(values | changes))


def test_percentiles_are_within_half_a_percent_of_the_nearest_rank():
    values = [random.Random(0).lognormvariate(-5, 2) for _ in range(5000)]
    histogram = Histogram()
    for value in values:
        histogram.record(value)
    ordered = sorted(values)
    for percent in (1, 50, 90, 99, 99.9, 100):
        exact = ordered[math.ceil(len(values) * percent / 100) - 1]
        assert histogram.percentile(percent) == pytest.approx(exact, rel=0.005)
    assert histogram.mean == pytest.approx(sum(values) / len(values))
    assert histogram.longest == max(values)


def test_a_late_send_is_added_to_what_the_reader_waited_for():
    assert dict(record().latencies()) == {
        "late": 0.25,
        "ttft_sent": 0.5,
        "ttft": 0.75,
        "e2e_sent": 2.0,
        "e2e": 2.25,
        "tpot": 0.125,
    }


@pytest.mark.parametrize(
    ("changes", "metrics"),
    [
        ({"outcome": "cancelled"}, {"late", "ttft", "ttft_sent"}),
        ({"paced": True}, {"late", "ttft", "ttft_sent"}),
        ({"outcome": "refused", "ttft": None}, {"late", "refusal"}),
        ({"outcome": "failed"}, {"late"}),
        ({"tpot": None}, {"late", "ttft", "ttft_sent", "e2e", "e2e_sent"}),
    ],
)
def test_a_request_counts_only_where_it_has_something_to_say(changes, metrics):
    assert {name for name, _ in record(**changes).latencies()} == metrics


def test_results_of_workers_add_up_to_those_of_one():
    whole, merged = Results(), Results()
    for i in range(4):
        worker = Results()
        for j in range(5):
            one = record(100.0 + 5 * i + j, index=5 * i + j, ttft=0.125 * (i + 1), kind=("chat", "long")[j % 2])
            worker.add(one, [0.25, 0.5])
            whole.add(one, [0.25, 0.5])
        merged.merge(json.loads(json.dumps(worker.take())))
        assert worker.records == []
    assert merged.measured == whole.measured
    for kind in (None, "chat", "long"):
        for metric in METRICS:
            assert merged.histogram(metric, kind).to_dict() == whole.histogram(metric, kind).to_dict()
    assert whole.histogram("itl").count == 40


def test_the_warm_up_leaves_records_and_no_latencies():
    results = Results(measured_from=101.0)
    results.add(record(100.5), [0.1])
    results.add(record(101.5), [0.1])
    assert len(results.records) == 2
    assert results.measured == [results.records[1]]
    assert results.histogram("ttft").count == results.histogram("itl").count == 1
