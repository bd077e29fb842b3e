"""The report as one page for a browser, with everything in it: no script, no font, nothing from elsewhere."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from loadtest.charts import Series, chart
from loadtest.results import Record

if TYPE_CHECKING:
    from loadtest.report import Run

MAX_WINDOWS = 60

STYLE = """
:root{color-scheme:light dark;--ink:#1a1c20;--dim:#667;--paper:#fff;--line:#dde;--good:#157f3b;--bad:#c02626;
--s0:#2266cc;--s1:#d97706;--s2:#c02663}
@media(prefers-color-scheme:dark){:root{--ink:#e8e8ec;--dim:#99a;--paper:#15171b;--line:#333a44;--good:#4ade80;
--bad:#f87171;--s0:#6aa5ff;--s1:#fbbf24;--s2:#f472b6}}
*{box-sizing:border-box}
body{font:15px/1.45 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1120px;margin:0 auto;
padding:24px}
h1{font-size:22px;margin:0}h2{font-size:16px;margin:32px 0 8px}p{margin:4px 0;color:var(--dim)}
.good{color:var(--good)}.bad{color:var(--bad)}
.tiles,.charts{display:grid;gap:12px;margin:16px 0}
.tiles{grid-template-columns:repeat(auto-fill,minmax(240px,1fr))}
.charts{grid-template-columns:repeat(auto-fit,minmax(420px,1fr))}
.tiles div,.charts>svg{border:1px solid var(--line);border-radius:8px;padding:10px}
.tiles b{display:block;font-size:22px;font-weight:600}.tiles span{color:var(--dim);font-size:13px}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:4px 10px;border-bottom:1px solid var(--line);white-space:nowrap}
td:last-child{white-space:normal}
th:first-child,td:first-child{text-align:left}th{color:var(--dim);font-weight:500}
svg{width:100%;height:auto}svg text{fill:var(--dim);font:11px system-ui,sans-serif}
svg .title{fill:var(--ink);font-size:13px;font-weight:600}
.end{text-anchor:end}.middle{text-anchor:middle}
.grid{stroke:var(--line);fill:none}.axis{stroke:var(--dim);fill:none}
.mark{stroke:var(--bad);stroke-dasharray:4 3;fill:none}
.series path{fill:none;stroke:currentColor;stroke-width:1.8}.series circle{fill:currentColor}
.key{fill:currentColor}.s0{color:var(--s0)}.s1{color:var(--s1)}.s2{color:var(--s2)}
"""


def page(title: str, body: Iterable[str]) -> str:
    """A whole document."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        f"{''.join(body)}</body></html>\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Every cell is text and is escaped."""
    cells = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f'<div class="wide"><table><thead><tr>{names}</tr></thead><tbody>{cells}</tbody></table></div>'


def tiles(values: Mapping[str, str]) -> str:
    """The numbers to see first."""
    return f'<div class="tiles">{"".join(f"<div><b>{b}</b><span>{a}</span></div>" for a, b in values.items())}</div>'


def milliseconds(seconds: float | None) -> str:
    """A duration with three digits; a dash where there is none."""
    return "-" if seconds is None or not math.isfinite(seconds) else f"{1e3 * seconds:.3g} ms"


def run_page(run: "Run", summary: Mapping[str, Any]) -> str:
    """Everything about one run."""
    plan = run.plan
    loop = f"open loop, {plan.arrivals}" if plan.open_loop else f"closed loop of {plan.users} users"
    passed = summary["verdict"] == "VALID" and not summary["missed"]
    verdict = "INVALID" if summary["verdict"] == "INVALID" else "objectives missed" if summary["missed"] else "passed"
    body = [
        f'<h1>Load test: <span class="{"good" if passed else "bad"}">{verdict}</span></h1>',
        f"<p>{escape(plan.model)} at {escape(plan.host)}; workload {escape(plan.workload)}, {escape(loop)}, seed "
        f"{plan.seed}, {summary['seconds']:.0f} s measured after {plan.warmup:g} s of warm-up, "
        f"{plan.num_workers} client process(es)</p>",
        *(f'<p class="bad">{escape(reason)}</p>' for reason in (*summary["reasons"], *summary["missed"])),
        tiles(_headline(summary)),
    ]
    if summary["slos"]:
        body.append("<h2>Objectives</h2>")
        body.append(table(("objective", "measured", ""), map(_slo_row, summary["slos"])))
    body += ["<h2>Latency</h2>", _latency_table(summary["latencies"])]
    body.append(
        "<p>From the intended send; with _SENT from the actual one. LATE is the difference, the client's own.</p>"
    )
    body += ['<div class="charts">', *_charts(run, summary), "</div>"]
    if len(summary["kinds"]) > 1:
        for kind, latencies in summary["kinds"].items():
            body += [f"<h2>{escape(kind)}</h2>", _latency_table(latencies)]
    body += ["<h2>Counts</h2>", _counts(summary)]
    return page(f"Load test of {plan.model}: {verdict}", body)


def _headline(summary: Mapping[str, Any]) -> dict[str, str]:
    latencies = summary["latencies"]
    return {
        "requests/s": f"{summary['requests_rate']:.3g}",
        "tokens/s": f"{summary['tokens_rate']:.4g}",
        "goodput": f"{100 * summary['goodput']:.4g} %" if math.isfinite(summary["goodput"]) else "-",
        "not answered": f"{summary['refused'] + summary['failed']}",
        "TTFT p50": milliseconds(latencies["ttft"].get("p50")),
        "TTFT p99": milliseconds(latencies["ttft"].get("p99")),
        "TPOT p50": milliseconds(latencies["tpot"].get("p50")),
        "TPOT p99": milliseconds(latencies["tpot"].get("p99")),
    }


def _slo_row(verdict: Mapping[str, Any]) -> tuple[str, str, str]:
    value = verdict["value"]
    timed = "_p" in verdict["slo"] or "_mean" in verdict["slo"] or "_max" in verdict["slo"]
    return verdict["slo"], milliseconds(value) if timed else f"{value:.4g}", "met" if verdict["met"] else "MISSED"


def _latency_table(latencies: Mapping[str, Mapping[str, float]]) -> str:
    shown = {metric: stats for metric, stats in latencies.items() if stats}
    head = list(next(iter(shown.values()), {}))
    rows = [
        [metric.upper(), *(f"{v:g}" if stat == "count" else milliseconds(v) for stat, v in stats.items())]
        for metric, stats in shown.items()
    ]
    return table(["", *head], rows)


def _counts(summary: Mapping[str, Any]) -> str:
    rows: list[tuple[object, ...]] = [(name, summary[name]) for name in ("ok", "cancelled", "refused", "failed")]
    rows += [(error, count) for error, count in summary["errors"].items()]
    for check in summary["reconciliation"]:
        ours = check["least"] if check["least"] == check["most"] else f"{check['least']} to {check['most'] or 'any'}"
        agree = "agree" if check["agrees"] else "DISAGREE"
        rows.append((f"{check['name']}: server and client {agree}", f"{check['server']} and {ours}"))
    if not summary["reconciled"]:
        rows.append(("server has no counters that we know", "not compared"))
    rows.append(("client: busiest process, share of a core", f"{summary['client']['cpu']:.0%}"))
    rows.append(("client: event loop late, p99", milliseconds(summary["client"]["lag"].get("p99"))))
    return table(("", ""), rows)


def _charts(run: "Run", summary: Mapping[str, Any]) -> list[str]:
    begin, seconds = run.results.measured_from, summary["seconds"]
    measured = run.results.measured
    width = max(1.0, seconds / MAX_WINDOWS)
    windows: list[list[Record]] = [[] for _ in range(math.ceil(seconds / width))]
    for record in measured:
        windows[min(int((record.intended - begin) / width), len(windows) - 1)].append(record)
    middles = [(number + 0.5) * width for number in range(len(windows))]

    def over_time(metric: str) -> list[Series]:
        values = [[1e3 * v for r in window for name, v in r.latencies() if name == metric] for window in windows]
        return [
            Series(
                f"p{percent}", [(at, _nearest_rank(each, percent)) for at, each in zip(middles, values, strict=True)]
            )
            for percent in (50, 90, 99)
        ]

    def distribution(*metrics: str) -> list[Series]:
        found = [(metric, run.results.histogram(metric).cumulative()) for metric in metrics]
        return [
            Series(metric.upper(), [(1e3 * points[0][0], 0.0), *((1e3 * v, 100 * s) for v, s in points)], "steps")
            for metric, points in found
            if points
        ]

    def each_second(moment: Callable[[Record], float]) -> list[tuple[float, float]]:
        counts = [0.0] * len(windows)
        for record in run.results.records:
            number = (moment(record) - begin) / width
            if 0 <= number < len(counts):
                counts[int(number)] += 1 / width
        return list(zip(middles, counts, strict=True))

    def gauge(name: str) -> Series:
        points = [(g.when - begin, getattr(g, name)) for g in run.gauges if g.when >= begin]
        return Series(name, [(at, math.nan if value is None else value) for at, value in points])

    ttft = over_time("ttft")
    sent = each_second(lambda record: record.intended)
    against = [(rate, point[1]) for (_, rate), point in zip(sent, ttft[0].points, strict=True)]
    at, ms, share = "seconds since the warm-up", "milliseconds", "% of all"
    return [
        chart("Time to first token", ttft, x=at, y=ms, x_from_zero=True),
        chart("Time per output token", over_time("tpot"), x=at, y=ms, x_from_zero=True),
        chart("Distribution of TTFT and E2E", distribution("ttft", "e2e"), x=ms, y=share, log_x=True),
        chart("Distribution of TPOT and ITL", distribution("tpot", "itl"), x=ms, y=share, log_x=True),
        chart(
            "Requests each second",
            [Series("sent", sent), Series("ended", each_second(lambda record: record.ended))],
            x=at,
            y="requests/s",
            x_from_zero=True,
        ),
        chart("Rate against TTFT", [Series("p50", against, "dots")], x="requests/s sent", y=ms),
        chart("The server's queue", [gauge("running"), gauge("waiting")], x=at, y="requests", x_from_zero=True),
        chart("The server's KV cache", [gauge("cache")], x=at, y="share in use", x_from_zero=True),
    ]


def _nearest_rank(values: list[float], percent: float) -> float:
    return sorted(values)[max(math.ceil(len(values) * percent / 100), 1) - 1] if values else math.nan
