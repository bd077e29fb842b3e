"""Faults come in two sizes: a quick one inside `make test`, and the whole of it by `make faults`."""

import asyncio
import gc
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service import keys
from service.api.routes import create_api
from service.door import Door
from service.garbage import set_aside
from service.limits import Limits
from tests.conftest import STORYTELLER
from tests.faults.sabotage import sabotaged
from tests.service.conftest import Running, command_of, start, stop
from tests.service.fakes import FakeFleet
from tests.service.test_gate import service_with

FULL = os.environ.get("ATTENDANT_FAULTS") == "full"


def scaled(quick: int, full: int) -> int:
    """How many, in this run."""
    return full if FULL else quick


@dataclass
class Answer:
    """What came back, and what it cost in processor time: `stall`, of the event loop's thread between two of its turns;
    `work`, of the whole process.
    """

    status: int = 0
    body: bytes = b""
    stall: float = 0.0
    work: float = 0.0
    headers: dict[bytes, bytes] = field(default_factory=dict)


class InProcess:
    """The HTTP application over a scripted engine, called without a server, so that the loop has nothing else to do."""

    def __init__(self, model: Path, limits: Limits | None = None) -> None:
        self.service = service_with(model, limits or Limits())
        self.api = create_api(self.service, Door())

    @property
    def fleet(self) -> FakeFleet:
        return self.service.dispatcher._engines.handle  # type: ignore[return-value]

    async def post(self, path: str, body: bytes, headers: dict[str, str] | None = None) -> Answer:
        """Send a body in one piece."""
        sent = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "scheme": "http",
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in sent.items()],
        }
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        answer = Answer()

        async def receive() -> Any:
            return messages.pop() if messages else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                answer.status, answer.headers = message["status"], dict(message["headers"])
            answer.body += message.get("body", b"")

        started = time.process_time()
        call = asyncio.create_task(self.api(scope, receive, send))
        async with asyncio.timeout(60):
            while not call.done():
                before = time.thread_time()
                await asyncio.sleep(0.0005)
                answer.stall = max(answer.stall, time.thread_time() - before)
        await call
        answer.work = time.process_time() - started
        return answer


@dataclass
class Guarded:
    """A real service with two keys, and little patience for bodies."""

    running: Running
    keys: tuple[str, str]

    @property
    def address(self) -> tuple[str, int]:
        url = httpx.URL(self.running.url)
        return url.host, url.port or 0

    def client(self, key: int | None = 0) -> httpx.Client:
        headers = {} if key is None else {"authorization": f"Bearer {self.keys[key]}"}
        return httpx.Client(base_url=self.running.url, headers=headers, timeout=60)

    def memory(self) -> int:
        """Bytes of the processes that a client's bytes pass through."""
        names = ("haproxy", ":Ingress", "ray::ProxyActor")
        found = [child for child in self.running.children() if any(name in command_of(child) for name in names)]
        assert len(found) >= 2
        return sum(process.memory_info().rss for process in found)

    def logs(self) -> Path:
        """Where Ray and all of its processes write theirs."""
        words = " ".join(word for child in self.running.children() for word in child.cmdline())
        found = re.search(r"/tmp/ray/session_[0-9_-]+", words)
        assert found
        return Path(found[0]) / "logs"


# A service that is soon full: what one test needs many requests for, a few do here.
MAX_RUNNING, MAX_WAITING = 8, 24
MAX_UNREAD, MAX_ATTENTION = 256, 2048
BUSY = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_ratio")


@pytest.fixture(scope="session")
def small(served_model: Path) -> Iterator[Running]:
    running = start(
        served_model,
        *("--max-num-seqs", str(MAX_RUNNING), "--max-waiting", str(MAX_WAITING), "--kv-cache-tokens", "16384"),
        *("--max-backlog-tokens", "100000"),
        *("--limit", f"max_unread_tokens={MAX_UNREAD}", "--limit", f"max_attention_weights={MAX_ATTENTION}"),
    )
    yield running
    assert stop(running) == 0


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two replicas that may be killed, in the arithmetic in which a resumed stream is the same to the last bit."""
    with sabotaged(tmp_path_factory.mktemp("sabotage")):
        running = start(STORYTELLER, "--replicas", "2", "--kv-cache-tokens", "16384", "--dtype", "bf16")
    yield running
    assert stop(running) == 0


def ours(running: Running) -> list[psutil.Process]:
    """The processes that a request passes through."""
    names = ("haproxy", ":Ingress", ":Engine")
    found = [child for child in running.children() if any(name in command_of(child) for name in names)]
    assert len(found) >= 3
    return found


def resident(running: Running) -> int:
    """Bytes that they hold."""
    return sum(process.memory_info().rss for process in ours(running))


def standing(running: Running) -> dict[str, dict[str, float]]:
    """By engine, what it has to do and what of its cache is held."""
    engines: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(httpx.get(f"{running.url}/metrics", timeout=10).text):
        for sample in family.samples:
            name = sample.name.removeprefix("attendant_")
            if name in BUSY:
                engines.setdefault(sample.labels["replica"], {})[name] = sample.value
    return engines


async def settled(running: Running, seconds: float) -> float:
    """Wait until no request is left and every block is free; how long it took. Fails after `seconds`, or where Serve
    has replaced an engine meanwhile: one that finds a block lost, when it is idle, ends itself, and a new one has lost
    none.
    """
    began = time.perf_counter()
    engines = (await asyncio.to_thread(standing, running)).keys()
    while True:
        now = await asyncio.to_thread(standing, running)
        assert now.keys() >= engines, f"of the engines {set(engines)} some have gone: {set(now)}"
        left = [held for held in now.values() if any(held.values())]
        if not left:
            return time.perf_counter() - began
        assert time.perf_counter() - began < seconds, f"after {seconds} s there is still {left}"


BODY_SECONDS = 2


@pytest.fixture(scope="session")
def guarded(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    pair = (keys.add(file, "one"), keys.add(file, "two"))
    options = ["--api-keys-file", str(file), "--limit", f"max_body_seconds={BODY_SECONDS}", "--kv-cache-tokens", "8192"]
    running = start(tiny_model, *options)
    yield Guarded(running, pair)
    assert stop(running) == 0


@pytest.fixture(scope="module")
def little_garbage() -> Iterator[None]:
    """As in the service's own processes: what the tests before have loaded and left is not gone through meanwhile."""
    set_aside()
    yield
    gc.unfreeze()


@pytest.fixture
def in_process(tiny_model: Path, little_garbage: None) -> Callable[..., InProcess]:
    return lambda **limits: InProcess(tiny_model, Limits(**limits))
