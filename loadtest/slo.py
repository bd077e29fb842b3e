"""Objectives: what a service level promises, whether a run kept it, and how many requests were good at once.

    --slo ttft_p99=300ms --slo tpot_p99=30ms --slo goodput=95% --slo error_rate=1%

A request is good if it was answered in full and met the bound of every latency objective by itself; goodput counts
those (Zhong et al. 2024, "DistServe"). Each percentile may hold while few requests meet all bounds, or the reverse.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loadtest.results import Record

UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "%": 1e-2, "/s": 1.0}
DURATION = re.compile(r"(?P<number>\d+(\.\d+)?)(?P<unit>us|ms|s)")
LATENCIES = ("ttft", "tpot", "itl", "e2e", "refusal")
# Of the whole run: whether it must be at least, or at most, the bound; and the unit it is written in.
WHOLE = {
    "goodput": ("least", "%"),
    "goodput_rate": ("least", "/s"),
    "requests_rate": ("least", "/s"),
    "tokens_rate": ("least", "/s"),
    "error_rate": ("most", "%"),
}
FORM = re.compile(
    r"(?P<metric>[a-z0-9_]+?)(?:_(?P<stat>p\d+(?:\.\d+)?|mean|max))?=(?P<number>\d+(?:\.\d+)?)(?P<unit>[a-z%/]*)"
)


class SloError(ValueError):
    """An objective that cannot be. Its text says what can."""


@dataclass(frozen=True)
class Slo:
    """One objective. stat: "p99", "mean", "max", or empty for the whole run. bound: in seconds, shares or 1/s."""

    text: str
    metric: str
    stat: str
    bound: float

    @property
    def at_least(self) -> bool:
        """Whether more is better."""
        return not self.stat and WHOLE[self.metric][0] == "least"

    def met(self, value: float) -> bool:
        """NaN, where nothing was measured, meets nothing."""
        return value >= self.bound if self.at_least else value <= self.bound


def parse(text: str) -> Slo:
    """`ttft_p99=300ms` and its like. Raises `SloError`."""
    form = FORM.fullmatch(text)
    if form is None:
        raise SloError(f"{text!r} is no objective: write METRIC_STAT=BOUND, such as ttft_p99=300ms or goodput=95%")
    metric, stat, unit = form["metric"], form["stat"] or "", form["unit"]
    if metric in LATENCIES:
        if not stat:
            raise SloError(f"{text!r} does not say of what: {metric}_p99, {metric}_mean, {metric}_max")
        if unit not in ("us", "ms", "s"):
            raise SloError(f"{text!r} needs a unit of time: us, ms or s")
        if stat.startswith("p") and not 0 < float(stat[1:]) <= 100:
            raise SloError(f"{text!r}: a percentile lies between 0 and 100")
    elif metric in WHOLE:
        if stat or unit != WHOLE[metric][1]:
            raise SloError(f"{text!r} is written {metric}=NUMBER{WHOLE[metric][1]}")
    else:
        raise SloError(f"{text!r} is about {metric!r}, which is none of {', '.join((*LATENCIES, *WHOLE))}")
    return Slo(text, metric, stat, float(form["number"]) * UNITS[unit])


def seconds(text: str) -> float:
    """A duration with its unit, such as 500ms or 1.5s. Raises `SloError`."""
    form = DURATION.fullmatch(text)
    if form is None:
        raise SloError(f"{text!r} is no duration: write 500ms or 1.5s")
    return float(form["number"]) * UNITS[form["unit"]]


def is_good(record: Record, slos: Sequence[Slo]) -> bool:
    """Whether this one request was answered in full, within the bound of every objective about its own latencies."""
    if record.outcome not in ("ok", "cancelled"):
        return False
    latencies = dict(record.latencies())
    # One token has no tpot, and whoever left has no e2e: there is nothing that could be too slow.
    return all(latencies.get(slo.metric, 0.0) <= slo.bound for slo in slos if slo.metric in ("ttft", "tpot", "e2e"))


def verdicts(slos: Sequence[Slo], summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each objective asked for, what the run gave, and whether that is enough. summary: of `report.summarize`."""
    found = []
    for slo in slos:
        value = summary["latencies"][slo.metric].get(slo.stat) if slo.stat else summary[slo.metric]
        value = float("nan") if value is None else value
        found.append({"slo": slo.text, "bound": slo.bound, "value": value, "met": slo.met(value)})
    return found
