"""A client that leaves: the work on its request stops, whatever stage it has reached."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from fastapi import Request
from starlette.responses import Response

from service.metrics import IngressMetrics

CLIENT_CLOSED_REQUEST = 499  # nginx's; nobody receives it, but the count of answers shows it


async def while_connected(request: Request, metrics: IngressMetrics, work: Coroutine[Any, Any, Response]) -> Response:
    """The answer that `work` makes. When the client leaves first, `work` is cancelled.

    The request's body must have been read: after it, the only thing that can arrive is the disconnect.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        metrics.disconnects.inc()
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    except asyncio.CancelledError:  # Serve saw it first
        metrics.disconnects.inc()
        raise
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.wait((working, leaving))


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
