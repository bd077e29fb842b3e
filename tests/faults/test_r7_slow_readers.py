"""R7: clients that do not take their tokens. Their neighbours do not notice."""

import asyncio
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise

import httpx
import pytest

from tests.faults.conftest import FULL, MAX_ATTENTION, scaled, settled
from tests.faults.readers import ask
from tests.faults.streams import Story, body, read
from tests.service.conftest import Running

pytestmark = [pytest.mark.slow, pytest.mark.faults]

NORMAL, OTHERS = 8, 32
REQUESTS, TOKENS = 5, 40  # of each normal client, one after the other: one moment would say little
# Clients that never read. A token of theirs is some 20 kB: less would fit into the buffers of HAProxy and the system.
STUCK, STUCK_TOKENS = scaled(2, 4), 900
HEAVY = {"layers": [0, 1, 2, 3], "heads": [0, 1, 2, 3], "top_k": MAX_ATTENTION // 16}
PAUSE_S = 5


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


async def ask_again_and_again(client: httpx.AsyncClient, model: str, number: int, tokens: int) -> list[Story]:
    """One normal client."""
    return [await read(client, body(model, 100 * number + turn, tokens)) for turn in range(REQUESTS)]


async def test_slow_readers_do_not_slow_the_others(service: Running) -> None:
    """Measured against as many readers who take all at once: the engine computes for both alike. What these do not take
    fits into the buffers of HAProxy and the system; who asks for more is below.
    """

    async def beside(kind: str) -> tuple[float, float]:
        with readers(service, kind):
            async with httpx.AsyncClient(base_url=service.url, timeout=120) as client:
                await asyncio.to_thread(service.wait_for, "attendant_num_requests_running", OTHERS)
                asking = (ask_again_and_again(client, service.model, n, TOKENS) for n in range(NORMAL))
                told = await asyncio.gather(*asking)
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


async def test_who_never_reads_is_cut_at_a_bound_and_nobody_waits_for_it(small: Running) -> None:
    """Where a full buffer holds up the channel that all share, the others stand still. Where there is no bound, the
    stream is kept whole for somebody who does not take it, and ends as any other.
    """
    stuck = [ask(small.url, body(small.model, n, STUCK_TOKENS, attention=HEAVY)) for n in range(STUCK)]
    try:
        async with httpx.AsyncClient(base_url=small.url, timeout=60) as client:
            await asyncio.to_thread(small.wait_for, "attendant_num_requests_running", STUCK)
            each = STUCK_TOKENS // REQUESTS  # so that they are there for as long
            asking = (ask_again_and_again(client, small.model, n, each) for n in range(NORMAL // 2))
            told = await asyncio.gather(*asking)
        await settled(small, 120)
        heard = [await asyncio.to_thread(all_of, connection) for connection in stuck]
    finally:
        for connection in stuck:
            connection.close()
    stories = [story for stories in told for story in stories]
    pause = max(later - earlier for story in stories for earlier, later in pairwise([story.asked_at, *story.arrivals]))
    sizes = ", ".join(f"{len(content) / 1e6:.1f}" for content in heard)
    print(f"pause of the others {pause:.2f} s; who never read was cut behind {sizes} MB")
    assert [story for story in stories if not story.is_whole] == []
    assert pause < PAUSE_S
    assert all(content.startswith(b"HTTP/1.1 200") for content in heard)
    assert not any(b"[DONE]" in content for content in heard), "a stream that nobody took came to its end"


def all_of(connection: socket.socket) -> bytes:
    """What has been sent to it, until it is closed."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    connection.settimeout(30)
    content = bytearray()
    with suppress(ConnectionResetError):
        while piece := connection.recv(1 << 20):
            content += piece
    return bytes(content)
