"""R11 with streams that outlast the time of an engine that is to go: they move, and say what they would have said.

A build that gave up what an engine had left would cut them; one that let an engine wait for them would never be through
with readers who always ask for more.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import httpx
import pytest

from tests.conftest import STORYTELLER
from tests.faults.conftest import scaled
from tests.faults.streams import Story, body, read
from tests.faults.survivors import until
from tests.faults.test_r11_rolling import pids, reload
from tests.faults.test_r12_autoscaling import SCALING, cluster
from tests.service.conftest import Running, start, stop

pytestmark = [pytest.mark.slow, pytest.mark.faults]

READERS, FEW, TOKENS = 24, 6, 900
GRACE_S = 0.1  # of an engine; each stream of the many takes seconds


class Readers:
    """Clients who ask for the same story again and again; each of them must always be told the same."""

    def __init__(self, client: httpx.AsyncClient, model: str) -> None:
        self.told: dict[int, list[Story]] = {}
        self._client, self._model = client, model
        self._reading: list[tuple[asyncio.Event, asyncio.Task[None]]] = []

    @property
    def num_moved(self) -> int:
        """Streams that ended elsewhere than they began."""
        return sum(story.num_moves > 0 for stories in self.told.values() for story in stories)

    async def resize(self, number: int) -> None:
        """Have so many; those that go read to the end."""
        while len(self._reading) < number:
            leave = asyncio.Event()
            self._reading.append((leave, asyncio.create_task(self._read_on(len(self._reading), leave))))
        leaving, self._reading = self._reading[number:], self._reading[:number]
        for leave, _ in leaving:
            leave.set()
        await asyncio.gather(*(task for _, task in leaving))

    async def _read_on(self, number: int, leave: asyncio.Event) -> None:
        request = body(self._model, number, TOKENS, receipt=True)
        while not leave.is_set():
            self.told.setdefault(number, []).append(await read(self._client, request))


@asynccontextmanager
async def readers_of(running: Running) -> AsyncIterator[Readers]:
    """Whose stories are compared at the end with what each was told at first, before anything was done."""
    async with httpx.AsyncClient(base_url=running.url, timeout=120) as client:
        readers = Readers(client, running.model)
        await readers.resize(READERS)
        await readers.resize(0)
        yield readers
        await readers.resize(0)
    stories = [story for told in readers.told.values() for story in told]
    assert [story for story in stories if not story.is_whole] == []
    assert {number: {story.text for story in told} for number, told in readers.told.items()} == {
        number: {told[0].text} for number, told in readers.told.items()
    }
    print(f"{len(stories)} streams, {readers.num_moved} of them moved")


@contextmanager
def fixed(number: int) -> Iterator[Running]:
    options = ["--kv-cache-tokens", "16384", "--dtype", "bf16", "--replicas", str(number)]
    running = start(STORYTELLER, *options, "--engine-drain-seconds", str(GRACE_S))
    yield running
    assert stop(running) == 0


async def replace() -> None:
    """New engines come in, again and again."""
    with fixed(scaled(1, 2)) as running:
        async with readers_of(running) as readers:
            for _ in range(scaled(1, 5)):
                await readers.resize(READERS)
                before, moved = pids(running), readers.num_moved
                assert await reload(running) == "loaded anew\n"
                await until(lambda before=before: not before & pids(running), 60)
                await readers.resize(0)
                assert readers.num_moved > moved, "none outlasted its engine"


async def take_away() -> None:
    """Three engines become one, though each has work; five times.

    With 16 places in each, all readers are a load of 1.5, which wants three; the few that stay are 0.375: for one.
    """
    args = {"dtype": "bf16", "max_num_seqs": 16, "engine_drain_seconds": GRACE_S, "autoscaling": SCALING}
    with cluster("fixed", STORYTELLER, **args) as running:
        async with readers_of(running) as readers:
            for _ in range(5):
                await readers.resize(READERS)
                await until(lambda: len(pids(running)) == 3, 120)
                await readers.resize(FEW)
                await until(lambda: len(pids(running)) == 1, 120)
        assert readers.num_moved > 0, "none outlasted its engine"


@pytest.mark.parametrize("change", [replace, take_away][: scaled(1, 2)])
async def test_streams_that_outlast_their_engine_go_on_as_if_it_had_stayed(
    change: Callable[[], Awaitable[None]],
) -> None:
    await change()
