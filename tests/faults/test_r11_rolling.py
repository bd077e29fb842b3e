"""R11 and S7: new weights are loaded under load, replica by replica, and broken ones are not."""

import asyncio
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import STORYTELLER
from tests.faults.conftest import scaled
from tests.faults.streams import Story, body, read
from tests.service.conftest import Running, start, stop

pytestmark = [pytest.mark.slow, pytest.mark.faults]

RATE = 10.0  # streams that begin in a second
TOKENS = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the embedded model, to be changed."""
    return Path(shutil.copytree(STORYTELLER, tmp_path_factory.mktemp("rolling") / "model"))


@pytest.fixture(scope="module")
def running(model: Path) -> Iterator[Running]:
    """A service of its own; the quick one has a single engine, which is the harder case."""
    service = start(model, "--replicas", str(scaled(1, 2)), "--kv-cache-tokens", "16384")
    yield service
    assert stop(service) == 0


def change_weights(model: Path, seed: int) -> None:
    """As whoever deploys should: the old file stays whole for those who have it mapped."""
    tensors = load_file(model / "model.safetensors")
    noise = torch.Generator().manual_seed(seed)
    name = next(name for name in tensors if name.endswith("norm.weight"))
    tensors[name] *= 1 + 0.01 * torch.randn(tensors[name].shape, generator=noise)
    save_file(tensors, model / "new.safetensors", metadata={"format": "pt"})
    (model / "new.safetensors").replace(model / "model.safetensors")


async def reload(running: Running) -> str:
    """Ask for it, and wait for what comes of it."""
    running.process.send_signal(signal.SIGUSR1)
    assert running.process.stdout is not None
    async with asyncio.timeout(120):
        while "loaded anew" not in (line := await asyncio.to_thread(running.process.stdout.readline)):
            assert line, "the service is gone"
    return line


def pids(running: Running) -> set[int]:
    """Of its engines."""
    return {process.pid for process in running.engine_processes()}


async def watch(running: Running, seen: set[int]) -> None:
    """Note every engine that there is, be it for a moment."""
    while True:
        seen |= await asyncio.to_thread(pids, running)
        await asyncio.sleep(0.02)


async def weights(client: httpx.AsyncClient, model: str) -> str:
    """The digest of the weights that answer."""
    request = {"model": model, "prompt": "x", "max_tokens": 1, "receipt": True}
    answer = await client.post("/v1/completions", json=request)
    assert answer.status_code == 200, answer.text
    return answer.json()["receipt"]["weights_sha256"]


class Load:
    """Streams that begin at a steady rate, whatever becomes of the earlier ones."""

    def __init__(self, client: httpx.AsyncClient, model: str) -> None:
        self._client, self._model = client, model
        self._reading: list[asyncio.Task[Story]] = []
        self._arriving = asyncio.create_task(self._arrive())

    async def _arrive(self) -> None:
        began = time.perf_counter()
        while True:
            number = len(self._reading)
            await asyncio.sleep(began + number / RATE - time.perf_counter())
            request = body(self._model, number, TOKENS)
            self._reading.append(asyncio.create_task(read(self._client, request)))

    async def end(self) -> list[Story]:
        self._arriving.cancel()
        return await asyncio.gather(*self._reading)


async def test_new_weights_come_in_under_load_and_no_stream_is_lost(running: Running, model: Path) -> None:
    """Where an old engine is given less time than its streams need, and they do not move, they end in the middle."""
    async with httpx.AsyncClient(base_url=running.url, timeout=60) as client:
        seen = {await weights(client, running.model)}
        load = Load(client, running.model)
        for seed in range(rounds := scaled(1, 5)):
            change_weights(model, seed)
            assert await reload(running) == "loaded anew\n"
            async with asyncio.timeout(60):  # replicas of before may answer until they are gone
                while (digest := await weights(client, running.model)) in seen:
                    pass
            seen.add(digest)
        stories = await load.end()
    assert len(seen) == rounds + 1
    assert len(stories) > RATE * rounds, "a load that ended early shows nothing"
    assert [story for story in stories if not story.is_whole] == []


async def test_broken_weights_are_refused_and_the_old_ones_go_on(running: Running, model: Path) -> None:
    """Deployed without a look at them, they would have Serve start engines in vain, again and again."""
    file = model / "model.safetensors"
    whole = file.read_bytes()
    async with httpx.AsyncClient(base_url=running.url, timeout=60) as client:
        before = await weights(client, running.model)
        engines, seen = pids(running), set()
        watching = asyncio.create_task(watch(running, seen))
        for broken in (whole[: len(whole) // 2], b"\x80\x04" + whole, b"\xff" * 8 + whole[8:]):
            (model / "new.safetensors").write_bytes(broken)
            (model / "new.safetensors").replace(file)
            line = await reload(running)
            assert "not loaded anew" in line
            assert "model.safetensors" in line
            assert await weights(client, running.model) == before
        watching.cancel()
    assert seen <= engines, "nothing was started"
    (model / "new.safetensors").write_bytes(whole)
    (model / "new.safetensors").replace(file)
