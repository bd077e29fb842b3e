"""Watches the client itself: a load test whose own process was short of time has measured itself, not the server."""

import time
from collections.abc import Mapping
from typing import Any

import gevent

from loadtest.histogram import Histogram

TICK_S = 0.02
CPU_WINDOW_S = 2.0

MAX_CPU = 0.9  # of a core, over CPU_WINDOW_S: one thread of a process does all the work


class Health:
    """What the event loop of a process suffered. lag: seconds by which timers are late. cpu: in its busiest window."""

    def __init__(self) -> None:
        self.lag = Histogram()
        self.cpu = 0.0

    def watch(self) -> None:
        """Measure until killed; runs as a greenlet beside the requests."""
        wall, busy = time.perf_counter(), time.process_time()
        while True:
            due = time.perf_counter() + TICK_S
            gevent.sleep(TICK_S)
            now = time.perf_counter()
            self.lag.record(max(now - due, 0.0))
            if now - wall >= CPU_WINDOW_S:
                self.cpu = max(self.cpu, (time.process_time() - busy) / (now - wall))
                wall, busy = now, time.process_time()

    def take(self) -> dict[str, Any]:
        """Hand over what was seen since the last time."""
        data = {"lag": self.lag.to_dict(), "cpu": self.cpu}
        self.lag, self.cpu = Histogram(), 0.0
        return data

    def merge(self, data: Mapping[str, Any]) -> None:
        """Take in what another process has seen."""
        self.lag.merge(Histogram.from_dict(data["lag"]))
        self.cpu = max(self.cpu, data["cpu"])

    def complaints(self, late: Histogram, max_lag: float) -> list[str]:
        """Why this client cannot be believed; nothing where it can.

        late: how late it sent its requests. max_lag: seconds that both that and the loop's lag may have at p99.
        """
        found = []
        if self.cpu > MAX_CPU:
            found.append(f"a client process used {self.cpu:.0%} of a core: spread it with --processes")
        for what, histogram in (("the client's event loop was", self.lag), ("requests were sent", late)):
            if (p99 := histogram.percentile(99)) > max_lag:
                found.append(f"{what} {1e3 * p99:.1f} ms late at p99; --max-lag allows {1e3 * max_lag:g} ms")
        return found
