"""What a test is to do, decided once by the master and known to every worker, so that they need not talk about it."""

from dataclasses import asdict, dataclass
from typing import Any

from loadtest.schedule import Arrival, arrivals
from loadtest.workload import Workloads


@dataclass(frozen=True)
class Plan:
    """One test. starts_at: Unix time. seconds: during which requests are sent; warmup: of those, not measured.

    arrivals: a process of `loadtest/schedule.py`, or empty for a closed loop of `users`. max_tokens: None for what the
    workload says. tokens_per_word: of our words, in the server's tokens.
    """

    host: str
    model: str
    workload: str
    arrivals: str
    users: int
    num_workers: int
    seed: int
    starts_at: float
    seconds: float
    warmup: float
    max_tokens: int | None
    ignore_eos: bool
    tokens_per_word: float

    @property
    def open_loop(self) -> bool:
        """Whether requests are sent when they are due, however many are still unanswered."""
        return bool(self.arrivals)

    @property
    def measured_from(self) -> float:
        """Unix time at which the warm-up ends."""
        return self.starts_at + self.warmup

    @property
    def ends_at(self) -> float:
        """Unix time at which the last request may be sent."""
        return self.starts_at + self.seconds

    @property
    def fields(self) -> dict[str, Any]:
        """What every request says beside its conversation."""
        return {"model": self.model} | ({"ignore_eos": True} if self.ignore_eos else {})

    def schedule(self) -> list[Arrival]:
        """All arrivals of an open loop. Raises `ScheduleError`."""
        return arrivals(self.arrivals, seconds=self.seconds, seed=self.seed)

    def workloads(self) -> Workloads:
        """What is asked. Raises `WorkloadError`."""
        return Workloads(
            self.workload, seed=self.seed, tokens_per_word=self.tokens_per_word, max_tokens=self.max_tokens
        )

    def to_dict(self) -> dict[str, Any]:
        """For the way to a worker, and for the report."""
        return asdict(self)
