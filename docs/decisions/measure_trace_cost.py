"""What the spans of one request cost each process: python docs/decisions/measure_trace_cost.py

Microseconds of processor time, the best of some rounds, without the thread that sends them.
"""

import time
from collections.abc import Callable
from typing import Any

from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from service.call import Call
from service.receipt import Timing
from service.tracing import Tracer

ROUNDS, REQUESTS = 15, 200
SCOPE: dict[str, Any] = {"method": "POST", "path": "/v1/completions", "headers": [], "server": ("127.0.0.1", 8000)}
USAGE = {"prompt_tokens": 5, "cached_tokens": 0, "completion_tokens": 8, "finish_reasons": ["stop"]}


def tracer() -> Tracer:
    """One whose spans go nowhere."""
    return Tracer(BatchSpanProcessor(InMemorySpanExporter()), "x")


def best(work: Callable[[], object]) -> float:
    """Microseconds for each of the requests."""
    times = []
    for _ in range(ROUNDS):
        begun = time.thread_time()
        for _ in range(REQUESTS):
            work()
        times.append((time.thread_time() - begun) / REQUESTS * 1e6)
    return min(times)


def main() -> None:
    """Print both."""
    ingress, engine = tracer(), tracer()
    call = Call("x")

    def in_ingress() -> None:
        ingress.begin(SCOPE, call)
        call.admitted_at = call.first_token_at = call.arrived
        call.log.update(USAGE)
        ingress.end(SCOPE, call, "/v1/completions", 200, "storyteller")

    def in_engine() -> None:
        timing = Timing()
        timing.started_at = timing.first_token_at = timing.last_token_at = timing.accepted_at
        engine.phases(timing, call.trail, failed=False)

    print(f"ingress {best(in_ingress):.0f} us, engine {best(in_engine):.0f} us a request")
    ingress.close()
    engine.close()


if __name__ == "__main__":
    main()
