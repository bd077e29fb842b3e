"""Latency histograms that keep their precision and can be merged across workers.

Locust rounds its own statistics to whole milliseconds, and to two digits above a hundred: of no use for the time
between two tokens. Here a bucket is 1 % wide at every scale (the idea of HdrHistogram); mean and extremes are exact.
"""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

WIDTH = 1.01  # upper bound of a bucket over its lower bound
SHORTEST = 1e-6  # seconds: anything shorter counts as this


class Histogram:
    """Durations in seconds."""

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.shortest = math.inf
        self.longest = 0.0
        self._buckets: Counter[int] = Counter()

    def record(self, seconds: float) -> None:
        """Add one duration."""
        self.count += 1
        self.total += seconds
        self.shortest = min(self.shortest, seconds)
        self.longest = max(self.longest, seconds)
        self._buckets[round(math.log(max(seconds, SHORTEST) / SHORTEST, WIDTH))] += 1

    @property
    def mean(self) -> float:
        """Seconds; NaN where nothing was recorded."""
        return self.total / self.count if self.count else math.nan

    def percentile(self, percent: float) -> float:
        """The duration, within 0.5 %, that `percent` of all do not exceed (nearest rank); NaN where there is none."""
        rank = max(math.ceil(self.count * percent / 100), 1)
        seen = 0
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            if seen >= rank:
                return min(max(SHORTEST * WIDTH**bucket, self.shortest), self.longest)
        return math.nan

    def cumulative(self) -> list[tuple[float, float]]:
        """Each duration that occurred, and the share of all that do not exceed it."""
        points, seen = [], 0
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            points.append((SHORTEST * WIDTH**bucket, seen / self.count))
        return points

    def merge(self, other: "Histogram") -> None:
        """Add everything that the other has recorded."""
        self.count += other.count
        self.total += other.total
        self.shortest = min(self.shortest, other.shortest)
        self.longest = max(self.longest, other.longest)
        self._buckets.update(other._buckets)

    def to_dict(self) -> dict[str, Any]:
        """For the way from a worker to the master."""
        return {
            "count": self.count,
            "total": self.total,
            "shortest": self.shortest,
            "longest": self.longest,
            "buckets": list(self._buckets.items()),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Histogram":
        """The inverse of `to_dict`."""
        histogram = cls()
        histogram.count, histogram.total = data["count"], data["total"]
        histogram.shortest, histogram.longest = data["shortest"], data["longest"]
        histogram._buckets = Counter(dict(data["buckets"]))
        return histogram
