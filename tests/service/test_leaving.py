"""A client that leaves, at whatever moment: what it asked for is stopped, counted, and kept by nothing."""

import asyncio
import gc
import json
import logging
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import Request
from starlette.responses import Response

from service.api.connection import while_connected
from service.api.routes import create_api
from service.api.sse import EventStream
from service.channel import Refused
from service.completion import Service
from service.door import Door
from service.limits import Limits
from service.metrics import IngressMetrics
from service.streams import Generation
from tests.service.fakes import FakeFleet
from tests.service.test_dispatch import until
from tests.service.test_gate import service_with

SCOPE = {
    "type": "http",
    "method": "POST",
    "path": "/v1/completions",
    "headers": [(b"content-type", b"application/json")],
    "query_string": b"",
    "http_version": "1.1",
    "scheme": "http",
}


@pytest.fixture
def fleet() -> FakeFleet:
    return FakeFleet("a")


@pytest.fixture
def service(tiny_model: Path, fleet: FakeFleet) -> Service:
    return service_with(tiny_model, Limits(), fleet)


class Client:
    """One ASGI call as a server makes it: sends `body`, a part at a time, and leaves when it is told."""

    def __init__(self, service: Service, *body: bytes, leaves: bool = False) -> None:
        self.left = asyncio.Event()
        self.sent: list[dict[str, Any]] = []
        self.reads = asyncio.Event()
        self.reads.set()
        if leaves:
            self.left.set()
        self._parts = [
            {"type": "http.request", "body": part, "more_body": leaves or i + 1 < len(body)}
            for i, part in enumerate(body)
        ]
        self.task = asyncio.create_task(create_api(service, Door())(dict(SCOPE), self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._parts:
            return self._parts.pop(0)
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        await self.reads.wait()
        self.sent.append(message)

    @property
    def has_text(self) -> bool:
        return any(b"data:" in message.get("body", b"") for message in self.sent)


@pytest.fixture
def generations(service: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[list["weakref.ref[Generation]"]]:
    """Those that were made, without a garbage collector that could let go of them."""
    made: list[weakref.ref[Generation]] = []
    init = Generation.__init__

    def noted(generation: Generation, *args: Any, **kwargs: Any) -> None:
        made.append(weakref.ref(generation))
        init(generation, *args, **kwargs)

    monkeypatch.setattr(Generation, "__init__", noted)
    gc.collect()
    gc.disable()
    yield made
    gc.enable()


def body(stream: bool) -> bytes:
    return json.dumps({"prompt": "x", "stream": stream}).encode()


async def gone(client: Client, made: list["weakref.ref[Generation]"]) -> None:
    del client.task  # which a server forgets, too
    assert len(made) == 1
    await until(lambda: made[0]() is None)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_finished_request_is_kept_by_nothing(
    service: Service, fleet: FakeFleet, generations: list["weakref.ref[Generation]"], stream: bool
) -> None:
    client = Client(service, body(stream))
    await until(lambda: fleet.replicas["a"].submitted)
    fleet.replicas["a"].say(0, 70, finish_reason="length")
    await client.task
    assert client.sent[0]["status"] == 200
    await gone(client, generations)


@pytest.mark.parametrize("how", ["cancelled", "disconnected", "cancelled while it does not read"])
async def test_a_stream_whose_client_has_left_is_kept_by_nothing(
    service: Service, fleet: FakeFleet, generations: list["weakref.ref[Generation]"], how: str
) -> None:
    client = Client(service, body(True))
    await until(lambda: fleet.replicas["a"].submitted)
    fleet.replicas["a"].say(0, 70)
    await until(lambda: client.has_text)
    if how == "disconnected":
        client.left.set()
    else:
        if "read" in how:
            client.reads.clear()
            fleet.replicas["a"].say(0, 70)
            for _ in range(20):  # turns, in which it comes to where it waits
                await asyncio.sleep(0)
        client.task.cancel()
    await asyncio.wait((client.task,))
    await until(lambda: fleet.replicas["a"].aborted)
    await gone(client, generations)


async def test_a_request_that_is_refused_is_kept_by_nothing(
    service: Service, fleet: FakeFleet, generations: list["weakref.ref[Generation]"]
) -> None:
    fleet.replicas["a"].answer = Refused("a", "overloaded", "no")
    client = Client(service, body(True))
    await client.task
    assert client.sent[0]["status"] == 429
    await gone(client, generations)


def disconnects(service: Service) -> float:
    return count(service.metrics, "client_disconnects_total")


def count(metrics: IngressMetrics, name: str) -> float:
    lines = [line for line in metrics.expose().splitlines() if line.startswith(f"attendant_{name}")]
    return sum(float(line.split()[-1]) for line in lines)


async def test_a_client_that_leaves_while_it_sends_its_body_is_no_error_of_ours(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    client = Client(service, b'{"prom', leaves=True)
    await client.task
    assert client.sent[0]["status"] == 499
    assert disconnects(service) == 1
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_a_client_that_leaves_while_it_sends_its_body_is_counted_also_where_the_server_sees_it_first(
    service: Service,
) -> None:
    client = Client(service, b'{"prom', b"")
    client._parts.pop()  # the rest does not come
    for _ in range(20):
        await asyncio.sleep(0)
    client.task.cancel()
    await asyncio.wait((client.task,))
    assert disconnects(service) == 1


@pytest.mark.parametrize("turns", range(4))
async def test_an_answer_that_comes_as_its_client_leaves_is_sent_or_closed(turns: int) -> None:
    """Between the work's end and the answer there are turns of the loop; a cancellation may fall into each."""
    metrics, closed, made = IngressMetrics("tiny"), [], []
    completion = SimpleNamespace(close=lambda: closed.append(True))

    async def last() -> bytes:
        return b""

    async def work() -> Response:
        made.append(EventStream(completion, metrics, lambda deltas: b"", last=last))  # type: ignore[arg-type]
        return made[0]

    async def receive() -> Any:
        await asyncio.Event().wait()

    answering = asyncio.create_task(while_connected(Request(dict(SCOPE), receive), metrics, work()))
    await until(lambda: made)
    for _ in range(turns):
        await asyncio.sleep(0)
    answering.cancel()
    await asyncio.wait((answering,))
    await asyncio.sleep(0)
    assert closed == ([True] if answering.cancelled() else [])
    if turns == 0:
        assert answering.cancelled(), "in the very turn of the work's end it is not sent yet"
