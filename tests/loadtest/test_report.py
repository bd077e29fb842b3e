"""A report holds the numbers, every request, and a page that needs nothing from elsewhere."""

import csv
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_results import record

from loadtest.charts import BOTTOM, HEIGHT, Series, chart
from loadtest.health import Health
from loadtest.plan import Plan
from loadtest.report import Run, summarize, write
from loadtest.results import Record, Results
from loadtest.schedule import arrivals
from loadtest.server import Check, Counters
from loadtest.slo import parse

pytestmark = pytest.mark.fast

STARTS = 1000.0


def make_run(records: list[Record], *, slos: tuple[str, ...] = (), **changes: object) -> Run:
    """A run of ten seconds, the first two of which are its warm-up."""
    plan = Plan(
        host="http://<here>", model="m", workload="mixed", arrivals="constant:rate=1", users=0, num_workers=2, seed=3,
        starts_at=STARTS, seconds=10.0, warmup=2.0, max_tokens=None, ignore_eos=False, tokens_per_word=1.0,
    )  # fmt: skip
    results = Results(plan.measured_from)
    for each in records:
        results.add(each, [0.1, 0.2])
    values = {
        "plan": plan, "results": results, "health": Health(), "ended": plan.ends_at, "num_arrivals": len(records),
        "checks": [Check("requests", 8, 8, 8)], "reconciled": True, "max_lag": 1.0, "slos": [parse(t) for t in slos],
        "gauges": [Counters(STARTS + second, 0, 0, 0, second, 0, 0.5) for second in range(10)],
    }  # fmt: skip
    return Run(**(values | changes))  # type: ignore[arg-type]


def one_a_second(**changes: object) -> list[Record]:
    return [record(STARTS + second, index=second, sent=STARTS + second, **changes) for second in range(10)]


def test_rates_count_what_lies_inside_of_the_measured_window():
    # Each takes 2 s from its send at a full second: of the last one, half lies beyond the end.
    summary = summarize(make_run(one_a_second()))
    assert summary["seconds"] == 8.0
    assert summary["requests"] == summary["ok"] == 8
    assert summary["requests_rate"] == pytest.approx((7 + 0.5) / 8)
    assert summary["tokens_rate"] == pytest.approx(8 * (7 + 0.5) / 8)


def test_goodput_is_the_share_and_the_rate_of_good_requests():
    records = one_a_second()
    for each in records[6:]:
        each.ttft = 1.5
    summary = summarize(make_run(records, slos=("ttft_p99=1s", "goodput=50%", "goodput_rate=0.6/s")))
    assert (summary["goodput"], summary["goodput_rate"]) == (0.5, 0.5)
    assert summary["missed"] == ["ttft_p99=1s", "goodput_rate=0.6/s"]
    assert summary["verdict"] == "VALID"


def test_an_objective_about_any_percentile_is_measured():
    verdict = summarize(make_run(one_a_second(), slos=("ttft_p75=1s",)))["slos"][0]
    assert verdict["value"] == pytest.approx(0.5, rel=0.005)
    assert verdict["met"]


def test_an_arrival_that_was_never_sent_makes_the_run_invalid():
    summary = summarize(make_run(one_a_second(), num_arrivals=11))
    assert summary["verdict"] == "INVALID"
    assert summary["reasons"] == ["10 of 11 arrivals of the schedule were sent"]


def test_counts_that_disagree_are_given_as_the_reason():
    summary = summarize(make_run(one_a_second(), checks=[Check("prompt_tokens", 7, 8, 8)]))
    assert summary["reasons"] == ["prompt_tokens: 7 by the server, 8 by the client"]


def test_the_csv_has_a_row_for_every_request_and_can_be_replayed(tmp_path: Path):
    run = make_run(one_a_second())
    write(run, summarize(run), tmp_path / "run.json")
    rows = list(csv.DictReader((tmp_path / "run.csv").open()))
    assert [float(row["intended"]) - STARTS for row in rows] == list(range(10))
    assert {row["outcome"] for row in rows} == {"ok"}
    replayed = arrivals(f"trace:file={tmp_path / 'run.csv'}", seconds=20, seed=0)
    assert [(a.seconds, a.input_tokens, a.output_tokens) for a in replayed] == [(i, 3, 8) for i in range(10)]


