"""The intervals of a comparison hold the truth as often as they say, and its exit code gates a release."""

import importlib
import tomllib
from pathlib import Path

import numpy as np
import pytest
from test_report import make_run
from test_results import record

from loadtest.__main__ import main
from loadtest.compare import block_length, change, mean, percentile, read, tokens_each_second
from loadtest.report import summarize, write

ROOT = Path(__file__).parent.parent.parent


def coverage(draw, statistic, truth: float, block: int, repeats: int = 100) -> float:
    """How often the interval holds the true change."""
    generator = np.random.default_rng(7)
    held = 0
    for _ in range(repeats):
        values = draw(generator, 1.0), draw(generator, 1.0 + truth)
        found = change("", values, (block, block), statistic, more_is_better=False)
        held += found.low <= truth <= found.high
    return held / repeats


def independent(generator, scale):
    return scale * generator.exponential(1.0, 300)


def in_bursts(generator, scale):
    """Ten neighbours share their fate."""
    return scale * np.repeat(generator.exponential(1.0, 200), 10)


@pytest.mark.slow
@pytest.mark.parametrize("statistic", [mean, percentile(50), percentile(90)], ids=["mean", "p50", "p90"])
def test_intervals_of_independent_requests_hold_the_truth_in_95_of_100_runs(statistic):
    assert 0.90 <= coverage(independent, statistic, truth=0.2, block=7) <= 0.99


@pytest.mark.slow
def test_requests_that_share_their_fate_need_blocks_or_the_intervals_are_too_narrow():
    assert coverage(in_bursts, mean, truth=0.2, block=20) >= 0.90
    assert coverage(in_bursts, mean, truth=0.2, block=1) < 0.75


def test_the_interval_of_a_mean_is_as_wide_as_the_normal_distribution_says():
    generator = np.random.default_rng(0)
    values = 1 + 0.1 * generator.standard_normal(2000), 1.1 + 0.1 * generator.standard_normal(2000)
    found = change("", values, (1, 1), mean, more_is_better=False)
    assert found.change == pytest.approx(values[1].mean() / values[0].mean() - 1)
    error = np.sqrt(0.1**2 / 2000 + (1.1 * 0.1) ** 2 / 2000)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert found.verdict == "worse"


@pytest.mark.parametrize(
    ("factor", "more_is_better", "verdict"),
    [(1.2, False, "worse"), (1.2, True, "better"), (0.8, False, "better"), (1.0, True, "same")],
)
def test_a_change_is_better_or_worse_only_where_the_interval_leaves_no_other_way(factor, more_is_better, verdict):
    values = np.random.default_rng(3).normal(1.0, 0.1, 500)
    found = change("", (values, factor * values), (1, 1), mean, more_is_better=more_is_better)
    assert found.verdict == verdict


def report(folder: Path, name: str, seed: int, factor: float = 1.0, count: int = 800, **changes: object) -> Path:
    """A run of 80 requests/s whose latencies are log-normal."""
    generator = np.random.default_rng(seed)
    records = []
    for index in range(count):
        at = 1000.0 + 10 * index / count
        ttft, tpot = factor * np.exp(generator.normal((-2.0, -3.5), 0.3))
        records.append(record(at, index=index, sent=at, ttft=float(ttft), tpot=float(tpot), e2e=float(ttft + 7 * tpot)))
    run = make_run(records, **changes)
    write(run, summarize(run), folder / f"{name}.json")
    return folder / f"{name}.json"


def test_two_runs_of_one_server_are_the_same(tmp_path, capsys):
    assert main(["compare", str(report(tmp_path, "a", 1)), str(report(tmp_path, "b", 2))]) == 0
    assert "worse" not in capsys.readouterr().out


def test_a_slower_run_is_told_apart_and_exits_with_1(tmp_path, capsys):
    assert main(["compare", str(report(tmp_path, "a", 1)), str(report(tmp_path, "b", 2, factor=1.2))]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ttft p50")]
    assert lines[0].endswith("worse")


def test_runs_that_differ_in_more_than_the_server_are_named(tmp_path, capsys):
    a, b = report(tmp_path, "a", 1), report(tmp_path, "b", 1)
    b.write_text(b.read_text().replace('"workload": "mixed"', '"workload": "chat"'))
    main(["compare", str(a), str(b)])
    assert "not the same in both: workload: mixed and chat" in capsys.readouterr().out


def test_an_invalid_run_cannot_be_compared(tmp_path, capsys):
    a, b = report(tmp_path, "a", 1), report(tmp_path, "b", 2, num_arrivals=801)
    assert main(["compare", str(a), str(b)]) == 2
    assert "INVALID" in capsys.readouterr().out


def test_a_percentile_with_too_few_requests_beyond_it_is_left_out(tmp_path, capsys):
    main(["compare", str(report(tmp_path, "a", 1)), str(report(tmp_path, "b", 2, count=400))])
    output = capsys.readouterr().out
    assert "ttft p90" in output
    assert "ttft p99" not in output


def test_a_file_that_is_no_report_is_refused_by_its_name(tmp_path, capsys):
    (tmp_path / "x.json").write_text("{}")
    assert main(["compare", str(tmp_path / "x.json"), str(tmp_path / "none.json")]) == 2
    assert "x.json is no report" in capsys.readouterr().err


def test_blocks_are_as_long_as_requests_were_in_flight_at_once(tmp_path):
    run = read(report(tmp_path, "a", 1))
    in_flight = run.columns["e2e"].sum() / 8.0
    assert in_flight > 20
    assert block_length(run) == round(in_flight)


def test_tokens_are_counted_in_the_seconds_they_came_in(tmp_path):
    run = make_run([record(1002.0, sent=1002.5, e2e=2.0, completion_tokens=8)])
    write(run, summarize(run), tmp_path / "run.json")
    assert tokens_each_second(read(tmp_path / "run.json")).tolist() == [2, 4, 2, 0, 0, 0, 0, 0]


def test_the_console_script_is_this_command_line():
    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["attendant-load"]
    module, _, name = script.partition(":")
    assert getattr(importlib.import_module(module), name) is main
