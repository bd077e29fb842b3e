"""Arrivals come from a seed alone, at the rate and burstiness that were asked for, and are split without loss."""

import statistics
from itertools import pairwise

import pytest

from loadtest.schedule import ScheduleError, arrivals, share

pytestmark = pytest.mark.fast


def times(spec: str, seconds: float, seed: int = 0) -> list[float]:
    return [arrival.seconds for arrival in arrivals(spec, seconds=seconds, seed=seed)]


def gaps(values: list[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(values)]


def test_constant_arrivals_are_evenly_spaced_from_the_start():
    assert times("constant:rate=4", 1.0) == [0.0, 0.25, 0.5, 0.75]


def test_a_seed_gives_the_same_arrivals_again_and_another_gives_others():
    assert times("poisson:rate=50", 20, seed=1) == times("poisson:rate=50", 20, seed=1)
    assert times("poisson:rate=50", 20, seed=1) != times("poisson:rate=50", 20, seed=2)


@pytest.mark.parametrize(
    ("spec", "variation"),
    [
        ("poisson:rate=50", 1.0),
        ("gamma:rate=50,burstiness=1", 1.0),
        ("gamma:rate=50,burstiness=0.25", 2.0),
        ("gamma:rate=50,burstiness=4", 0.5),
    ],
)
def test_gaps_have_the_rate_and_the_coefficient_of_variation_of_their_gamma_distribution(spec, variation):
    drawn = gaps(times(spec, 1000))
    assert statistics.fmean(drawn) == pytest.approx(1 / 50, rel=0.03)
    assert statistics.pstdev(drawn) / statistics.fmean(drawn) == pytest.approx(variation, rel=0.03)


def test_a_faster_run_of_one_seed_is_the_same_pattern_compressed():
    slow, fast = times("poisson:rate=10", 100), times("poisson:rate=20", 50)
    assert fast == pytest.approx([second / 2 for second in slow])


def test_a_ramp_has_the_requests_that_its_area_says_in_each_part():
    drawn = times("ramp:start=0,end=100", 100)
    assert all(0 <= time < 100 for time in drawn)
    for begin, end in ((0, 50), (50, 80), (80, 100)):
        expected = (end**2 - begin**2) / 2
        assert sum(begin <= time < end for time in drawn) == pytest.approx(expected, abs=4 * expected**0.5)
    falling = times("ramp:start=100,end=0", 100)
    assert sum(time < 50 for time in falling) == pytest.approx(3750, abs=4 * 3750**0.5)


def test_a_spike_is_where_it_was_put():
    drawn = times("spike:rate=10,peak=200,at=20,seconds=5", 60)
    inside = [time for time in drawn if 20 <= time < 25]
    assert len(inside) == pytest.approx(1000, abs=4 * 1000**0.5)
    assert len(drawn) - len(inside) == pytest.approx(550, abs=4 * 550**0.5)


@pytest.mark.parametrize("num_workers", [1, 2, 3, 7])
def test_workers_share_a_schedule_without_loss_or_duplicates(num_workers):
    whole = arrivals("gamma:rate=30,burstiness=0.5", seconds=10, seed=3)
    parts = [share(whole, worker, num_workers) for worker in range(num_workers)]
    assert sorted((arrival for part in parts for arrival in part), key=lambda arrival: arrival.index) == whole
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_public_azure_trace_is_replayed_with_its_lengths_at_any_speed(tmp_path):
    file = tmp_path / "azure.csv"
    file.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.6805900,396,109\n"
        "2023-11-16 18:16:46.6805900,879,55\n"
    )
    replayed = arrivals(f"trace:file={file},speed=2", seconds=10, seed=0)
    assert [arrival.seconds for arrival in replayed] == pytest.approx([0, 2])
    assert [(arrival.input_tokens, arrival.output_tokens) for arrival in replayed] == [(374, 44), (396, 109)]


def test_a_report_of_ours_is_a_trace(tmp_path):
    file = tmp_path / "run.csv"
    file.write_text("index,intended,prompt_tokens,completion_tokens\n1,1700000001.5,20,8\n0,1700000001.0,10,0\n")
    replayed = arrivals(f"trace:file={file}", seconds=10, seed=0)
    assert [(arrival.seconds, arrival.input_tokens, arrival.output_tokens) for arrival in replayed] == [
        (0.0, 10, 1),
        (0.5, 20, 8),
    ]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("uniform:rate=3", "no arrival process is called 'uniform'"),
        ("poisson", "rate= is missing"),
        ("poisson:rate=0", "rate=0 must be above 0"),
        ("poisson:rate=nan", "must be above 0"),
        ("poisson:rate=fast", "rate=fast is no number"),
        ("poisson:rate", "NAME:key=value"),
        ("poisson:rate=3,peak=9", "poisson takes no peak"),
        ("poisson:rate=3,burstiness=2", "poisson takes no burstiness"),
        ("trace:file=a.csv,rate=2", "trace takes no rate"),
        ("gamma:rate=3", "burstiness= is missing"),
        ("ramp:start=-1,end=3", "start=-1 must be at least 0"),
    ],
)
def test_an_impossible_process_is_refused_in_words(spec, words):
    with pytest.raises(ScheduleError, match=words):
        arrivals(spec, seconds=1, seed=0)


def test_a_trace_of_other_columns_is_refused_with_the_columns_it_may_have(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text("when,what\n1,2\n")
    with pytest.raises(ScheduleError, match="TIMESTAMP, ContextTokens"):
        arrivals(f"trace:file={file}", seconds=1, seed=0)
