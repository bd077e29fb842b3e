"""When requests are sent in an open loop: known from a seed before the test starts, whatever the server does.

A user that waits for its answer before it asks again asks a slow server less: the measurement then leaves out the very
requests that would have suffered (coordinated omission). Here arrivals are a point process. Gaps are drawn at a rate of
one, then stretched by the inverse of the cumulative rate (time rescaling), so one rule gives every shape:

    constant:rate=20                      every 50 ms
    poisson:rate=20                       independent users
    gamma:rate=20,burstiness=0.5          the shape of the gamma distribution: 1 is Poisson, less is burstier
    ramp:start=5,end=50                   Poisson, the rate rising (or falling) evenly over the run
    spike:rate=10,peak=50,at=10,seconds=5 Poisson, the rate at its peak for 5 s from second 10 on
    trace:file=azure.csv,speed=2          the times of a recorded day, twice as fast, and its lengths in tokens

A worker of a distributed test computes the whole schedule and takes every n-th arrival: nothing is sent between them,
and none is lost or sent twice.
"""

import csv
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

# Columns of a trace: our own CSV report, or the Azure LLM inference traces (Patel et al. 2024, "Splitwise").
TRACE_COLUMNS = (("intended", "prompt_tokens", "completion_tokens"), ("TIMESTAMP", "ContextTokens", "GeneratedTokens"))


class ScheduleError(ValueError):
    """An arrival process that cannot be. Its text says why, and what could be."""


@dataclass(frozen=True)
class Arrival:
    """One request to be sent. seconds: after the start. Lengths in tokens where a trace gives them."""

    index: int
    seconds: float
    input_tokens: int | None = None
    output_tokens: int | None = None


@dataclass(frozen=True)
class Segment:
    """A stretch of time over which the rate changes evenly. seconds may be infinite where it does not change."""

    seconds: float
    start_rate: float
    end_rate: float

    @property
    def area(self) -> float:
        """Requests expected in it."""
        return self.seconds * (self.start_rate + self.end_rate) / 2

    def when(self, area: float) -> float:
        """Seconds into the segment until `area` requests are expected: the root of start * t + slope * t^2 / 2."""
        if self.start_rate == self.end_rate:
            return area / self.start_rate
        slope = (self.end_rate - self.start_rate) / self.seconds
        # Twice the constant term over the sum: no cancellation where the slope is small.
        return 2 * area / (self.start_rate + math.sqrt(max(self.start_rate**2 + 2 * slope * area, 0.0)))


def arrivals(spec: str, *, seconds: float, seed: int) -> list[Arrival]:
    """All arrivals of the first `seconds`, in order. Raises `ScheduleError`."""
    name, options = _parse(spec)
    if name == "trace":
        file, speed = Path(_text(options, "file")), _number(options, "speed", 1.0)
        _nothing_left(name, options)
        return _trace(file, speed, seconds)
    segments = _segments(name, options, seconds)
    burstiness = math.inf if name == "constant" else _number(options, "burstiness") if name == "gamma" else 1.0
    _nothing_left(name, options)
    # One process, one stream of numbers: a run at another rate keeps its pattern, only faster.
    gaps = _gaps(1 / burstiness, random.Random(seed))
    times: list[float] = []
    for when in _rescaled(segments, gaps):
        if when >= seconds:
            break
        times.append(when)
    return [Arrival(index, when) for index, when in enumerate(times)]


def share(schedule: list[Arrival], worker: int, num_workers: int) -> list[Arrival]:
    """The arrivals that worker number `worker` sends."""
    return schedule[worker::num_workers]


