"""R5: Serve's controller is killed under load, then its proxy.

A stream that needed the controller would break. Serve's own proxy, with Serve's own period of 10 s between its health
checks, is away for about half a minute; HAProxy comes back sooner by itself.
"""

import asyncio
import signal
import time

import httpx
import pytest

from tests.faults.conftest import scaled
from tests.faults.survivors import same, tell_all, until
from tests.service.conftest import Running, command_of

pytestmark = [pytest.mark.slow, pytest.mark.faults]


TOKENS = 600  # long enough for the controller to be away while they are told
PROXY_BACK_S = 10


def processes(running: Running, *names: str) -> list:
    return [child for child in running.children() if any(name in command_of(child) for name in names)]


async def test_nothing_fails_when_the_controller_dies(fleet: Running) -> None:
    undisturbed = await tell_all(fleet, 8, TOKENS)
    for _ in range(scaled(1, 5)):
        await until(lambda: processes(fleet, "ServeController"), 60)  # the one before it may be away yet

        async def kill() -> None:
            (controller,) = processes(fleet, "ServeController")
            controller.send_signal(signal.SIGKILL)

        assert same(await tell_all(fleet, 8, TOKENS, kill), undisturbed) == 8


async def test_a_killed_proxy_is_back_soon(fleet: Running) -> None:
    for process in processes(fleet, "HAProxyManager", "haproxy -", "ray::ProxyActor"):
        process.send_signal(signal.SIGKILL)
    began = time.perf_counter()
    async with httpx.AsyncClient(timeout=2) as client, asyncio.timeout(60):
        while True:
            try:
                if (await client.get(f"{fleet.url}/health")).status_code == 200:
                    break
            except httpx.HTTPError:
                await asyncio.sleep(0.1)
    away = time.perf_counter() - began
    print(f"the proxy was away for {away:.1f} s")
    assert away < PROXY_BACK_S
    assert [one.is_done for one in await tell_all(fleet, 4, 16)] == [True] * 4
