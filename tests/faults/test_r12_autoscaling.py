"""R12: engines come and go with the load, and no request notices.

Streams and unary requests go on while the number of replicas goes from one to three and back, on three nodes. A build
that stops a replica with open streams, or sends requests to one that is leaving, shows cut or failed requests; one
whose policy looks at nothing stays at one replica.
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.data_plane import free_port
from tests.faults.conftest import scaled
from tests.service.conftest import Running, stop

pytestmark = [pytest.mark.slow, pytest.mark.faults]

CYCLES = scaled(1, 5)
MAX_TOKENS = 300
MANY, FEW, PLACES = 16, 3, 8  # clients, for three engines and for one; who stays is told something by each that goes
SCALING = {"max_replicas": 3, "up_delay_s": 1, "down_delay_s": 3, "idle_s": 3}
ARGS: dict[str, Any] = {"max_num_seqs": 4, "kv_cache_tokens": 16384, "num_threads": 1, "dtype": "fp32"}
PATIENCE_S = 120  # for a replica to start or to leave, on a machine that has other things to do


@contextmanager
def cluster(kind: str, model: Path, **args: object) -> Iterator[Running]:
    port = free_port()
    words = [kind, str(model), str(port), json.dumps(ARGS | args)]
    command = [sys.executable, "-m", "tests.faults.cluster_service", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line == "ready\n":
            break
    else:
        raise AssertionError("".join(lines[-30:]))
    running = Running(process, f"http://127.0.0.1:{port}", model.name, "")
    try:
        yield running
    finally:
        assert stop(running) == 0


class Crowd:
    """Clients that ask again and again, half of them for streams; each answer must be whole."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.num_served = 0
        self.failures: list[str] = []
        self._client = client
        self._clients: list[tuple[asyncio.Event, asyncio.Task[None]]] = []

    async def resize(self, number: int) -> None:
        """Have so many clients; those that go finish what they have asked for."""
        while len(self._clients) < number:
            leave = asyncio.Event()
            self._clients.append((leave, asyncio.create_task(self._ask_on(leave, len(self._clients) % 2 == 0))))
        leaving, self._clients = self._clients[number:], self._clients[:number]
        for leave, _ in leaving:
            leave.set()
        await asyncio.gather(*(task for _, task in leaving))

    async def _ask_on(self, leave: asyncio.Event, stream: bool) -> None:
        while not leave.is_set():
            try:
                await (self._stream() if stream else self._unary())
            except (httpx.HTTPError, AssertionError) as error:
                self.failures.append(repr(error))
            else:
                self.num_served += 1

    @property
    def _body(self) -> dict[str, Any]:
        return {"prompt": "Once upon a time", "max_tokens": MAX_TOKENS, "ignore_eos": True}

    async def _unary(self) -> None:
        answer = await self._client.post("/v1/completions", json=self._body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == MAX_TOKENS

    async def _stream(self) -> None:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        lines = []
        async with self._client.stream("POST", "/v1/completions", json=self._body | options) as answer:
            assert answer.status_code == 200, await answer.aread()
            lines = [line async for line in answer.aiter_lines() if line]
        assert lines[-1] == "data: [DONE]", lines[-1:]
        last = json.loads(lines[-2].removeprefix("data: "))
        assert "error" not in last, last
        assert last["usage"]["completion_tokens"] == MAX_TOKENS


async def num_replicas(client: httpx.AsyncClient) -> int:
    families = text_string_to_metric_families((await client.get("/metrics")).text)
    return len([s for family in families for s in family.samples if s.name == "attendant_num_requests_running"])


async def until(client: httpx.AsyncClient, is_right: Callable[[int], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not is_right(await num_replicas(client)):
            await asyncio.sleep(0.2)


@asynccontextmanager
async def crowd_at(running: Running) -> AsyncIterator[tuple[Crowd, httpx.AsyncClient]]:
    async with httpx.AsyncClient(base_url=running.url, timeout=PATIENCE_S) as client:
        crowd = Crowd(client)
        yield crowd, client
        await crowd.resize(0)
        assert crowd.failures == []


async def test_replicas_follow_the_load_up_and_down_on_several_nodes_and_no_request_fails(tiny_model: Path) -> None:
    with cluster("fixed", tiny_model, autoscaling=SCALING, replica_cpus=1, max_num_seqs=PLACES) as running:
        async with crowd_at(running) as (crowd, client):
            for _ in range(CYCLES):
                await crowd.resize(MANY)
                await until(client, lambda number: number == 3)
                await crowd.resize(FEW)
                await until(client, lambda number: number == 1)
            print(f"{CYCLES} cycles, {crowd.num_served} requests, {len(crowd.failures)} failed")
            assert crowd.num_served > 20 * CYCLES


async def test_where_there_is_no_room_ray_adds_nodes_for_the_engines_that_the_load_needs(tiny_model: Path) -> None:
    with cluster("growing", tiny_model, autoscaling=SCALING, replica_cpus=1) as running:
        async with crowd_at(running) as (crowd, client):
            await crowd.resize(12)
            await until(client, lambda number: number >= scaled(2, 3))
            await crowd.resize(1)
            await until(client, lambda number: number == 1)


async def test_a_service_that_sleeps_wakes_for_a_request(tiny_model: Path) -> None:
    with cluster("fixed", tiny_model, autoscaling=SCALING | {"min_replicas": 0}) as running:
        async with httpx.AsyncClient(base_url=running.url, timeout=PATIENCE_S) as client:
            for _ in range(scaled(1, 3)):
                async with asyncio.timeout(PATIENCE_S):
                    while running.engine_processes():
                        await asyncio.sleep(0.2)
                assert (await client.get("/ready")).status_code == 200, "asked, it says yes and sleeps on"
                answer = await client.post("/v1/completions", json={"prompt": "Once", "max_tokens": 5})
                assert answer.status_code == 200, answer.text
                assert running.engine_processes()
