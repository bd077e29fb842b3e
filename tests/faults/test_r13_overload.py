"""R13: ten times what can be done is asked. Who is let in is served as well as ever, the others hear so at once."""

import asyncio
import time

import httpx
import pytest

from tests.faults.conftest import FULL, MAX_RUNNING, MAX_WAITING, scaled, settled
from tests.faults.streams import Story, body, read
from tests.service.conftest import Running

pytestmark = [pytest.mark.slow, pytest.mark.faults]

TOKENS = scaled(32, 128)
SECONDS = scaled(3, 20)
ROUNDS = scaled(3, 10)
OVERLOAD = 10
PATIENCE_MS = 50


async def peak_of(client: httpx.AsyncClient, model: str) -> float:
    """Requests a second when there is always something to do, and never too much."""

    async def ask(number: int) -> int:
        return sum([(await read(client, body(model, number, TOKENS))).is_whole for _ in range(ROUNDS)])

    began = time.perf_counter()
    done = sum(await asyncio.gather(*(ask(number) for number in range(2 * MAX_RUNNING))))
    assert done == 2 * MAX_RUNNING * ROUNDS
    return done / (time.perf_counter() - began)


async def offered(client: httpx.AsyncClient, model: str, rate: float, seconds: float) -> list[Story]:
    """Requests at a steady rate, whatever becomes of them."""
    reading, began = [], time.perf_counter()
    for number in range(int(rate * seconds)):
        await asyncio.sleep(began + number / rate - time.perf_counter())
        reading.append(asyncio.create_task(read(client, body(model, number, TOKENS))))
    return await asyncio.gather(*reading)


async def test_an_overloaded_service_says_so_at_once_and_does_its_work(small: Running) -> None:
    """A queue without a bound takes everybody in, and soon serves nobody in time."""
    room = httpx.Limits(max_connections=None, max_keepalive_connections=200)
    async with httpx.AsyncClient(base_url=small.url, timeout=120, limits=room) as client:
        peak = await peak_of(client, small.model)
        await settled(small, 20)
        began = time.perf_counter()
        stories = await offered(client, small.model, OVERLOAD * peak, SECONDS)
        took = time.perf_counter() - began
    refused = [story for story in stories if story.status == 429]
    served = [story for story in stories if story.is_whole]
    assert len(refused) + len(served) == len(stories), "nobody fails, and nobody is left without an answer"
    assert len(refused) > len(stories) / 2
    assert len(served) >= MAX_RUNNING + MAX_WAITING
    assert all(1 <= int(story.headers["retry-after"]) <= 600 for story in refused)
    waits = sorted(story.answered_at - story.asked_at for story in refused)
    p50, p99 = (1000 * waits[int(len(waits) * share)] for share in (0.5, 0.99))
    goodput = len(served) / took / peak
    print(f"peak {peak:.1f}/s, offered {OVERLOAD * peak:.0f}/s: 429 after {p50:.1f} ms p50, {p99:.1f} ms p99")
    print(f"goodput {goodput:.0%} of the peak")
    if FULL:
        assert p99 <= PATIENCE_MS
        assert goodput >= 0.9
