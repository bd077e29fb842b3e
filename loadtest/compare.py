"""Compares two runs and says how sure one can be of the difference.

Neighbouring requests share their fate (a burst delays them all), so they are resampled in blocks of neighbours, a
moving block bootstrap (Kuensch 1989), as many as were in flight at once. The intervals hold what could have come out
had the same two servers met other requests on the same afternoon. They cannot know that a machine is faster on one day
than on another: repeat the runs by turns. And with ten numbers, up to one comparison in five of two equal servers finds
something worse by chance.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
Statistic = Callable[[Values], Values]  # a number for each row

RESAMPLES, AT_ONCE = 2000, 50
CONFIDENCE = 0.95
MIN_BEYOND = 5  # requests beyond a percentile, without which nothing can be said about it
SEED = 0

PERCENTILES = {"ttft": (50, 90, 99), "tpot": (50, 90, 99), "e2e": (50, 90, 99)}


class CompareError(ValueError):
    """Files that cannot be compared. Its text says why."""


@dataclass(frozen=True)
class Change:
    """One number of two runs. change: b / a - 1, between low and high by `CONFIDENCE`."""

    name: str
    a: float
    b: float
    change: float
    low: float
    high: float
    more_is_better: bool

    @property
    def verdict(self) -> str:
        """better, worse, or "same" where the interval leaves both open."""
        if self.low <= 0 <= self.high:
            return "same"
        return "better" if (self.change > 0) == self.more_is_better else "worse"


@dataclass(frozen=True)
class Measured:
    """What a run's file says: its plan, whether it is valid, and its measured requests by column, in order."""

    name: str
    plan: Mapping[str, Any]
    verdict: str
    begin: float
    seconds: float
    columns: Mapping[str, Values]
    outcomes: Sequence[str]


def read(file: Path) -> Measured:
    """A report of the load test. Raises `CompareError`."""
    try:
        document = json.loads(file.read_text())
        plan, columns = document["plan"], document["records"]
        begin = plan["starts_at"] + plan["warmup"]
        kept = [number for number, intended in enumerate(columns["intended"]) if intended >= begin]
        numbers = ("intended", "sent", "ttft", "tpot", "e2e", "completion_tokens")
        return Measured(
            name=str(file),
            plan=plan,
            verdict=document["verdict"],
            begin=begin,
            seconds=document["seconds"],
            columns={name: np.array([columns[name][i] for i in kept], np.float64) for name in numbers},
            outcomes=[columns["outcome"][i] for i in kept],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CompareError(f"{file} is no report of this load test: {error!r}") from None


def differences(a: Measured, b: Measured) -> list[str]:
    """What the two runs did not have in common, so that their numbers may differ for that reason."""
    free = {"host", "model", "starts_at", "tokens_per_word", "num_workers"}
    return [
        f"{key}: {a.plan[key]} and {b.plan[key]}" for key in a.plan if key not in free and a.plan[key] != b.plan[key]
    ]


def compare(a: Measured, b: Measured) -> list[Change]:
    """Every number that both runs have enough requests for."""
    changes = []
    for metric, percentiles in PERCENTILES.items():
        values = latencies(a, metric), latencies(b, metric)
        blocks = block_length(a), block_length(b)
        for percent in percentiles:
            if min(map(len, values)) * (1 - percent / 100) >= MIN_BEYOND:
                changes.append(
                    change(f"{metric} p{percent}", values, blocks, percentile(percent), more_is_better=False)
                )
    rates = tokens_each_second(a), tokens_each_second(b)
    if min(map(len, rates)) >= MIN_BEYOND:
        lengths = [math.ceil(len(each) ** (1 / 3)) for each in rates]
        changes.append(change("tokens/s", rates, (lengths[0], lengths[1]), mean, more_is_better=True))
    return changes


def change(
    name: str, values: tuple[Values, Values], blocks: tuple[int, int], statistic: Statistic, *, more_is_better: bool
) -> Change:
    """One number of both runs, with the interval of their ratio."""
    generator = np.random.default_rng(SEED)
    a, b = (float(statistic(each[None])[0]) for each in values)
    drawn_a, drawn_b = (
        np.concatenate([statistic(each[resample(len(each), block, generator)]) for _ in range(RESAMPLES // AT_ONCE)])
        for each, block in zip(values, blocks, strict=True)
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        tail = 50 * (1 - CONFIDENCE)
        low, high = np.nanpercentile(drawn_b / drawn_a - 1, [tail, 100 - tail])
        return Change(name, a, b, float(np.divide(b, a)) - 1, float(low), float(high), more_is_better)


def resample(count: int, block: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """`AT_ONCE` rows of indices of `count` values, in blocks of neighbours; the last is followed by the first."""
    starts = generator.integers(0, count, (AT_ONCE, math.ceil(count / block), 1))
    return ((starts + np.arange(block)) % count).reshape(AT_ONCE, -1)[:, :count]


def mean(rows: Values) -> Values:
    """Of each row."""
    return np.asarray(rows.mean(axis=1))


def percentile(percent: float) -> Statistic:
    """Nearest rank, of each row."""
    return lambda rows: np.percentile(rows, percent, axis=1, method="inverted_cdf")


def latencies(run: Measured, metric: str) -> Values:
    """Seconds of the requests answered in full, in order; from the intended send, as in the report."""
    values = run.columns[metric]
    if metric in ("ttft", "e2e"):
        values = values + run.columns["sent"] - run.columns["intended"]
    kept: Values = values[(np.array(run.outcomes) == "ok") & np.isfinite(values)]
    return kept


def block_length(run: Measured) -> int:
    """How many requests were in flight at once (Little's law), and at least the cube root of all."""
    count = len(run.outcomes)
    in_flight = np.nansum(run.columns["e2e"]) / max(run.seconds, 1e-9)
    return int(min(max(round(in_flight), math.ceil(count ** (1 / 3)), 1), max(count // 10, 1)))


def tokens_each_second(run: Measured) -> Values:
    """Tokens received in each whole second, when a request spreads them evenly over its time."""
    seconds = np.zeros(int(run.seconds))
    edges = np.arange(len(seconds))
    columns = (run.columns[name] for name in ("sent", "e2e", "completion_tokens"))
    for sent, e2e, tokens in zip(*columns, strict=True):
        if e2e > 0:
            begin = sent - run.begin
            overlap = np.minimum(edges + 1, begin + e2e) - np.maximum(edges, begin)
            seconds += tokens * np.maximum(overlap, 0) / e2e
    return seconds
