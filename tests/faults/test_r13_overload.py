"""R13: ten times what can be done is asked. Who is let in is served as well as ever, the others hear so at once."""

import asyncio
import time
from collections import Counter
from dataclasses import dataclass

import pytest

from tests.faults.asking import Answer, Asker
from tests.faults.conftest import FULL, MAX_RUNNING, MAX_WAITING, scaled, settled
from tests.faults.streams import body
from tests.service.conftest import Running

pytestmark = [pytest.mark.slow, pytest.mark.faults]

# Long ones, so that ten times what the engine can do is not more than two cores can refuse, clients and all.
TOKENS = scaled(384, 768)
SECONDS = scaled(3, 20)
ROUNDS = scaled(1, 5)
OVERLOAD = 10
PATIENCE_MS = 50


@dataclass
class Load:
    """Requests at a steady rate, and what came of them.

    served: as many requests as were computed until the last one was asked, parts of one counted as such. What the queue
    still holds then is served without overload.
    client_ms: processor time of this process for each request, on the cores that it shares.
    """

    answers: list[Answer]
    seconds: float
    served: float
    client_ms: float


async def ask_once(client: Asker, model: str, number: int) -> Answer:
    return await client.post("/v1/completions", body(model, number, TOKENS, stream=False))


async def generated(running: Running) -> float:
    """Tokens of all answers so far."""
    return (await asyncio.to_thread(running.metrics))["attendant_generation_tokens_total"]


async def peak_of(client: Asker, model: str) -> float:
    """Requests a second when there is always something to do, and never too much."""

    async def ask(number: int) -> int:
        return sum([(await ask_once(client, model, number)).status == 200 for _ in range(ROUNDS)])

    began = time.perf_counter()
    done = sum(await asyncio.gather(*(ask(number) for number in range(2 * MAX_RUNNING))))
    assert done == 2 * MAX_RUNNING * ROUNDS
    return done / (time.perf_counter() - began)


async def offered(client: Asker, running: Running, rate: float, seconds: float) -> Load:
    """Requests at a steady rate, whatever becomes of them."""
    tokens_before = await generated(running)
    reading, began, worked = [], time.perf_counter(), time.process_time()
    # On a slow machine for longer: what the queue takes in must stay the smaller part.
    for number in range(max(int(rate * seconds), 4 * (MAX_RUNNING + MAX_WAITING))):
        await asyncio.sleep(began + number / rate - time.perf_counter())
        reading.append(asyncio.create_task(ask_once(client, running.model, number)))
    worked = time.process_time() - worked
    served = (await generated(running) - tokens_before) / TOKENS
    ended = time.perf_counter()
    return Load(await asyncio.gather(*reading), ended - began, served, 1000 * worked / len(reading))


async def test_an_overloaded_service_says_so_at_once_and_does_its_work(small: Running) -> None:
    """A queue without a bound takes everybody in, and soon serves nobody in time. Where each request asks the engine
    for room, hundreds ask at once, both processes do little else, and a refusal takes seconds.
    """
    async with Asker(small.url) as client:
        peak = await peak_of(client, small.model)
        await settled(small, 20)
        load = await offered(client, small, OVERLOAD * peak, SECONDS)
        await settled(small, 20)
        if FULL:  # machines do not always run at the same speed
            peak = (peak + await peak_of(client, small.model)) / 2
    answers = load.answers
    refused = [answer for answer in answers if answer.status in (429, 503)]
    statuses = Counter(answer.status for answer in answers)
    # 503: no engine took it within ten seconds, on a machine that stands still.
    assert statuses.keys() <= {200, 429, 503}, f"nobody fails: {statuses}"
    assert len(refused) > len(answers) / 2
    assert statuses[200] >= MAX_RUNNING + MAX_WAITING
    assert all(1 <= int(answer.retry_after or 0) <= 600 for answer in refused)
    waits = sorted(answer.answered_at - answer.asked_at for answer in refused)
    p50, p99 = (1000 * waits[int(len(waits) * share)] for share in (0.5, 0.99))
    goodput = load.served / load.seconds / peak  # all that were let in came to their end
    print(f"peak {peak:.1f}/s, offered {OVERLOAD * peak:.0f}/s: 429 after {p50:.1f} ms p50, {p99:.1f} ms p99")
    print(f"goodput {goodput:.1%} of the peak; the client took {load.client_ms:.2f} ms of a core for each request")
    if FULL:
        assert statuses[503] == 0
        assert p99 <= PATIENCE_MS
        assert goodput >= 0.9
