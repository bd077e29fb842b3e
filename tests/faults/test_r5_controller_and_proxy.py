"""R5: Serve's controller is killed under load, then its proxy.

A stream that needed the controller would break, and so would a request that came while it is away. Serve's own proxy,
with Serve's own period of 10 s between its health checks, is away for about half a minute; HAProxy comes back sooner by
itself.
"""

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.faults.conftest import scaled
from tests.faults.survivors import Told, same, tell_all, until
from tests.service.conftest import Running, command_of, start, stop

pytestmark = [pytest.mark.slow, pytest.mark.faults]

TOKENS = 600  # long enough for the controller to be away while they are told
FEW_TOKENS = 16
PROXY_BACK_S = 10


def processes(running: Running, *names: str) -> list[psutil.Process]:
    return [child for child in running.children() if any(name in command_of(child) for name in names)]


async def test_nothing_fails_when_the_controller_dies(fleet: Running) -> None:
    undisturbed, short = await tell_all(fleet, 8, TOKENS), await tell_all(fleet, 8, FEW_TOKENS)
    new: list[Told] = []

    async def kill_and_ask() -> None:
        (controller,) = processes(fleet, "ServeController")
        controller.send_signal(signal.SIGKILL)
        new.extend(await tell_all(fleet, 8, FEW_TOKENS))

    for turn in range(scaled(1, 5)):
        await until(lambda: processes(fleet, "ServeController"), 60)  # the one before it may be away yet
        assert same(await tell_all(fleet, 8, TOKENS, kill_and_ask), undisturbed) == 8
        assert same(new[8 * turn :], short) == 8


@pytest.fixture
def plain(served_model: Path) -> Iterator[Running]:
    """Behind Serve's own proxy, not HAProxy."""
    running = start(served_model, "--data-plane", "default", "--kv-cache-tokens", "4096")
    yield running
    assert stop(running) == 0


async def test_a_killed_haproxy_is_back_soon(fleet: Running) -> None:
    await kill_and_wait(fleet, "HAProxyManager", "haproxy -", "ray::ProxyActor")


async def test_a_killed_proxy_of_serves_own_is_back_soon(plain: Running) -> None:
    await kill_and_wait(plain, "ray::ProxyActor")


async def kill_and_wait(running: Running, *names: str) -> None:
    """Kill what stands between clients and ingress; the service must answer again in time."""
    killed = processes(running, *names)
    assert killed
    for process in killed:
        process.send_signal(signal.SIGKILL)
    began = time.perf_counter()
    async with httpx.AsyncClient(timeout=2) as client, asyncio.timeout(60):
        while True:
            try:
                if (await client.get(f"{running.url}/health")).status_code == 200:
                    break
            except httpx.HTTPError:
                await asyncio.sleep(0.1)
    away = time.perf_counter() - began
    print(f"the proxy was away for {away:.1f} s")
    assert away < PROXY_BACK_S
    assert [one.is_done for one in await tell_all(running, 4, FEW_TOKENS)] == [True] * 4
