"""What a process counts with: a registry of its own, in which every series says which process it is of.

The registry, its text format and what happens once a request are `prometheus_client`'s. Its histograms cost over a
microsecond an observation; what happens once a step or once a delivery is kept in plain numbers here, and becomes a
series when somebody looks. Such numbers have one writer; a reader in another thread may see the newest one half done.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each that nobody reads

PREFIX = "attendant_"

Identity = Mapping[str, str]


class Tally:
    """Counts up."""

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, count: float = 1) -> None:
        """Add to it."""
        self.value += count


class Distribution(Collector):
    """A histogram: how often a value fell between two bounds."""

    def __init__(self, name: str, text: str, identity: Identity, bounds: Sequence[float]) -> None:
        self._name, self._text, self._identity = name, text, identity
        self._bounds = tuple(map(float, bounds))
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Take in `count` values that are alike."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """Called by the registry."""
        buckets, seen = [], 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), list(self._counts), strict=True):
            seen += count
            buckets.append((bound, float(seen)))
        family = HistogramMetricFamily(self._name, self._text, labels=list(self._identity))
        family.add_metric(list(self._identity.values()), buckets, self._sum)
        yield family


class Reading(Collector):
    """Numbers that stand somewhere already, read when somebody looks. `read` gives one for each value of `label`."""

    def __init__(
        self,
        kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
        name: str,
        text: str,
        identity: Identity,
        read: Callable[[], Mapping[str, float]],
        label: str,
    ) -> None:
        self._kind, self._name, self._text, self._identity = kind, name, text, identity
        self._read, self._label = read, label

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """Called by the registry."""
        labels = [self._label] if self._label else []
        family = self._kind(self._name, self._text, labels=[*self._identity, *labels])
        for value, number in self._read().items():
            family.add_metric([*self._identity.values(), *([value] if self._label else [])], number)
        yield family


class Instruments:
    """A registry, and the ways to declare a series in it. Names get the prefix `attendant_`."""

    def __init__(self, **identity: str) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self._identity = identity

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A number that goes up and down."""
        self._reading(GaugeMetricFamily, name, text, lambda: {"": read()})

    def total(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A count that is kept elsewhere."""
        self._reading(CounterMetricFamily, name, text, lambda: {"": read()})

    def totals(self, name: str, text: str, label: str, read: Callable[[], Mapping[str, float]]) -> None:
        """Several of them, told apart by a label."""
        self._reading(CounterMetricFamily, name, text, read, label)

    def tally(self, name: str, text: str) -> Tally:
        """A count that is kept here."""
        tally = Tally()
        self.total(name, text, lambda: tally.value)
        return tally

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        """A counter of the library's; `count` gives its series for certain labels."""
        return Counter(PREFIX + name, text, [*self._identity, *labels], registry=self.registry)

    def count(self, counter: Counter, **labels: str) -> Counter:
        """This process' series of a counter."""
        return counter.labels(**self._identity, **labels)

    def distribution(self, name: str, text: str, bounds: Sequence[float]) -> Distribution:
        """A histogram."""
        distribution = Distribution(PREFIX + name, text, self._identity, bounds)
        self.registry.register(distribution)
        return distribution

    def info(self, name: str, text: str, facts: Mapping[str, object]) -> None:
        """What does not change, as the labels of a series that is always 1."""
        labels = {key: str(value) for key, value in facts.items()}
        gauge = Gauge(f"{PREFIX}{name}_info", text, [*self._identity, *labels], registry=self.registry)
        gauge.labels(**self._identity, **labels).set(1)

    def expose(self) -> str:
        """The registry in Prometheus' text format."""
        return generate_latest(self.registry).decode()

    def _reading(
        self,
        kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
        name: str,
        text: str,
        read: Callable[[], Mapping[str, float]],
        label: str = "",
    ) -> None:
        self.registry.register(Reading(kind, PREFIX + name, text, self._identity, read, label))
