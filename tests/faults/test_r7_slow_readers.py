"""R7: clients that do not take their tokens. Their neighbours do not notice."""

import asyncio
import json
import selectors
import socket
import statistics
from itertools import pairwise

import httpx
import pytest

from tests.faults.conftest import FULL, scaled, settled
from tests.faults.streams import Story, body, read
from tests.service.conftest import Running

pytestmark = [pytest.mark.slow, pytest.mark.faults]

NORMAL, SLOW = 8, 32
TOKENS = 200
RECEIVE_BYTES = 4096


def connect_without_reading(running: Running, request: dict[str, object]) -> socket.socket:
    """A client that asks, and then never looks at what comes."""
    url = httpx.URL(running.url)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
    connection.connect((url.host, url.port or 0))
    content = json.dumps(request).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
    )
    connection.sendall(head.encode() + b"\r\n\r\n" + content)
    return connection


def drain(connections: list[socket.socket]) -> None:
    """Read from all of them, at the least cost, until they are closed."""
    with selectors.DefaultSelector() as selector:
        for connection in connections:
            selector.register(connection, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                assert isinstance(key.fileobj, socket.socket)
                if not key.fileobj.recv(1 << 16):
                    selector.unregister(key.fileobj)


def pace(stories: list[Story]) -> tuple[float, float]:
    """Medians of the times to the first token and between tokens."""
    first = [story.arrivals[0] - story.asked_at for story in stories]
    between = [later - earlier for story in stories for earlier, later in pairwise(story.arrivals)]
    return statistics.median(first), statistics.mean(between)


async def test_slow_readers_do_not_slow_the_others(service: Running) -> None:
    """Measured against as many readers who take all at once: the engine computes for both alike. Where one stream's
    full buffer holds up the channel that all share, everybody waits for the slowest.
    """

    async def beside(slow: bool) -> tuple[float, float]:
        sleepers = [
            await asyncio.to_thread(connect_without_reading, service, body(service.model, number, 600))
            for number in range(SLOW)
        ]
        reading = None if slow else asyncio.create_task(asyncio.to_thread(drain, sleepers))
        async with httpx.AsyncClient(base_url=service.url, timeout=120) as client:
            await asyncio.to_thread(service.wait_for, "attendant_num_requests_running", SLOW)
            stories = await asyncio.gather(
                *(read(client, body(service.model, 100 + number, TOKENS)) for number in range(NORMAL))
            )
        for sleeper in sleepers:
            sleeper.shutdown(socket.SHUT_RDWR)
        if reading is not None:
            await reading
        for sleeper in sleepers:
            sleeper.close()
        await settled(service, 20)
        assert [story for story in stories if not story.is_whole] == []
        return pace(stories)

    turns: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for turn in range(scaled(1, 6)):  # in changing order, so that what else happens on the machine hits both alike
        for slow in (False, True) if turn % 2 == 0 else (True, False):
            turns[slow].append(await beside(slow))
    (ttft, tpot), (slow_ttft, slow_tpot) = (
        [statistics.median(column) for column in zip(*turns[slow], strict=True)] for slow in (False, True)
    )
    print(
        f"beside slow readers TTFT {1000 * slow_ttft:.1f} ms, TPOT {1000 * slow_tpot:.2f} ms; "
        f"beside quick ones {1000 * ttft:.1f} and {1000 * tpot:.2f}: "
        f"{slow_ttft / ttft:.2f} and {slow_tpot / tpot:.2f} times"
    )
    if FULL:
        assert slow_ttft <= 1.1 * ttft
        assert slow_tpot <= 1.1 * tpot
