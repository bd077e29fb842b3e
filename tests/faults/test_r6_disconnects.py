"""R6: clients that leave: while they wait, while their prompt is computed, while they are told."""

import asyncio
import random
from collections.abc import Sequence

import httpx
import pytest

from tests.faults.conftest import FULL, MAX_RUNNING, MAX_WAITING, resident, scaled, settled
from tests.faults.streams import Story, body, read
from tests.service.conftest import Running

pytestmark = [pytest.mark.slow, pytest.mark.faults]

DRIFT_BYTES = 10 << 20
LONG = 800  # tokens
WARM_UP = 4  # rounds


async def leave(reading: Sequence[asyncio.Task[Story]]) -> int:
    """Close their connections."""
    for task in reading:
        task.cancel()
    await asyncio.wait(reading)
    return len(reading)


async def round_of_departures(client: httpx.AsyncClient, small: Running, rng: random.Random) -> int:
    """Some leave the queue, then some leave in the middle of their text, then some with long prompts, at any moment."""

    async def wait_for(name: str, value: float) -> None:
        await asyncio.to_thread(small.wait_for, f"attendant_num_requests_{name}", value)

    def ask(number: int, **fields: object) -> asyncio.Task[Story]:
        return asyncio.create_task(read(client, body(small.model, number, LONG, **fields)))

    telling = [ask(number) for number in range(MAX_RUNNING)]
    await wait_for("running", MAX_RUNNING)
    queued = [ask(number) for number in range(MAX_WAITING // 2)]
    await wait_for("waiting", len(queued))
    left = await leave(queued)
    await wait_for("waiting", 0)
    left += await leave(telling)
    computing = [ask(0, prompt=[rng.randrange(4, 500) for _ in range(150)]) for _ in range(MAX_RUNNING)]
    await asyncio.sleep(rng.uniform(0, 0.05))  # anywhere between the first byte sent and the first token told
    return left + await leave(computing)


async def test_who_leaves_takes_nothing_along(small: Running) -> None:
    """Where dropping the stream's generator was thought to end its call, requests were computed to their end for
    nobody, and HAProxy with `splice-request` never told of a client that had gone.
    """
    computed = small.metrics()["attendant_iteration_tokens_sum"]
    rng, count, rounds, before = random.Random(6), 0, 0, 0
    async with httpx.AsyncClient(base_url=small.url, timeout=60, limits=httpx.Limits(max_connections=100)) as client:
        while count < scaled(150, 1000):
            count += await round_of_departures(client, small, rng)
            rounds += 1
            if rounds == WARM_UP:
                before = resident(small)
    took = await settled(small, scaled(10, 2))
    computed = small.metrics()["attendant_iteration_tokens_sum"] - computed
    assert computed < count * LONG / 2, "most of it was computed for nobody"
    drift = resident(small) - (before or resident(small))
    print(f"{count} left; all blocks free after {took:.2f} s; memory {drift / 2**20:+.1f} MiB")
    if FULL:
        assert drift <= DRIFT_BYTES
