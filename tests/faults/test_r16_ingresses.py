"""R16: two ingresses and two engines, each joined with each: what happens at one ingress is no matter of the other's.

With one process for all of HTTP, its death ends every stream and there is nobody to take the next request until it has
been started again.
"""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import STORYTELLER
from tests.faults.conftest import scaled
from tests.faults.streams import Story, body, read
from tests.service.conftest import Running, start, stop

pytestmark = [pytest.mark.slow, pytest.mark.faults]

STREAMS = 8
TOKENS = 600
PATIENCE_S = 90


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
    return [child for child in running.children() if ":Ingress" in " ".join(child.cmdline())]


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


async def test_an_ingress_that_dies_takes_its_own_streams_and_no_others(
    running: Running, client: httpx.AsyncClient
) -> None:
    """The others go on, the next requests are answered at once, and a new ingress joins all engines."""
    requests = [body(running.model, number, TOKENS) for number in range(STREAMS)]
    undisturbed = await asyncio.gather(*(read(client, request) for request in requests))
    for _ in range(scaled(1, 5)):
        await until_whole(running, client)
        resumes = running.metrics()["attendant_stream_resumes_total"]
        stories, reading = await begin(client, requests)
        victim = ingress_processes(running)[0]
        victim.send_signal(signal.SIGKILL)
        await asyncio.to_thread(victim.wait, 10)  # until then its port still takes what nobody will answer
        after = [await read(client, body(running.model, number, 8)) for number in range(STREAMS)]
        await asyncio.gather(*reading)

        whole = [(one, other) for one, other in zip(stories, undisturbed, strict=True) if one.is_whole]
        assert 0 < len(whole) < STREAMS, "each ingress had some of them"
        assert [one.text for one, _ in whole] == [other.text for _, other in whole]
        assert [story for story in after if not story.is_whole] == []
        assert running.metrics()["attendant_stream_resumes_total"] <= resumes, "nothing had to move"
    await until_whole(running, client)
