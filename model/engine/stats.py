"""What a step took and where the engine stands: numbers for metrics, made once a step."""

import time
from typing import NamedTuple


class StepPhases(NamedTuple):
    """Where a step's time went, in seconds. `commit` includes guessing ahead, and, on a GPU, waiting for a step:
    `forward` and `sample` are then what it takes to launch them.
    """

    schedule: float = 0.0
    stage: float = 0.0
    forward: float = 0.0
    sample: float = 0.0
    commit: float = 0.0


class StepStats(NamedTuple):
    """One step in numbers.

    seconds: the whole step; phases: its parts. num_tokens: computed in this step; num_generated: given out.
    kv_cache_usage: blocks held by running requests, 0 to 1.
    From `num_preemptions` on: counts since the engine's start.
    prefix_queries, prefix_hits: tokens looked up in the prefix cache, and found.
    num_drafted, num_accepted: tokens guessed ahead, and guessed right.
    """

    seconds: float
    num_running: int
    num_waiting: int
    num_tokens: int
    num_generated: int
    kv_cache_usage: float
    num_preemptions: int
    num_failed_steps: int
    prefix_queries: int
    prefix_hits: int
    num_drafted: int
    num_accepted: int
    phases: StepPhases


class Stopwatch:
    """Splits a span of time into laps."""

    def __init__(self) -> None:
        self.started = self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap, or since the start."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds

    @property
    def total(self) -> float:
        """Seconds from the start to the last lap."""
        return self._last - self.started
