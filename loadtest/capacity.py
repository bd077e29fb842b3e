"""Finds the highest rate at which a server keeps its objectives, and draws its latency against the rate.

Each probe is an open-loop run of its own: a warm-up, then a window of steady state. A rate is sustained when the run
is valid, every objective is met, no request was lost, and the requests in flight did not pile up. The rate is doubled
until it is not sustained, then bisected; what is found must hold once more with other arrivals, since near the limit a
percentile of one window is luck.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loadtest.charts import Series, chart
from loadtest.page import milliseconds, page, table, tiles

HERE = Path(__file__).parent

MIN_RATE, MAX_RATE = 0.01, 10_000.0  # requests/s
MIN_REQUESTS = 200  # of a window, or its p99 is its slowest request
SHARES = (0.25, 0.5, 0.75, 0.9, 1.1, 1.25)  # of the capacity: where the curve gets a point if it has none near


class CapacityError(Exception):
    """The search cannot go on. Its text says why."""


@dataclass(frozen=True)
class Point:
    """One probe. rate: requests/s offered. why: the reasons for which it was not sustained; empty where it was."""

    rate: float
    seed: int
    why: list[str]
    summary: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def sustained(self) -> bool:
        """Whether the server bore this rate."""
        return not self.why

    def latency(self, metric: str, stat: str) -> float:
        """Seconds, NaN where none was measured."""
        return float(self.summary.get("latencies", {}).get(metric, {}).get(stat, math.nan))


Probe = Callable[[float, int], Point]


def search(probe: Probe, *, start: float, tolerance: float) -> tuple[float, list[Point]]:
    """The highest rate that was sustained twice, and every probe. 0.0 where not even the lowest rate was.

    tolerance: of the rate, as a share. Raises `CapacityError` where no rate is too much.
    """
    points: list[Point] = []

    def sustained(rate: float, seed: int = 0) -> bool:
        points.append(probe(rate, seed))
        return points[-1].sustained

    low, high = _bracket(sustained, start)
    seed = 0
    while low > 0:
        while high > low * (1 + tolerance):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if sustained(middle) else (low, middle)
        seed += 1
        if sustained(low, seed):
            break
        high = min(point.rate for point in points if not point.sustained)
        below = [point.rate for point in points if point.sustained and point.rate < high]
        low, high = (max(below), high) if below else _descend(sustained, high)
    for share in SHARES if low > 0 else ():
        if all(abs(point.rate / (share * low) - 1) > tolerance for point in points):
            sustained(share * low)
    return low, points


def _bracket(sustained: Callable[[float], bool], start: float) -> tuple[float, float]:
    """A rate that is sustained, or 0.0, and one that is not."""
    rate = start
    if sustained(rate):
        while sustained(2 * rate):
            rate *= 2
            if 2 * rate > MAX_RATE:
                raise CapacityError(f"{rate:g} requests/s are still no load: something is wrong")
        return rate, 2 * rate
    return _descend(sustained, rate)


def _descend(sustained: Callable[[float], bool], rate: float) -> tuple[float, float]:
    """Halve a rate that is too much until it is not."""
    while rate / 2 >= MIN_RATE:
        rate /= 2
        if sustained(rate):
            return rate, 2 * rate
    return 0.0, rate


def knee(points: Sequence[tuple[float, float]]) -> float | None:
    """The rate at which latency begins to climb: farthest below the chord of the curve (Satopaa et al. 2011, Kneedle).

    points: rates and latencies. None for a curve that does not bend upwards, or of fewer than three rates.
    """
    curve = sorted((x, y) for x, y in points if math.isfinite(y))
    if len({x for x, _ in curve}) < 3:
        return None
    (left, _), (right, _) = curve[0], curve[-1]
    lowest, highest = min(y for _, y in curve), max(y for _, y in curve)
    if highest <= lowest:
        return None
    distances = [((x - left) / (right - left) - (y - lowest) / (highest - lowest), x) for x, y in curve]
    distance, rate = max(distances)
    return rate if distance > 0.1 else None  # a straight line has none


class Prober:
    """Runs Locust in a process of its own for each rate.

    window, warmup: seconds. options: of Locust's command line, among them --host and every --slo. folder: for reports.
    """

    def __init__(self, options: Sequence[str], folder: Path, *, window: float, warmup: float) -> None:
        self._options = list(options)
        self._folder = folder
        self._window = window
        self._warmup = warmup
        self._number = 0

    def __call__(self, rate: float, seed: int) -> Point:
        """One probe. Raises `CapacityError` where the test could not run at all."""
        self._number += 1
        report = self._folder / f"probe-{self._number:02}.json"
        report.unlink(missing_ok=True)
        seconds = math.ceil(self._warmup + max(self._window, MIN_REQUESTS / rate))
        options = ["--arrivals", f"poisson:rate={rate!r}", "--seed", str(seed), "--warmup", f"{self._warmup:g}s"]
        done = subprocess.run(
            locust_command(*self._options, *options, "--run-time", f"{seconds}s", "--report", str(report)),
            capture_output=True,
            text=True,
        )
        if not report.exists():
            raise CapacityError(f"the probe at {rate:.3g} requests/s did not run:\n{done.stdout}{done.stderr}")
        point = judge(rate, seed, json.loads(report.read_text()))
        print(f"{rate:8.3g} requests/s: {'sustained' if point.sustained else '; '.join(point.why)}", flush=True)
        return point


def judge(rate: float, seed: int, summary: dict[str, Any]) -> Point:
    """Whether a report shows that the rate was sustained, and why not."""
    why = [f"INVALID: {reason}" for reason in summary["reasons"]]
    why += [f"missed {objective}" for objective in summary["missed"]]
    if not any(verdict["slo"].startswith("error_rate") for verdict in summary["slos"]):
        why += [f"{summary[name]} {name}" for name in ("refused", "failed") if summary[name] and summary["slos"]]
    if not summary["in_flight"]["steady"]:
        why.append(f"{summary['in_flight']['growth']} more requests in flight at the end than at the beginning")
    del summary["records"], summary["gauges"]
    return Point(rate, seed, why, summary)


def locust_command(*options: str) -> list[str]:
    """Locust with this load test, from any directory."""
    return [
        sys.executable,
        "-m",
        "locust",
        "--config",
        str(HERE / "locust.conf"),
        "-f",
        str(HERE / "locustfile.py"),
        *options,
    ]


def write(capacity: float, points: Sequence[Point], folder: Path) -> None:
    """`capacity.json` and `capacity.html`."""
    ordered = sorted(points, key=lambda point: (point.rate, point.seed))
    bend = knee(_worst(max, [(point.rate, point.latency("ttft", "p99")) for point in ordered]))
    document = {"capacity": capacity, "knee": bend, "points": [asdict(point) for point in ordered]}
    (folder / "capacity.json").write_text(json.dumps(document, indent=1) + "\n")
    (folder / "capacity.html").write_text(_page(capacity, bend, ordered))


def _worst(worse: Callable[[float, float], float], points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """One value for each rate, the worst where it was probed twice."""
    curve: dict[float, float] = {}
    for rate, value in points:
        curve[rate] = worse(curve.get(rate, value), value)
    return sorted(curve.items())


def _page(capacity: float, bend: float | None, points: Sequence[Point]) -> str:
    plan = points[0].summary["plan"]
    objectives = ", ".join(verdict["slo"] for verdict in points[0].summary["slos"]) or "no request lost"
    marks = [(capacity, "capacity")] if capacity else []
    marks += [(bend, "knee")] if bend and bend != capacity else []

    def latency(metric: str, *stats: str) -> list[Series]:
        return [Series(stat, _worst(max, [(p.rate, 1e3 * p.latency(metric, stat)) for p in points])) for stat in stats]

    def rates(*names: str) -> list[Series]:
        return [Series(name, _worst(min, [(p.rate, p.summary[name]) for p in points])) for name in names]

    x = "requests/s offered"
    rows = [
        (
            f"{p.rate:.3g}",
            *(milliseconds(p.latency(metric, stat)) for metric, stat in COLUMNS),
            f"{p.summary['tokens_rate']:.4g}",
            f"{p.summary['goodput'] or 0:.1%}",
            "; ".join(p.why) or "sustained",
        )
        for p in points
    ]
    charts = [
        chart("Time to first token", latency("ttft", "p50", "p99"), x=x, y="milliseconds", marks=marks),
        chart("Time per output token", latency("tpot", "p50", "p99"), x=x, y="milliseconds", marks=marks),
        chart("Answered, and well", rates("requests_rate", "goodput_rate"), x=x, y="requests/s", marks=marks),
        chart("Tokens", rates("tokens_rate"), x=x, y="tokens/s", marks=marks),
    ]
    body = [
        f"<h1>Capacity: {capacity:.3g} requests/s</h1>",
        f"<p>of {plan['model']} with workload {plan['workload']}, Poisson arrivals; objectives: {objectives}</p>",
        tiles({"requests/s sustained twice": f"{capacity:.3g}", "knee of TTFT p99": f"{bend:.3g}" if bend else "-"}),
        '<div class="charts">',
        *charts,
        "</div><h2>Probes</h2>",
        table(["rate", *(f"{m.upper()} {s}" for m, s in COLUMNS), "tokens/s", "goodput", ""], rows),
    ]
    return page(f"Capacity of {plan['model']}", body)


COLUMNS = (("ttft", "p50"), ("ttft", "p99"), ("tpot", "p50"), ("tpot", "p99"))
