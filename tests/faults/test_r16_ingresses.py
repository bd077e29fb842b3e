"""R16: two ingresses and two engines, each joined with each: what happens at one ingress is no matter of the other's.

With one process for all of HTTP, its death ends every stream and there is nobody to take the next request until it has
been started again.
"""

import asyncio
import signal
import time
from asyncio import Event
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.channel import SILENT_INGRESS_TURNS, TURN_S
from tests.conftest import STORYTELLER
from tests.faults.conftest import scaled
from tests.faults.streams import Story, body, read
from tests.faults.survivors import until
from tests.service.conftest import Running, command_of, start, stop

pytestmark = [pytest.mark.slow, pytest.mark.faults]

STREAMS = 8
TOKENS = 600
PATIENCE_S = 90
GIVEN_UP_S = SILENT_INGRESS_TURNS * TURN_S  # for so long, engines do not know that an ingress is dead


@pytest.fixture(scope="module", params=["haproxy", "default"][: scaled(1, 2)])
def running(request: pytest.FixtureRequest) -> Iterator[Running]:
    options = ["--replicas", "2", "--ingresses", "2", "--kv-cache-tokens", "16384", "--dtype", "bf16"]
    service = start(STORYTELLER, *options, "--data-plane", request.param)
    yield service
    assert stop(service) == 0


@pytest.fixture
async def client(running: Running) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=running.url, timeout=PATIENCE_S) as client:
        yield client


def by_replica(running: Running, name: str, deployment: str = "Ingress") -> dict[str, float]:
    """What each ingress, or each engine, says of a metric, summed over its other labels."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx.get(f"{running.url}/metrics", timeout=20).text):
        for sample in family.samples:
            if sample.name == f"attendant_{name}" and sample.labels["deployment"] == deployment:
                replica = sample.labels["replica"]
                found[replica] = found.get(replica, 0.0) + sample.value
    return found


async def until_whole(running: Running, client: httpx.AsyncClient) -> None:
    """Ask until each of two ingresses has a channel to each of two engines, and each knows of the other."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            await asyncio.gather(*(read(client, body(running.model, number, 8)) for number in range(STREAMS)))
            channels = await asyncio.to_thread(by_replica, running, "open_channels", "Engine")
            served = await asyncio.to_thread(by_replica, running, "generation_tokens_total")
            if list(channels.values()) == [2, 2] and len(served) == 2 and all(served.values()):
                return


def ingress_processes(running: Running) -> list[psutil.Process]:
    return [child for child in running.children() if ":Ingress" in command_of(child)]


async def begin(client: httpx.AsyncClient, requests: list[dict[str, object]]) -> tuple[list[Story], list[asyncio.Task]]:
    """Streams of which each has said something, and what reads them to their ends."""
    stories = [Story() for _ in requests]
    reading = [asyncio.create_task(read(client, *pair)) for pair in zip(requests, stories, strict=True)]
    async with asyncio.timeout(PATIENCE_S):
        while not all(story.text for story in stories):
            await asyncio.sleep(0)
    return stories, reading


async def test_both_ingresses_serve_and_an_engine_that_dies_costs_neither_a_stream(
    running: Running, client: httpx.AsyncClient
) -> None:
    """An ingress that took the other's word for it, or kept no journal of its own, would lose its streams."""
    await until_whole(running, client)
    requests = [body(running.model, number, TOKENS, receipt=True) for number in range(STREAMS)]
    undisturbed = await asyncio.gather(*(read(client, request) for request in requests))
    before = by_replica(running, "generation_tokens_total")
    stories, reading = await begin(client, requests)
    victim, *_ = await asyncio.to_thread(running.engines_at_work)
    victim.send_signal(signal.SIGKILL)
    await asyncio.gather(*reading)
    served = by_replica(running, "generation_tokens_total")
    assert [(story.is_whole, story.text) for story in stories] == [(True, other.text) for other in undisturbed]
    assert all(served[replica] > before[replica] for replica in before), "one ingress did all the work"
    assert any(story.num_moves for story in stories)


async def ask_on(client: httpx.AsyncClient, request: dict[str, object], stories: list[Story], over: Event) -> None:
    """Ask for the same again and again, whatever comes of it."""
    while not over.is_set():
        stories.append(Story())
        await read(client, request, stories[-1])


async def test_an_ingress_that_dies_takes_its_own_streams_and_no_others(
    running: Running, client: httpx.AsyncClient
) -> None:
    """The others go on, the next requests are answered at once, and a new ingress joins all engines.

    The clients ask on until the engines have given the dead one up. Where they gave up the other one with it, its
    streams would say what they should, and have moved; where they waited for the dead one, all would stand still.
    """
    requests = [body(running.model, number, TOKENS, receipt=True) for number in range(STREAMS)]
    undisturbed = [story.text for story in await asyncio.gather(*(read(client, request) for request in requests))]
    for _ in range(scaled(1, 5)):
        await until_whole(running, client)
        told: list[list[Story]] = [[] for _ in requests]
        over = asyncio.Event()
        asking = [asyncio.create_task(ask_on(client, *pair, over)) for pair in zip(requests, told, strict=True)]
        async with asyncio.timeout(PATIENCE_S):
            while not all(stories and stories[0].text for stories in told):
                await asyncio.sleep(0)
        killed_at = time.perf_counter()
        ingress_processes(running)[0].send_signal(signal.SIGKILL)
        asyncio.get_running_loop().call_later(1.5 * GIVEN_UP_S, over.set)
        await asyncio.gather(*asking)

        cut = [story for stories in told for story in stories if not story.is_whole]
        assert 0 < len(cut) < STREAMS, "each ingress had some of them"
        assert all(story.status == 200 and story.answered_at < killed_at for story in cut), cut
        for stories, text in zip(told, undisturbed, strict=True):
            whole = [story for story in stories if story.is_whole]
            assert {story.text for story in whole} == {text}
            assert sum(story.num_moves for story in whole) == 0
            pauses = [later - earlier for story in whole for earlier, later in pairwise(story.arrivals)]
            assert max(pauses) < GIVEN_UP_S / 2
    await until_whole(running, client)


async def unary(client: httpx.AsyncClient, request: dict[str, object]) -> tuple[int, str]:
    """The status, and the text or the error."""
    answer = await client.post("/v1/completions", json=request)
    said = answer.json()
    return answer.status_code, said["choices"][0]["text"] if answer.status_code == 200 else str(said)


@pytest.mark.parametrize("running", ["haproxy"], indirect=True)
async def test_what_an_ingress_had_not_answered_when_it_died_is_answered_by_another(
    running: Running, client: httpx.AsyncClient
) -> None:
    """Where HAProxy asks again only if nobody listens, these are told that the service is restarting."""
    requests = [body(running.model, number, TOKENS, stream=False) for number in range(STREAMS)]
    undisturbed = await asyncio.gather(*(unary(client, request) for request in requests))
    await until_whole(running, client)
    before = by_replica(running, "generation_tokens_total")
    asking = asyncio.gather(*(unary(client, request) for request in requests))
    await until(
        lambda: all(now > before[name] for name, now in by_replica(running, "generation_tokens_total").items()), 60
    )
    assert not asking.done()
    ingress_processes(running)[0].send_signal(signal.SIGKILL)
    assert await asking == undisturbed
    assert {status for status, _ in undisturbed} == {200}
    await until_whole(running, client)