def test_the_json_holds_the_plan_the_numbers_and_the_requests_and_is_valid_json(tmp_path: Path):
    run = make_run([])
    write(run, summarize(run), tmp_path / "run.json")
    empty = json.loads((tmp_path / "run.json").read_text(), parse_constant=pytest.fail)
    assert empty["goodput"] is None
    run = make_run(one_a_second())
    write(run, summarize(run), tmp_path / "run.json")
    document = json.loads((tmp_path / "run.json").read_text())
    assert document["plan"]["arrivals"] == "constant:rate=1"
    assert document["latencies"]["ttft"]["p50"] == pytest.approx(0.5, rel=0.005)
    assert document["records"]["ttft"] == [0.5] * 10


class Page(HTMLParser):
    """Collects what a page consists of, and fails where tags do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data + " "


def test_the_page_is_whole_in_itself_and_says_all_there_is_to_say(tmp_path: Path):
    lost = record(STARTS + 5, index=10, kind="slow", outcome="failed", error="<b>lost")
    records = [*one_a_second(kind="chat"), lost]
    run = make_run(records, slos=("ttft_p99=300ms", "goodput=10%"))
    write(run, summarize(run), tmp_path / "run.json")
    text = (tmp_path / "run.html").read_text()
    page = Page(text)
    assert page.tags.count("svg") == 8
    assert not {"script", "link", "img", "b>lost", "here"} & set(page.tags)
    assert not {"src", "href", "xlink:href"} & {name for name, _ in page.attributes}
    assert not re.search(r"url\(|@import", text)
    for words in (
        *("objectives missed", "ttft_p99=300ms", "MISSED", "http://<here>", "<b>lost", "server and client agree"),
        *("Rate against TTFT", "KV cache", "chat", "slow", "seed 3"),
    ):
        assert words in page.words


def test_a_chart_puts_its_points_where_they_belong():
    svg = chart("t", [Series("a", [(0, 0), (5, 50), (10, 100)])], x="x", y="y")
    places = [tuple(map(float, at)) for at in re.findall(r"[ML]([\d.]+) ([\d.]+)", svg.split("series")[1])]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    assert x2 > x0
    assert y2 < y0  # up is less


def test_an_axis_of_time_begins_at_zero_where_it_is_asked_to():
    def ticks(**options: bool) -> list[str]:
        svg = chart("t", [Series("a", [(5, 1), (30, 2)])], x="x", y="y", **options)
        return re.findall(r'class="tick middle" x="[\d.]+" y="235">([\d.]+)<', svg)

    assert ticks(x_from_zero=True)[0] == "0"
    assert ticks()[0] != "0"


def test_a_distribution_rises_from_nothing_at_its_shortest_value(tmp_path: Path):
    run = make_run(one_a_second())
    write(run, summarize(run), tmp_path / "run.json")
    svg = (tmp_path / "run.html").read_text().split('aria-label="Distribution of TTFT and E2E"')[1].split("</svg>")[0]
    lines = svg.split('class="series')[1:]
    heights = [float(y) for line in lines for y in re.findall(r'd="M[\d.]+ ([\d.]+)H', line)]
    assert heights == [HEIGHT - BOTTOM] * 2


def test_a_line_breaks_where_there_is_no_value():
    svg = chart("t", [Series("a", [(1, 1), (2, 2), (3, math.nan), (4, 4), (5, 5)])], x="x", y="y")
    assert len(re.findall(r"M[\d.]+ [\d.]+L", svg.split("series")[1])) == 2


@pytest.mark.parametrize(("low", "high"), [(200.6, 430.0), (0.02, 800.0), (3.0, 3.0)])
def test_a_logarithmic_axis_has_ticks_at_any_range(low, high):
    svg = chart("t", [Series("a", [(low, 1), (high, 2)])], x="x", y="y", log_x=True)
    ticks = re.findall(r'class="tick middle" x="[\d.]+" y="235">([\d.e+-]+)<', svg)
    assert len(ticks) >= 2
    assert all(low / 2 <= float(tick) <= high * 2 for tick in ticks)


def test_a_chart_of_nothing_is_left_out():
    assert chart("t", [Series("a", [(1, math.nan)])], x="x", y="y") == ""
