"""The search ends at the highest rate that holds twice, and the curve shows where latency begins to climb."""

import json
from collections.abc import Callable

import pytest
from test_report import Page, make_run, one_a_second
from test_results import record

from loadtest.capacity import CapacityError, Point, Prober, judge, knee, search, write
from loadtest.report import Run, summarize


def server(limit: Callable[[int], float]) -> Callable[[float, int], Point]:
    """Sustains up to a limit, which may depend on the seed."""
    return lambda rate, seed: Point(rate, seed, [] if rate <= limit(seed) else ["too much"])


@pytest.mark.fast
@pytest.mark.parametrize("limit", [0.3, 1.0, 37.0, 450.0])
def test_the_capacity_is_within_its_tolerance_below_the_limit_and_was_sustained_twice(limit):
    capacity, points = search(server(lambda seed: limit), start=1.0, tolerance=0.1)
    assert limit / 1.1 <= capacity <= limit
    assert {point.seed for point in points if point.rate == capacity} == {0, 1}


@pytest.mark.fast
def test_the_curve_has_a_point_near_every_share_of_the_capacity():
    capacity, points = search(server(lambda seed: 37.0), start=1.0, tolerance=0.05)
    for share in (0.25, 0.5, 0.75, 0.9, 1.1, 1.25):
        assert any(abs(point.rate / (share * capacity) - 1) <= 0.05 for point in points)


@pytest.mark.fast
@pytest.mark.parametrize("lucky", [2.0, 40.0])
def test_a_rate_that_held_by_luck_is_not_the_capacity(lucky):
    capacity, _ = search(server(lambda seed: lucky if seed == 0 else 1.2), start=2.0, tolerance=0.1)
    assert 0.5 <= capacity <= 1.2


@pytest.mark.fast
def test_a_server_that_sustains_nothing_has_no_capacity():
    assert search(server(lambda seed: 0.0), start=1.0, tolerance=0.1)[0] == 0.0


@pytest.mark.fast
def test_a_server_without_a_limit_is_not_believed():
    with pytest.raises(CapacityError, match="something is wrong"):
        search(server(lambda seed: 1e9), start=1.0, tolerance=0.1)


@pytest.mark.fast
def test_the_knee_of_a_queue_is_where_its_curve_is_farthest_below_the_chord():
    # Latency 1 / (100 - rate) up to rate 99: the derivative of the distance is 0 where (100 - rate)^2 = 100.
    assert knee([(rate, 1 / (100 - rate)) for rate in range(100)]) == 90


@pytest.mark.fast
def test_a_straight_line_a_flat_one_and_two_points_have_no_knee():
    assert knee([(rate, 2.0 * rate) for rate in range(10)]) is None
    assert knee([(rate, 1.0) for rate in range(10)]) is None
    assert knee([(1, 1), (2, 9)]) is None


def report_of(run: Run) -> dict:
    return json.loads(json.dumps({"plan": run.plan.to_dict(), **summarize(run), "records": {}, "gauges": []}))


@pytest.mark.fast
def test_requests_that_pile_up_are_no_steady_state():
    steady = summarize(make_run([record(1000.0 + i / 10, index=i, e2e=1.0) for i in range(100)]))["in_flight"]
    assert steady["mean"] == pytest.approx(10, rel=0.05)
    assert steady["steady"]
    # Each takes longer than the one before: half of the arrivals are still there at the end.
    growing = [record(1000.0 + i / 10, index=i, e2e=0.1 + i / 10) for i in range(100)]
    piled = summarize(make_run(growing))["in_flight"]
    assert piled["growth"] == pytest.approx(40, abs=3)
    assert not piled["steady"]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"num_arrivals": 11}, ["INVALID: 10 of 11"]),
        ({"slos": ("ttft_p99=1ms",)}, ["missed ttft_p99=1ms"]),
    ],
)
def test_a_rate_is_sustained_when_nothing_speaks_against_it(changes, words):
    why = judge(1.0, 0, report_of(make_run(one_a_second(), **changes))).why
    assert [any(word in reason for reason in why) for word in words] == [True] * len(why)


@pytest.mark.fast
def test_a_lost_request_counts_against_a_rate_unless_an_objective_allows_some():
    records = [*one_a_second(), record(1005.0, index=10, outcome="failed")]
    assert judge(1.0, 0, report_of(make_run(records))).why == ["missed 1 requests failed"]
    assert judge(1.0, 0, report_of(make_run(records, slos=("ttft_p99=9s",)))).why == ["1 failed"]
    assert judge(1.0, 0, report_of(make_run(records, slos=("error_rate=20%",)))).why == []


@pytest.mark.slow
def test_a_probe_is_a_run_of_its_own_and_the_page_shows_the_curve(serve, tmp_path):
    _, host = serve()
    prober = Prober(["--host", host, "--max-lag", "60s", "--slo", "ttft_p99=30s"], tmp_path, window=1.0, warmup=0.5)
    points = [prober(rate, 0) for rate in (100.0, 200.0)]
    assert [point.summary["plan"]["arrivals"] for point in points] == ["poisson:rate=100.0", "poisson:rate=200.0"]
    assert points[0].summary["requests"] == pytest.approx(250, abs=80)
    write(100.0, points, tmp_path)
    page = Page((tmp_path / "capacity.html").read_text())
    assert page.tags.count("svg") == 4
    assert "Capacity: 100 requests/s" in page.words
    assert [point["rate"] for point in json.loads((tmp_path / "capacity.json").read_text())["points"]] == [100, 200]


@pytest.mark.slow
def test_a_probe_that_cannot_run_stops_the_search_with_its_words(tmp_path):
    prober = Prober(["--host", "http://127.0.0.1:9"], tmp_path, window=1.0, warmup=0.0)
    with pytest.raises(CapacityError, match="does not answer"):
        prober(100.0, 0)
