"""R10: many short requests, some of them given up. Nothing is left behind: no block, no file, no memory."""

import asyncio
import random
import statistics
import time

import httpx
import pytest

from tests.faults.conftest import FULL, ours, resident, scaled, settled
from tests.faults.streams import Story, body, read
from tests.service.conftest import Running

pytestmark = [pytest.mark.slow, pytest.mark.faults]

REQUESTS = scaled(600, 50_000)
CLIENTS = 24
SAMPLES = 60
WARM_UP = 0.5  # of the requests
MOST_SECONDS = 1200
SLOPE_MIB = 0.1  # a minute


class Meter:
    """Files and memory of the service's processes, looked at between requests."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self.samples: list[tuple[float, int]] = []  # minutes, bytes
        self._began = time.perf_counter()

    def look(self) -> None:
        self.samples.append(((time.perf_counter() - self._began) / 60, resident(self._running)))

    def files(self) -> int:
        return sum(process.num_fds() for process in ours(self._running))

    def slope(self) -> float:
        """MiB a minute behind the warm-up, by least squares."""
        late = self.samples[int(len(self.samples) * WARM_UP) :]
        minutes, sizes = zip(*late, strict=True)
        return statistics.linear_regression(minutes, sizes).slope / 2**20


async def ask(client: httpx.AsyncClient, model: str, rng: random.Random) -> bool:
    """One request of a kind; whether it went as it should."""
    request = body(model, rng.randrange(1000), rng.randint(1, 12))
    kind = rng.random()
    if kind < 0.2:
        story = Story()
        reading = asyncio.create_task(read(client, request | {"max_tokens": 200}, story))
        await asyncio.wait([reading], timeout=rng.uniform(0, 0.1))
        while kind < 0.1 and not (story.text or reading.done()):  # on a slow machine they would all leave the queue
            await asyncio.wait([reading], timeout=0.01)
        reading.cancel()
        await asyncio.wait([reading])
        return True
    if kind < 0.5:
        answer = await client.post("/v1/completions", json=request | {"stream": False})
        return answer.status_code == 200 and answer.json()["choices"][0]["finish_reason"] == "length"
    return (await read(client, request)).is_whole


async def test_many_short_requests_leave_nothing_behind(service: Running) -> None:
    """A request's entry that stays in some table, a task that is never done or a connection that is never closed grow
    with the number of requests served.
    """
    meter, rng, left, failed = Meter(service), random.Random(10), REQUESTS, 0
    files = 0
    end = time.perf_counter() + MOST_SECONDS

    async def work(client: httpx.AsyncClient) -> None:
        nonlocal left, failed, files
        while left > 0 and time.perf_counter() < end:
            left -= 1
            failed += not await ask(client, service.model, rng)
            if left % (REQUESTS // SAMPLES) == 0:
                meter.look()
            if left == REQUESTS // 2:
                files = meter.files()

    async with httpx.AsyncClient(base_url=service.url, timeout=60) as client:
        began = time.perf_counter()
        await asyncio.gather(*(work(client) for _ in range(CLIENTS)))
        took = time.perf_counter() - began
        more = meter.files() - files
    await settled(service, 10)
    print(f"{REQUESTS - left} requests in {took:.0f} s; files {more:+d}; memory {meter.slope():+.2f} MiB a minute")
    assert left <= 0, f"the time was up with {left} requests to go"
    assert failed == 0
    assert abs(more) <= 2 * CLIENTS, "connections come and go, a handful at a time"
    if FULL:
        assert meter.slope() <= SLOPE_MIB
