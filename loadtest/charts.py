"""Small charts as SVG text, for a page that needs no other file. Colours are the page's CSS variables."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

WIDTH, HEIGHT = 520, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 44, 40  # margins

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A named line, or dots. Points with a NaN break the line."""

    name: str
    points: Sequence[Point]
    form: Literal["line", "dots", "steps"] = "line"


@dataclass(frozen=True)
class Axis:
    """One direction of a chart. low, high: of the data; places: of the paper, low first."""

    label: str
    low: float
    high: float
    log: bool
    places: tuple[float, float]

    def place(self, value: float) -> float:
        """Where a value lies on the paper."""
        low, high, value = (math.log10(each) if self.log else each for each in (self.low, self.high, value))
        begin, end = self.places
        return begin + (value - low) / (high - low) * (end - begin)

    def ticks(self) -> list[float]:
        """About five round values; 1, 2 and 5 times powers of ten on a logarithmic axis of more than one of them."""
        if self.log and self.high > 10 * self.low:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
            found = [value for value in found if self.low <= value <= self.high]
            return found if len(found) < 8 else [value for value in found if math.log10(value) % 1 < 1e-9]
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [number * step for number in range(first, last + 1)]


def chart(
    title: str,
    series: Sequence[Series],
    *,
    x: str,
    y: str,
    log_x: bool = False,
    x_from_zero: bool = False,
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """An SVG element. x, y: labels of the axes. marks: vertical lines with their words. Empty without any point."""
    points = [point for each in series for point in each.points if all(map(math.isfinite, point))]
    points = [(px, py) for px, py in points if px > 0 or not log_x]
    if not points:
        return ""
    xs = [px for px, _ in points] + [at for at, _ in marks]
    across = _axis(x, xs, log_x, (LEFT, WIDTH - RIGHT), from_zero=x_from_zero)
    up = _axis(y, [py for _, py in points], False, (HEIGHT - BOTTOM, TOP), from_zero=True)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<text class="title" x="{LEFT}" y="14">{escape(title)}</text>',
        *_grid(across, up),
        *(
            f'<path class="mark" d="M{across.place(at):.1f} {TOP}V{HEIGHT - BOTTOM}"/>'
            f'<text class="tick" x="{across.place(at) + 4:.1f}" y="{TOP + 10}">{escape(words)}</text>'
            for at, words in marks
        ),
    ]
    left = float(LEFT)
    for number, each in enumerate(series):
        parts.append(f'<g class="series s{number}">{_drawn(each, across, up)}</g>')
        if len(series) > 1:
            parts.append(f'<rect class="key s{number}" x="{left:.0f}" y="28" width="10" height="3"/>')
            parts.append(f'<text class="tick" x="{left + 14:.0f}" y="33">{escape(each.name)}</text>')
            left += 26 + 6.2 * len(each.name)
    return "".join([*parts, "</svg>"])


def _axis(label: str, values: list[float], log: bool, places: tuple[float, float], *, from_zero: bool) -> Axis:
    low, high = min(values), max(values)
    if from_zero:
        low, high = min(low, 0.0), high * 1.05 or 1.0
    if high <= low:
        low, high = (low / 2, low * 2) if log else (low - 0.5, low + 0.5)
    return Axis(label, low, high, log, places)


def _grid(across: Axis, up: Axis) -> list[str]:
    parts = []
    for value in up.ticks():
        at = up.place(value)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 6}" y="{at + 3.5:.1f}">{value:g}</text>')
    for value in across.ticks():
        at = across.place(value)
        parts.append(f'<text class="tick middle" x="{at:.1f}" y="{HEIGHT - BOTTOM + 15}">{value:g}</text>')
    parts.append(f'<text class="tick middle" x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}">{escape(across.label)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text class="tick middle" transform="rotate(-90)" x="{-middle}" y="12">{escape(up.label)}</text>'
        f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>'
    )
    return parts


def _drawn(series: Series, across: Axis, up: Axis) -> str:
    def words(point: Point) -> str:
        return f"<title>{escape(series.name)}: {point[1]:.4g} at {point[0]:.4g}</title>"

    shown = [(px, py) if px > 0 or not across.log else (px, math.nan) for px, py in series.points]
    if series.form == "dots":
        return "".join(
            f'<circle cx="{across.place(px):.1f}" cy="{up.place(py):.1f}" r="3">{words((px, py))}</circle>'
            for px, py in shown
            if math.isfinite(py)
        )
    path, pen_down = "", False
    for px, py in shown:
        if not math.isfinite(py):
            pen_down = False
            continue
        at, height = f"{across.place(px):.1f}", f"{up.place(py):.1f}"
        path += (
            f"M{at} {height}" if not pen_down else f"H{at}V{height}" if series.form == "steps" else f"L{at} {height}"
        )
        pen_down = True
    return f'<path d="{path}"><title>{escape(series.name)}</title></path>'
