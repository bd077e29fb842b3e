"""Plans for a thousand replicas on paper: `python deploy/simulate_autoscaling.py`.

A discrete-event model: requests arrive at random at a rate that changes over time, wait for a place in a replica, and
hold it while their prompt is computed and their tokens are written; replicas take a while to start. How many there
should be is decided by the service's own policy (`service.autoscaling`), asked once a simulated second. What comes out
is drawn beside what was asked for: docs/autoscaling.md says what it shows.
"""

import argparse
import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from math import cos, pi
from pathlib import Path
from statistics import quantiles
from typing import Literal, NamedTuple

from service.autoscaling import Autoscaling, Load, TokenPolicy

DOCS = Path(__file__).parent.parent / "docs"


@dataclass(frozen=True)
class Replica:
    """What one replica can do.

    places: requests that run at once. prefill_rate: prompt tokens a second. token_seconds: between the tokens of one
    request, and token_seconds_each: what each running request adds to it. start_seconds: until it serves.
    """

    places: int = 64
    prefill_rate: float = 20_000.0
    token_seconds: float = 0.02
    token_seconds_each: float = 0.0003
    start_seconds: float = 40.0


@dataclass(frozen=True)
class Scenario:
    """rate: requests a second at a time. prompt_tokens, output_tokens: their means; lengths are exponential."""

    name: str
    title: str
    seconds: float
    rate: Callable[[float], float]
    peak_rate: float
    scaling: Autoscaling
    replica: Replica = Replica()
    prompt_tokens: float = 800.0
    output_tokens: float = 250.0


class Sample(NamedTuple):
    """One second of the simulation: replicas that there should be and that serve, requests running and waiting."""

    time: float
    rate: float
    target: int
    serving: int
    running: int
    waiting: int


@dataclass
class Result:
    """samples: one a second. waits: (arrival, seconds until a place) of each request that got one."""

    samples: list[Sample] = field(default_factory=list)
    waits: list[tuple[float, float]] = field(default_factory=list)

    @property
    def changes(self) -> list[int]:
        """By how much the number of replicas changed, each time."""
        targets = [sample.target for sample in self.samples]
        return [b - a for a, b in pairwise(targets) if a != b]

    @property
    def turns(self) -> int:
        """How often more became fewer, or fewer more."""
        return sum((a > 0) != (b > 0) for a, b in pairwise(self.changes))

    @property
    def replica_hours(self) -> float:
        """What it cost: every replica that serves or starts."""
        return sum(max(sample.target, sample.serving) for sample in self.samples) / 3600

    def wait(self, percent: int) -> float:
        """A percentile of the seconds until a place."""
        return quantiles([wait for _, wait in self.waits], n=100)[percent - 1]


Event = tuple[float, int, Literal["arrival", "end", "ready", "second"], int]


class Simulation:
    """One run. Two of one seed are the same to the last digit."""

    def __init__(self, scenario: Scenario, seed: int = 0) -> None:
        self._scenario = scenario
        self._random = random.Random(seed)
        self._policy = TokenPolicy(**scenario.scaling.model_dump())
        self._events: list[Event] = []
        self._count = 0  # of events: those of one time come in the order in which they were planned
        self._running: dict[int, int] = {}  # requests by serving replica
        self._leaving: dict[int, int] = {}  # and by replica that ends once it has none
        self._free: list[tuple[int, int]] = []  # (running, replica), stale ones among them
        self._waiting: deque[tuple[float, int]] = deque()  # (arrival, prompt tokens)
        self._waiting_tokens = 0
        self._starting: set[int] = set()
        self._names = iter(range(10**9))
        self._target = 0
        self._result = Result()

    def run(self) -> Result:
        """From the first second to the last."""
        self._scale(max(1, self._scenario.scaling.min_replicas), 0.0, start_seconds=0.0)
        self._plan(0.0, "second")
        self._plan_arrival(0.0)
        while self._events:
            now, _, kind, replica = heapq.heappop(self._events)
            if now > self._scenario.seconds:
                break
            if kind == "arrival":
                self._arrive(now)
            elif kind == "end":
                self._end(now, replica)
            elif kind == "ready":
                self._ready(now, replica)
            else:
                self._decide(now)
        return self._result

    def _plan(self, when: float, kind: Literal["arrival", "end", "ready", "second"], replica: int = 0) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, kind, replica))

    def _plan_arrival(self, now: float) -> None:
        """The next one of a Poisson process whose rate changes: one at the peak rate, thinned out."""
        scenario = self._scenario
        while now <= scenario.seconds:
            now += self._random.expovariate(scenario.peak_rate)
            if self._random.random() * scenario.peak_rate < scenario.rate(now):
                self._plan(now, "arrival")
                return

    def _arrive(self, now: float) -> None:
        prompt = 1 + int(self._random.expovariate(1 / self._scenario.prompt_tokens))
        self._waiting.append((now, prompt))
        self._waiting_tokens += prompt
        self._start_waiting(now)
        self._plan_arrival(now)

    def _start_waiting(self, now: float) -> None:
        """Whoever waits goes to the replica with the fewest running requests, if it has a place."""
        model = self._scenario.replica
        while self._waiting and (replica := self._least_loaded()) is not None:
            arrival, prompt = self._waiting.popleft()
            self._waiting_tokens -= prompt
            self._running[replica] += 1
            running = self._running[replica]
            heapq.heappush(self._free, (running, replica))
            tokens = self._random.expovariate(1 / self._scenario.output_tokens)
            per_token = model.token_seconds + model.token_seconds_each * running
            self._plan(now + prompt / model.prefill_rate + tokens * per_token, "end", replica)
            self._result.waits.append((arrival, now - arrival))

    def _least_loaded(self) -> int | None:
        while self._free:
            running, replica = self._free[0]
            if self._running.get(replica) != running:  # it has changed since, and stands elsewhere in the heap
                heapq.heappop(self._free)
            elif running >= self._scenario.replica.places:
                return None
            else:
                return heapq.heappop(self._free)[1]
        return None

    def _end(self, now: float, replica: int) -> None:
        if replica in self._leaving:
            self._leaving[replica] -= 1
            if not self._leaving[replica]:
                del self._leaving[replica]
            return
        self._running[replica] -= 1
        heapq.heappush(self._free, (self._running[replica], replica))
        self._start_waiting(now)

    def _ready(self, now: float, replica: int) -> None:
        if replica in self._starting:
            self._starting.remove(replica)
            self._running[replica] = 0
            heapq.heappush(self._free, (0, replica))
            self._start_waiting(now)

    def _decide(self, now: float) -> None:
        if not self._running and not self._starting and self._waiting:
            target = 1  # Serve's own rule: a request that finds no replica wakes one
        else:
            target = self._policy.decide(self._loads(), self._target, now)
        self._scale(target, now, self._scenario.replica.start_seconds)
        running = sum(self._running.values()) + sum(self._leaving.values())
        rate = self._scenario.rate(now)
        sample = Sample(now, rate, self._target, len(self._running), running, len(self._waiting))
        self._result.samples.append(sample)
        self._plan(now + 1.0, "second")

    def _loads(self) -> list[Load]:
        """As each replica would report. What waits is spread over all of them, as the router does it."""
        model, count = self._scenario.replica, len(self._running)
        if not count:
            return []
        waiting, tokens = len(self._waiting) / count, self._waiting_tokens / count
        return [
            Load(running, waiting, model.places, running / model.places, 0.0, tokens, model.prefill_rate)
            for running in self._running.values()
        ]

    def _scale(self, target: int, now: float, start_seconds: float) -> None:
        while len(self._running) + len(self._starting) < target:
            replica = next(self._names)
            self._starting.add(replica)
            self._plan(now + start_seconds, "ready", replica)
        while len(self._running) + len(self._starting) > target:
            if self._starting:
                self._starting.remove(max(self._starting))
                continue
            replica = min(self._running, key=lambda name: (self._running[name], name))
            if running := self._running.pop(replica):
                self._leaving[replica] = running
        self._target = target


