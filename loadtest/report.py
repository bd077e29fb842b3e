"""What a load test has measured: collected by every worker, merged and printed by the master."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loadtest.histogram import Histogram
from loadtest.stream import Timing

METRICS = ("ttft", "tpot", "itl", "e2e")
PERCENTILES = (50, 90, 95, 99)


class Report:
    """Histograms of the four latencies, and counts.

    seconds: from the first request sent to the last one ended, over all workers on one clock.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.histograms = {name: Histogram() for name in METRICS}
        self.completion_tokens = 0
        self.prompt_tokens = 0
        self.failures = 0
        self.first_start: float | None = None
        self.last_end: float | None = None

    def add(self, timing: Timing, ended: float) -> None:
        """Take in one completion. ended: Unix time."""
        self._span(ended - timing.e2e, ended)
        self.histograms["ttft"].record(timing.ttft)
        self.histograms["e2e"].record(timing.e2e)
        if timing.tpot is not None:
            self.histograms["tpot"].record(timing.tpot)
        for gap in timing.gaps:
            self.histograms["itl"].record(gap)
        self.completion_tokens += timing.completion_tokens
        self.prompt_tokens += timing.prompt_tokens

    def merge(self, data: Mapping[str, Any]) -> None:
        """Take in what a worker has sent by `to_dict`."""
        for name, histogram in data["histograms"].items():
            self.histograms[name].merge(Histogram.from_dict(histogram))
        self.completion_tokens += data["completion_tokens"]
        self.prompt_tokens += data["prompt_tokens"]
        self.failures += data["failures"]
        if data["first_start"] is not None:
            self._span(data["first_start"], data["last_end"])

    def to_dict(self) -> dict[str, Any]:
        """For the way from a worker to the master."""
        return {
            "histograms": {name: histogram.to_dict() for name, histogram in self.histograms.items()},
            "completion_tokens": self.completion_tokens,
            "prompt_tokens": self.prompt_tokens,
            "failures": self.failures,
            "first_start": self.first_start,
            "last_end": self.last_end,
        }

    @property
    def seconds(self) -> float:
        """How long the load lasted."""
        if self.first_start is None or self.last_end is None:
            return 0.0
        return self.last_end - self.first_start

    def summary(self) -> dict[str, Any]:
        """The numbers, in seconds, tokens and requests."""
        requests = self.histograms["e2e"].count
        rate = 1.0 / self.seconds if self.seconds else 0.0
        return {
            "requests": requests,
            "failures": self.failures,
            "seconds": self.seconds,
            "requests_per_second": requests * rate,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "completion_tokens_per_second": self.completion_tokens * rate,
            **{
                name: {
                    "count": histogram.count,
                    "mean": histogram.mean,
                    **{f"p{percent}": histogram.percentile(percent) for percent in PERCENTILES},
                    "max": histogram.longest,
                }
                for name, histogram in self.histograms.items()
                if histogram.count
            },
        }

    def write(self, file: Path) -> None:
        """The summary as JSON."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self.summary(), indent=2) + "\n")

    def __str__(self) -> str:
        summary = self.summary()
        columns = ("mean", *(f"p{percent}" for percent in PERCENTILES), "max")
        lines = [
            "",
            f"{summary['requests']} completions in {self.seconds:.1f} s, {self.failures} failed: "
            f"{summary['requests_per_second']:.1f} requests/s, "
            f"{summary['completion_tokens_per_second']:.0f} tokens/s",
            "",
            f"{'milliseconds':<14}" + "".join(f"{column:>10}" for column in columns),
        ]
        for name in METRICS:
            if name in summary:
                values = "".join(f"{1e3 * summary[name][column]:>10.2f}" for column in columns)
                lines.append(f"{name.upper():<14}{values}")
        return "\n".join(lines)

    def _span(self, start: float, end: float) -> None:
        self.first_start = start if self.first_start is None else min(self.first_start, start)
        self.last_end = end if self.last_end is None else max(self.last_end, end)
