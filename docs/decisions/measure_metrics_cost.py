"""What metrics cost: the service in one process, without Ray and sockets, with its instruments and without, by turns.

    python docs/decisions/measure_metrics_cost.py --rounds 40

Without means that observing is a call of nothing. Ray and HAProxy would only add to what a token costs, and so make the
share smaller. Intervals are of the median of the ratios of neighbouring rounds, by bootstrap. On a shared machine they
are wider than what is looked for, so the calls of one round are also written down, made again and timed by themselves.
"""

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import httpx

from model.text.chat_template import ChatTemplate
from model.text.tokenizer import Tokenizer
from service import replica as replica_module
from service.api.routes import create_api
from service.completion import Service
from service.dispatch import Dispatcher
from service.door import Door
from service.hub import EMBEDDED
from service.instruments import Distribution, Tally
from service.limits import Limits
from service.metrics import EngineMetrics, IngressMetrics
from service.receipt import Timing
from service.replica import EngineReplica, Queue
from tests.service.fakes import LocalFleet

# All that is called once a step, once a delivery or once a request.
OBSERVING: Sequence[tuple[type, str]] = (
    (Distribution, "observe"),
    (Tally, "inc"),
    (EngineMetrics, "observe_step"),
    (EngineMetrics, "observe_request"),
    (IngressMetrics, "finished"),
    (IngressMetrics, "responded"),
    (EngineReplica, "_look_who_started"),
    (Timing, "token"),
)
CLIENTS, TOKENS = 32, 128


class Round(NamedTuple):
    """Seconds by the clock and of the processor, a token."""

    wall: float
    cpu: float


def nothing(*args: object) -> None:
    """Observes nothing."""


async def measure(client: httpx.AsyncClient) -> Round:
    """One round of requests, all at once."""
    body: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": TOKENS, "ignore_eos": True, "seed": 1}
    wall, cpu = time.perf_counter(), time.process_time()
    answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(CLIENTS)))
    assert all(answer.json()["usage"]["completion_tokens"] == TOKENS for answer in answers)
    count = CLIENTS * TOKENS
    return Round((time.perf_counter() - wall) / count, (time.process_time() - cpu) / count)


async def without(client: httpx.AsyncClient) -> Round:
    """The same, with nobody observing."""
    with ExitStack() as stack:
        for owner, name in OBSERVING:
            stack.enter_context(mock.patch.object(owner, name, nothing))
        return await measure(client)


async def account(client: httpx.AsyncClient) -> float:
    """Seconds a token that observing takes: all calls of one round, made once more with nothing between them."""
    calls: list[tuple[Callable[..., object], tuple[object, ...]]] = []

    def noting(observe: Callable[..., object]) -> Callable[..., object]:
        def noted(*args: object) -> object:
            calls.append((observe, args))
            return observe(*args)

        return noted

    with ExitStack() as stack:
        for owner, name in OBSERVING:
            stack.enter_context(mock.patch.object(owner, name, noting(getattr(owner, name))))
        await measure(client)
    times = []
    for _ in range(20):
        started = time.perf_counter()
        for observe, args in calls:
            observe(*args)
        times.append(time.perf_counter() - started)
    print(f"{len(calls) / (CLIENTS * TOKENS):.2f} calls a token")
    return min(times) / (CLIENTS * TOKENS)


def interval(ratios: Sequence[float]) -> str:
    """The median, and how sure it is."""
    draw = random.Random(1)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return f"{statistics.median(ratios) - 1:+.2%} (95 %: {medians[50] - 1:+.2%} to {medians[-51] - 1:+.2%})"


async def main(rounds: int) -> None:
    """Measure by turns, print."""
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="r"))
    options = {"dtype": "bf16", "device": "cpu", "num_threads": 1}
    with mock.patch.object(replica_module.serve, "get_replica_context", return_value=context):
        replica = EngineReplica(str(EMBEDDED), "storyteller", options, Queue(max_waiting=64))
    metrics = IngressMetrics("storyteller")
    dispatcher = Dispatcher(LocalFleet(replica), metrics)  # type: ignore[arg-type]
    tokenizer, template = Tokenizer.from_directory(EMBEDDED), ChatTemplate.from_directory(EMBEDDED)
    service = Service("storyteller", 0, tokenizer, template, dispatcher, metrics, Limits())
    transport = httpx.ASGITransport(create_api(service, Door()))
    on, off = [], []
    async with httpx.AsyncClient(transport=transport, base_url="http://attendant", timeout=60) as client:
        await measure(client)
        for number in range(rounds):
            for measured in (on, off) if number % 2 else (off, on):
                measured.append(await (measure if measured is on else without)(client))
        observing = await account(client)
    dispatcher.close()
    replica.__del__()
    token = statistics.median(one.wall for one in on)
    rate = {name: 1 / statistics.median(one.wall for one in times) for name, times in (("on", on), ("off", off))}
    print(f"{CLIENTS} clients, {TOKENS} tokens each, {rounds} rounds by turns")
    print(f"tokens/s: {rate['on']:,.0f} with, {rate['off']:,.0f} without")
    print(f"observing alone: {observing * 1e6:.2f} us of {token * 1e6:.1f} us a token, {observing / token:.2%}")
    print("time a token with over without:", interval([a.wall / b.wall for a, b in zip(on, off, strict=True)]))
    print("processor time a token with over without:", interval([a.cpu / b.cpu for a, b in zip(on, off, strict=True)]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    asyncio.run(main(parser.parse_args().rounds))