def wave(low: float, high: float, period: float) -> Callable[[float], float]:
    """A rate that goes from low to high and back."""
    return lambda now: low + (high - low) * (1 - cos(2 * pi * now / period)) / 2


def burst(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """A rate that jumps, and falls back."""
    return lambda now: high if start <= now < end else low


SCENARIOS = (
    Scenario(
        "thousand",
        "one wave of load, 1 to 1,000 replicas",
        seconds=3600,
        rate=wave(1, 1400, 3600),
        peak_rate=1400,
        scaling=Autoscaling(max_replicas=1000, down_delay_s=60),
        output_tokens=1000,
    ),
    Scenario(
        "bursts",
        "a burst of ten times the load",
        seconds=1200,
        rate=burst(10, 100, 240, 600),
        peak_rate=100,
        scaling=Autoscaling(max_replicas=50, down_delay_s=60),
    ),
    Scenario(
        "sleep",
        "a service that sleeps between visits",
        seconds=2400,
        rate=burst(0, 2, 900, 1500),
        peak_rate=2,
        scaling=Autoscaling(min_replicas=0, max_replicas=4, idle_s=300),
    ),
)


def draw(results: dict[str, Result], file: Path) -> None:
    """One column a scenario: what is asked for, the replicas, and how long requests wait for a place."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8), layout="constrained")
    axes = figure.subplots(3, len(results), sharex="col", squeeze=False)
    for column, scenario in enumerate(SCENARIOS):
        result = results[scenario.name]
        minutes = [sample.time / 60 for sample in result.samples]
        rates, replicas, waits = axes[:, column]
        rates.set_title(scenario.title)
        rates.plot(minutes, [sample.rate for sample in result.samples], color="tab:gray")
        replicas.plot(minutes, [sample.target for sample in result.samples], label="wanted", color="tab:orange")
        replicas.plot(minutes, [sample.serving for sample in result.samples], label="serving", color="tab:blue")
        replicas.legend()
        step = max(1, len(result.waits) // 20_000)
        shown = result.waits[::step]
        waits.plot([at / 60 for at, _ in shown], [wait for _, wait in shown], ".", markersize=1, color="tab:red")
        waits.set_xlabel("minutes")
    for row, label in enumerate(("requests / s", "replicas", "wait for a place, s")):
        axes[row, 0].set_ylabel(label)
    figure.savefig(file, dpi=110)


def main() -> None:
    """Run the scenarios, print what came out, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=DOCS / "autoscaling.png")
    arguments = parser.parse_args()
    results = {scenario.name: Simulation(scenario, arguments.seed).run() for scenario in SCENARIOS}
    print("| scenario | requests | replicas, most | replica hours | changes | turns | wait p50 | wait p99 |")
    print("|---|---|---|---|---|---|---|---|")
    for scenario in SCENARIOS:
        result = results[scenario.name]
        most = max(sample.serving for sample in result.samples)
        print(
            f"| {scenario.title} | {len(result.waits):,} | {most} | {result.replica_hours:.1f} | {len(result.changes)} "
            f"| {result.turns} | {result.wait(50):.2f} s | {result.wait(99):.1f} s |"
        )
    draw(results, arguments.out)


if __name__ == "__main__":
    main()
