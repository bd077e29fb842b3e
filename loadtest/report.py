"""Says what a run has shown: a summary for the eye, JSON for tools, a CSV of the requests, and a page."""

import csv
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from loadtest.health import Health
from loadtest.histogram import Histogram
from loadtest.page import run_page
from loadtest.plan import Plan
from loadtest.results import COLUMNS, METRICS, Record, Results
from loadtest.server import Check, Counters
from loadtest.slo import Slo, is_good, verdicts

PERCENTILES = (50, 90, 95, 99, 99.9)
STATS = ("mean", *(f"p{percent:g}" for percent in PERCENTILES), "max")


@dataclass(frozen=True)
class Run:
    """All that is known of a finished test. ended: Unix time of the last send allowed.

    num_arrivals: of the schedule; None in a closed loop. reconciled: whether the server has counters to compare with.
    max_lag: seconds of the client's own delay at p99 that are borne. problems: what else speaks against the run.
    """

    plan: Plan
    results: Results
    health: Health
    ended: float
    num_arrivals: int | None
    checks: Sequence[Check]
    reconciled: bool
    gauges: Sequence[Counters]
    slos: Sequence[Slo]
    max_lag: float
    problems: Sequence[str] = ()


def summarize(run: Run) -> dict[str, Any]:
    """The numbers, in seconds, tokens and requests, and the verdict on them."""
    results, measured = run.results, run.results.measured
    window = (run.results.measured_from, max(run.ended, run.results.measured_from + 1e-9))
    seconds = window[1] - window[0]
    outcomes = Counter(record.outcome for record in measured)
    good = sum(is_good(record, run.slos) for record in measured)
    late = results.histogram("late")
    asked = {float(slo.stat[1:]) for slo in run.slos if slo.stat.startswith("p")}
    percents = sorted({*PERCENTILES, *asked})

    def stats(metric: str, kind: str | None = None) -> dict[str, float]:
        return _stats(results.histogram(metric, kind), percents)

    summary: dict[str, Any] = {
        "seconds": seconds,
        "requests": len(measured),
        "in_flight": _in_flight(results.records, window, run.plan.open_loop),
        **{name: outcomes[name] for name in ("ok", "cancelled", "refused", "failed")},
        "error_rate": (outcomes["refused"] + outcomes["failed"]) / len(measured) if measured else math.nan,
        "requests_rate": _inside(measured, window, lambda record: float(record.outcome in ("ok", "cancelled")))
        / seconds,
        "tokens_rate": _inside(measured, window, lambda record: record.completion_tokens) / seconds,
        "goodput": good / len(measured) if measured else math.nan,
        "goodput_rate": good / seconds,
        "prompt_tokens": sum(record.prompt_tokens for record in measured),
        "completion_tokens": sum(record.completion_tokens for record in measured),
        "latencies": {metric: stats(metric) for metric in METRICS},
        "kinds": {kind: {metric: stats(metric, kind) for metric in METRICS} for kind in sorted(results.histograms)},
        "retry_after": sum(record.retry_after for record in measured),
        "errors": dict(Counter(record.error for record in measured if record.error).most_common(10)),
        "client": {"cpu": run.health.cpu, "lag": _stats(run.health.lag, PERCENTILES)},
        "reconciliation": [{**asdict(check), "agrees": check.agrees} for check in run.checks],
        "reconciled": run.reconciled,
    }
    summary["slos"] = verdicts(run.slos, summary)
    reasons = [*run.problems, *run.health.complaints(late, run.max_lag), *_miscounts(run)]
    summary["verdict"] = "INVALID" if reasons else "VALID"
    summary["reasons"] = reasons
    summary["missed"] = _missed(summary)
    return summary


