"""R7: clients that do not take their tokens. Their neighbours do not notice."""

import asyncio
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import httpx
import pytest

from tests.faults.conftest import FULL, scaled, settled
from tests.faults.streams import Story, body, read
from tests.service.conftest import Running

pytestmark = [pytest.mark.slow, pytest.mark.faults]

NORMAL, OTHERS = 8, 32
REQUESTS, TOKENS = 5, 40  # of each normal client, one after the other: one moment would say little


@contextmanager
def readers(running: Running, kind: str) -> Iterator[None]:
    """Other clients, `slow` or `quick`, that have asked; they leave at the end."""
    command = [sys.executable, "-m", "tests.faults.readers", running.url, running.model, str(OTHERS), kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "asked\n"
            yield
        finally:
            process.kill()


def pace(stories: list[Story]) -> tuple[float, float]:
    """Medians of the times to the first token and between tokens."""
    first = [story.arrivals[0] - story.asked_at for story in stories]
    between = [later - earlier for story in stories for earlier, later in pairwise(story.arrivals)]
    return statistics.median(first), statistics.mean(between)


async def ask_again_and_again(client: httpx.AsyncClient, model: str, number: int) -> list[Story]:
    """One normal client."""
    return [await read(client, body(model, 100 * number + turn, TOKENS)) for turn in range(REQUESTS)]


async def test_slow_readers_do_not_slow_the_others(service: Running) -> None:
    """Measured against as many readers who take all at once: the engine computes for both alike. Where one stream's
    full buffer holds up the channel that all share, everybody waits for the slowest.
    """

    async def beside(kind: str) -> tuple[float, float]:
        with readers(service, kind):
            async with httpx.AsyncClient(base_url=service.url, timeout=120) as client:
                await asyncio.to_thread(service.wait_for, "attendant_num_requests_running", OTHERS)
                told = await asyncio.gather(*(ask_again_and_again(client, service.model, n) for n in range(NORMAL)))
        await settled(service, 20)
        stories = [story for stories in told for story in stories]
        assert [story for story in stories if not story.is_whole] == []
        return pace(stories)

    turns: dict[str, list[tuple[float, float]]] = {"quick": [], "slow": []}
    for turn in range(scaled(1, 8)):  # in changing order, so that what else happens on the machine hits both alike
        for kind in ("quick", "slow") if turn % 2 == 0 else ("slow", "quick"):
            turns[kind].append(await beside(kind))
    (ttft, tpot), (slow_ttft, slow_tpot) = (
        [statistics.median(column) for column in zip(*turns[kind], strict=True)] for kind in ("quick", "slow")
    )
    print(
        f"beside slow readers TTFT {1000 * slow_ttft:.1f} ms, TPOT {1000 * slow_tpot:.2f} ms; "
        f"beside quick ones {1000 * ttft:.1f} and {1000 * tpot:.2f}: "
        f"{slow_ttft / ttft:.2f} and {slow_tpot / tpot:.2f} times"
    )
    if FULL:
        assert slow_ttft <= 1.1 * ttft
        assert slow_tpot <= 1.1 * tpot