def _segments(name: str, options: dict[str, str], seconds: float) -> list[Segment]:
    if name in ("constant", "poisson", "gamma"):
        rate = _number(options, "rate")
        return [Segment(math.inf, rate, rate)]
    if name == "ramp":
        return [Segment(seconds, _number(options, "start", least=0.0), _number(options, "end", least=0.0))]
    if name == "spike":
        rate, peak = _number(options, "rate"), _number(options, "peak")
        before, during = _number(options, "at", least=0.0), _number(options, "seconds")
        return [Segment(before, rate, rate), Segment(during, peak, peak), Segment(math.inf, rate, rate)]
    raise ScheduleError(f"no arrival process is called {name!r}: constant, poisson, gamma, ramp, spike, trace")


def _gaps(variance: float, generator: random.Random) -> Iterator[float]:
    """Gaps of mean one. A variance of 0 makes them even, 1 exponential, more bursty."""
    if variance == 0.0:
        yield 0.0  # the first one at once, not after a gap
        while True:
            yield 1.0
    while True:
        yield generator.gammavariate(1 / variance, variance)


def _rescaled(segments: list[Segment], gaps: Iterator[float]) -> Iterator[float]:
    """The time at which the cumulative rate reaches each arrival of the process of rate one."""
    left = iter(segments)
    segment, begins, area_before = next(left), 0.0, 0.0
    area = 0.0
    for gap in gaps:
        area += gap
        while area - area_before >= segment.area:
            begins, area_before = begins + segment.seconds, area_before + segment.area
            following = next(left, None)
            if following is None:
                return
            segment = following
        yield begins + segment.when(area - area_before)


def _trace(file: Path, speed: float, seconds: float) -> list[Arrival]:
    """Rows in the order of their times, which start at 0. Raises `ScheduleError`."""
    with file.open(newline="") as lines:
        reader = csv.DictReader(lines)
        names = next((names for names in TRACE_COLUMNS if set(names) <= set(reader.fieldnames or ())), None)
        if names is None:
            forms = " or ".join(", ".join(names) for names in TRACE_COLUMNS)
            raise ScheduleError(f"{file} has the columns {reader.fieldnames}, a trace has {forms}")
        when, input_tokens, output_tokens = names
        rows = sorted((_time(row[when]), int(row[input_tokens]), int(row[output_tokens])) for row in reader)
    if not rows:
        raise ScheduleError(f"{file} holds no request")
    first = rows[0][0]
    scaled = [((time - first) / speed, prompt, output) for time, prompt, output in rows]
    # A request that failed has no tokens in our report; it was sent, so it is sent again, with one of each.
    return [
        Arrival(index, time, max(prompt, 1), max(output, 1))
        for index, (time, prompt, output) in enumerate(scaled)
        if time < seconds
    ]


def _time(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return datetime.fromisoformat(text[:26]).timestamp()  # Azure gives seven digits, Python takes six


def _parse(spec: str) -> tuple[str, dict[str, str]]:
    name, _, rest = spec.partition(":")
    pairs = [pair.partition("=") for pair in rest.split(",") if pair]
    if any(not value for _, _, value in pairs):
        raise ScheduleError(f"{spec!r}: options are written NAME:key=value,key=value")
    return name, {key: value for key, _, value in pairs}


def _nothing_left(name: str, options: dict[str, str]) -> None:
    if options:
        raise ScheduleError(f"{name} takes no {', '.join(options)}: see the list in loadtest/schedule.py")


def _text(options: dict[str, str], key: str) -> str:
    if key not in options:
        raise ScheduleError(f"{key}= is missing: see the list in loadtest/schedule.py")
    return options.pop(key)


def _number(options: dict[str, str], key: str, default: float | None = None, *, least: float | None = None) -> float:
    """Take one option out. Must be above 0, or at least `least` where that is given."""
    if default is not None and key not in options:
        return default
    text = _text(options, key)
    try:
        number = float(text)
    except ValueError:
        raise ScheduleError(f"{key}={text} is no number") from None
    if not math.isfinite(number) or (number <= 0 if least is None else number < least):
        raise ScheduleError(f"{key}={text} must be {'above 0' if least is None else f'at least {least:g}'}")
    return number
