"""Medians of rounds, and how many times one contender's rate is another's: numbers in, tables out.

A ratio is the median over rounds of ours by theirs in the same round, since a noisy machine is noisy for both.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from model.bench.contenders import Contender

Rates = Mapping[str, Sequence[float]]  # contender -> tokens a second in each round; NaN where a round failed


@dataclass(frozen=True)
class Comparison:
    """A line of ratios: one of ours over the best of some peers."""

    ours: str
    over: str
    among: Callable[[Contender], bool]


COMPARISONS = (
    Comparison("attendant int8", "the best peer of any kind", lambda _: True),
    Comparison("attendant int8", "transformers bf16", lambda peer: peer.name == "transformers bf16"),
    Comparison("attendant bf16", "the best bf16 peer", lambda peer: peer.dtype == "bf16"),
)


def median(rates: Iterable[float]) -> float:
    """The median of those that are numbers; NaN where there is none."""
    numbers = [rate for rate in rates if not math.isnan(rate)]
    return statistics.median(numbers) if numbers else math.nan


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median, over the rounds that both finished, of our rate by theirs."""
    return median(our / their for our, their in zip(ours, theirs, strict=True))


def best(rates: Rates, names: Iterable[str]) -> str | None:
    """Of these contenders the one with the highest median; None where none of them finished a round."""
    medians = {name: median(rates[name]) for name in names if name in rates}
    finished = {name: rate for name, rate in medians.items() if not math.isnan(rate)}
    return max(finished, key=finished.__getitem__) if finished else None


def compare(comparison: Comparison, rates: Rates, contenders: Sequence[Contender]) -> tuple[float, str] | None:
    """(ratio, the peer's name), or None where either side has nothing to show."""
    peers = [peer.name for peer in contenders if not peer.is_ours and comparison.among(peer)]
    peer = best(rates, peers)
    if peer is None or best(rates, [comparison.ours]) is None:
        return None
    return ratio(rates[comparison.ours], rates[peer]), peer


def table(
    title: str,
    columns: Mapping[str, Rates],
    ceilings: Mapping[str, Mapping[str, float]],
    contenders: Sequence[Contender],
    absent: Mapping[str, str],
) -> str:
    """A markdown table: medians and, in brackets, the part of the roofline that they are; below them the ratios.

    columns: heading -> rates. ceilings: heading -> dtype -> the roofline in tokens a second.
    absent: contender -> why there is nothing to show. It is named all the same.
    """
    lines = [f"| {title} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for contender in contenders:
        if contender.name in absent:
            cells = [absent[contender.name], *[""] * (len(columns) - 1)]
        else:
            cells = [
                _cell(median(rates[contender.name]), ceilings[heading][contender.dtype])
                for heading, rates in columns.items()
            ]
        lines.append(f"| {contender.name} | " + " | ".join(cells) + " |")
    for comparison in COMPARISONS:
        ratios = [compare(comparison, rates, contenders) for rates in columns.values()]
        cells = [f"**{found[0]:.2f}** ({found[1]})" if found else "-" for found in ratios]
        lines.append(f"| {comparison.ours} over {comparison.over} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(rate: float, ceiling: float) -> str:
    return "failed" if math.isnan(rate) else f"{rate:,.0f} ({rate / ceiling:.0%})"
