"""What happened between two scrapes: rates and percentiles, by the same arithmetic as Prometheus' own."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Self

from prometheus_client.parser import text_string_to_metric_families

from service.instruments import PREFIX

Series = tuple[str, frozenset[tuple[str, str]]]  # name without our prefix, labels


class Scrape(NamedTuple):
    """Every sample of a page; when: in seconds on any clock."""

    samples: Mapping[Series, float]
    when: float

    @classmethod
    def read(cls, page: str, when: float) -> Self:
        """Raises `ValueError` for what is no exposition."""
        families = text_string_to_metric_families(page)
        return cls(
            {
                (sample.name.removeprefix(PREFIX), frozenset(sample.labels.items())): float(sample.value)
                for family in families
                for sample in family.samples
            },
            when,
        )

    def values(self, name: str, **labels: str) -> dict[Series, float]:
        """The samples of a name that carry these labels."""
        wanted = labels.items()
        return {series: value for series, value in self.samples.items() if series[0] == name and wanted <= series[1]}


class Window(NamedTuple):
    """The time between two scrapes. Where there is nothing to say, the answer is NaN."""

    before: Scrape
    after: Scrape

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.after.when - self.before.when

    def gauge(self, name: str, **labels: str) -> float:
        """The sum of a gauge, as of the end."""
        return sum(self.after.values(name, **labels).values())

    def increase(self, name: str, **labels: str) -> float:
        """How much counters have grown together."""
        return sum(growth for _, growth in self._growths(name, **labels))

    def rate(self, name: str, **labels: str) -> float:
        """The same a second."""
        return self.increase(name, **labels) / self.seconds if self.seconds > 0 else math.nan

    def ratio(self, part: str, whole: str, **labels: str) -> float:
        """How much one counter has grown for each one that another has."""
        base = self.increase(whole, **labels)
        return self.increase(part, **labels) / base if base else math.nan

    def quantile(self, q: float, name: str, **labels: str) -> float:
        """Of a histogram: as many of its values as `q` says are below.

        Between two bounds it takes them as spread evenly; beyond the last one it knows no more than that bound.
        """
        below: dict[float, float] = {}
        for (_, found), growth in self._growths(f"{name}_bucket", **labels):
            bound = float(dict(found)["le"])
            below[bound] = below.get(bound, 0.0) + growth
        total = below.get(math.inf, 0.0)
        if not total:
            return math.nan
        start = under = 0.0
        for bound, count in sorted(below.items()):
            if count >= q * total:
                if bound == math.inf:
                    return start
                return start + (bound - start) * (q * total - under) / (count - under)
            start, under = bound, count
        raise AssertionError("the last bucket holds all")

    def replicas(self, deployment: str) -> list[str]:
        """The replicas of a deployment, as of the end."""
        found = (dict(labels) for name, labels in self.after.samples if name == "build_info")
        return sorted(labels["replica"] for labels in found if labels.get("deployment") == deployment)

    def _growths(self, name: str, **labels: str) -> Iterable[tuple[Series, float]]:
        for series, value in self.after.values(name, **labels).items():
            before = self.before.samples.get(series, 0.0)
            yield series, value - before if value >= before else value  # it has begun anew
