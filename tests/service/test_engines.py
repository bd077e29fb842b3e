import asyncio
from types import SimpleNamespace

import pytest

from service.engines import Engines


async def test_a_call_that_does_not_let_itself_be_cancelled_is_given_up_in_time() -> None:
    let_go, asked = asyncio.Event(), asyncio.Event()

    async def hang() -> None:
        try:
            await let_go.wait()
        except asyncio.CancelledError:
            asked.set()
            await let_go.wait()

    engines = Engines(SimpleNamespace(ping=SimpleNamespace(remote=hang)))  # type: ignore[arg-type]
    async with asyncio.timeout(5):
        with pytest.raises(TimeoutError):
            await engines.call("ping", timeout_s=0.01)
        await asked.wait()
        assert engines._tasks, "it is still being cancelled"
    let_go.set()
