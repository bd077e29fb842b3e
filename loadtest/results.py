"""What a load test has measured: collected by every worker, merged by the master.

Percentiles come from histograms, which stay small however long a test lasts. Beside them each request leaves a record,
for what a histogram cannot answer: when it was, and whether it met every objective at once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from loadtest.histogram import Histogram

# From the intended send, as the reader feels it; with the suffix _sent from the actual one. refusal: until 429 or 503.
METRICS = ("ttft", "tpot", "itl", "e2e", "ttft_sent", "e2e_sent", "late", "refusal")

Outcome = Literal["ok", "cancelled", "refused", "failed"]


@dataclass(slots=True)
class Record:
    """One request. intended, sent: Unix seconds; other times: seconds.

    ttft, e2e: from the actual send, whatever the outcome; e2e ends when the client had nothing more to wait for.
    ttft, tpot: None where there was no first token, or no second. chunks: of text. max_tokens: asked for at most.
    Tokens are the server's count, 0 where it gave none. kind: the workload.
    """

    index: int
    turn: int
    kind: str
    intended: float
    sent: float
    e2e: float
    outcome: Outcome
    ttft: float | None = None
    tpot: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    chunks: int = 0
    max_tokens: int = 0
    paced: bool = False
    retry_after: bool = False
    error: str = ""

    @property
    def late(self) -> float:
        """How much later than intended it was sent."""
        return self.sent - self.intended

    @property
    def ended(self) -> float:
        """Unix seconds."""
        return self.sent + self.e2e

    def latencies(self) -> Iterator[tuple[str, float]]:
        """The metrics that this request has a value for: whoever pauses or leaves has no e2e or tpot to speak of."""
        yield "late", max(self.late, 0.0)
        if self.outcome == "refused":
            yield "refusal", self.e2e
        if self.outcome not in ("ok", "cancelled"):
            return
        if self.ttft is not None:
            yield "ttft_sent", self.ttft
            yield "ttft", self.ttft + self.late
        if self.outcome == "ok" and not self.paced:
            yield "e2e_sent", self.e2e
            yield "e2e", self.e2e + self.late
            if self.tpot is not None:
                yield "tpot", self.tpot


COLUMNS = tuple(column.name for column in fields(Record))


class Results:
    """Records and histograms. measured_from: Unix time at which the warm-up ends.

    What was to be sent before is in no histogram, but has its record: the server counts it too.
    """

    def __init__(self, measured_from: float = 0.0) -> None:
        self.measured_from = measured_from
        self.records: list[Record] = []
        self.histograms: dict[str, dict[str, Histogram]] = {}

    def add(self, record: Record, gaps: Sequence[float] = ()) -> None:
        """Take in one request. gaps: seconds between its chunks."""
        self.records.append(record)
        if record.intended < self.measured_from:
            return
        histograms = self._of(record.kind)
        for metric, seconds in record.latencies():
            histograms[metric].record(seconds)
        if record.outcome == "ok" and not record.paced:
            for gap in gaps:
                histograms["itl"].record(gap)

    def take(self) -> dict[str, Any]:
        """Hand over what was collected since the last time, for the way from a worker to the master."""
        data = {
            "records": [list(asdict(record).values()) for record in self.records],
            "histograms": {
                kind: {metric: histogram.to_dict() for metric, histogram in histograms.items() if histogram.count}
                for kind, histograms in self.histograms.items()
            },
        }
        self.records, self.histograms = [], {}
        return data

    def merge(self, data: Mapping[str, Any]) -> None:
        """Take in what a worker has handed over by `take`."""
        self.records += [Record(*values) for values in data["records"]]
        for kind, histograms in data["histograms"].items():
            for metric, histogram in histograms.items():
                self._of(kind)[metric].merge(Histogram.from_dict(histogram))

    def histogram(self, metric: str, kind: str | None = None) -> Histogram:
        """One metric over all kinds of requests, or over one."""
        whole = Histogram()
        for name, histograms in self.histograms.items():
            if kind in (None, name):
                whole.merge(histograms[metric])
        return whole

    @property
    def measured(self) -> list[Record]:
        """Records after the warm-up, by intended send."""
        return sorted((r for r in self.records if r.intended >= self.measured_from), key=lambda r: r.intended)

    def _of(self, kind: str) -> dict[str, Histogram]:
        return self.histograms.setdefault(kind, {metric: Histogram() for metric in METRICS})