def write(run: Run, summary: Mapping[str, Any], file: Path) -> None:
    """JSON at `file`; a CSV with a row for each request and a page for the browser beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    records = sorted(run.results.records, key=lambda record: record.intended)
    plan = run.plan.to_dict()
    with file.with_suffix(".csv").open("w", newline="") as lines:
        rows = csv.writer(lines)
        rows.writerow(COLUMNS)
        rows.writerows(map(astuple, records))
    columns = {
        name: [getattr(record, name) for record in records]
        for name in ("kind", "intended", "sent", "ttft", "tpot", "e2e", "outcome", "prompt_tokens", "completion_tokens")
    }
    file.with_suffix(".html").write_text(run_page(run, summary))
    document = {"plan": plan, **summary, "gauges": [asdict(each) for each in run.gauges], "records": columns}
    file.write_text(json.dumps(_finite(document), indent=1) + "\n")


def print_summary(summary: Mapping[str, Any]) -> None:
    """To the terminal."""
    print(
        f"\n{summary['requests']} requests in {summary['seconds']:.1f} s: {summary['ok']} answered, "
        f"{summary['cancelled']} left, {summary['refused']} refused, {summary['failed']} failed; "
        f"{summary['requests_rate']:.1f} requests/s, {summary['tokens_rate']:.0f} tokens/s\n"
    )
    print(f"{'milliseconds':<14}" + "".join(f"{stat:>10}" for stat in STATS))
    for metric, stats in summary["latencies"].items():
        if stats:
            print(f"{metric.upper():<14}" + "".join(f"{1e3 * stats[stat]:>10.2f}" for stat in STATS))
    client = summary["client"]
    lag = 1e3 * client["lag"].get("p99", math.nan)
    print(f"client: busiest process {client['cpu']:.0%} of a core, event loop {lag:.1f} ms late at p99")
    if not summary["in_flight"]["steady"]:
        print(f"The server did not keep up: {summary['in_flight']['growth']} more in flight at the end than at first.")
    for error, count in summary["errors"].items():
        print(f"{count} x {error}")
    for verdict in summary["slos"]:
        print(f"SLO {verdict['slo']:<24} {'met' if verdict['met'] else 'MISSED'} ({verdict['value']:.4g})")
    if not summary["reconciled"]:
        print("The server has no counters that we know: its counts were not compared with ours.")
    print(f"{summary['verdict']}" + "".join(f"\n  {reason}" for reason in summary["reasons"]))


def _stats(histogram: Histogram, percents: Sequence[float]) -> dict[str, float]:
    """Empty where nothing was recorded."""
    if not histogram.count:
        return {}
    percentiles = {f"p{percent:g}": histogram.percentile(percent) for percent in percents}
    return {"count": histogram.count, "mean": histogram.mean, **percentiles, "max": histogram.longest}


def _inside(records: Sequence[Record], window: tuple[float, float], amount: Callable[[Record], float]) -> float:
    """How much of an amount falls into a window of time, when each request spreads it evenly over its own time.

    Counting whole requests by their start or their end would make short windows too rich or too poor at their edges.
    """
    begin, end = window
    total = 0.0
    for record in records:
        overlap = min(record.ended, end) - max(record.sent, begin)
        if overlap > 0:
            total += amount(record) * overlap / record.e2e
    return total


def _in_flight(records: Sequence[Record], window: tuple[float, float], open_loop: bool) -> dict[str, Any]:
    """Requests sent and not yet ended, at both edges of the window and on average.

    steady: whether they did not pile up, beyond what chance does to a queue that keeps its length. In a closed loop
    they cannot.
    """
    begin, end = (sum(record.sent <= edge < record.ended for record in records) for edge in window)
    mean = sum(max(min(r.ended, window[1]) - max(r.sent, window[0]), 0.0) for r in records) / (window[1] - window[0])
    arrived = sum(window[0] <= record.intended < window[1] for record in records)
    steady = not open_loop or end - begin <= 0.05 * arrived + 3 * math.sqrt(max(mean, 1.0))
    return {"begin": begin, "end": end, "mean": mean, "growth": end - begin, "steady": steady}


def _miscounts(run: Run) -> list[str]:
    """Requests that were planned and not sent, or that client and server do not agree on."""
    found = [str(check) for check in run.checks if not check.agrees]
    if run.reconciled and not run.checks:
        found.append("the server's counters could not be read after the test")
    if run.num_arrivals is not None:
        sent = len({record.index for record in run.results.records})
        if sent != run.num_arrivals:
            found.append(f"{sent} of {run.num_arrivals} arrivals of the schedule were sent")
    if not run.results.measured:
        found.append("nothing was measured")
    return found


def _missed(summary: Mapping[str, Any]) -> list[str]:
    """The objectives that were missed; without any, failed requests are what nobody wants."""
    if summary["slos"]:
        return [verdict["slo"] for verdict in summary["slos"] if not verdict["met"]]
    return [f"{summary[name]} requests {name}" for name in ("refused", "failed") if summary[name]]


def _finite(value: Any) -> Any:
    """JSON has no NaN: null says that there is none."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
