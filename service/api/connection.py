"""A client that leaves: the work on its request stops, whatever stage it has reached."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from fastapi import Request
from starlette.responses import Response

from service.api.sse import EventStream
from service.errors import ServiceError
from service.metrics import IngressMetrics

CLIENT_CLOSED_REQUEST = 499  # nginx's; nobody receives it, but the count of answers shows it


class ClientLeft(ServiceError):  # noqa: N818 - named for what happened
    """The client went before all of its request was here."""

    status = CLIENT_CLOSED_REQUEST
    type = "invalid_request_error"


async def while_connected(request: Request, metrics: IngressMetrics, work: Coroutine[Any, Any, Response]) -> Response:
    """The answer that `work` makes. When the client leaves first, `work` is cancelled.

    The request's body must have been read: after it, the only thing that can arrive is the disconnect.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        has_left = not working.done()
        leaving.cancel()
        working.cancel()
        await asyncio.wait((working, leaving))
        if not has_left:
            return working.result()
        metrics.disconnects.inc()
        working.add_done_callback(_abandon)
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    except asyncio.CancelledError:  # Serve saw it first
        metrics.disconnects.inc()
        working.add_done_callback(_abandon)  # the answer may be there already
        leaving.cancel()
        working.cancel()
        await asyncio.wait((working, leaving))
        raise
    finally:
        del working, leaving  # an error of theirs knows this frame: the two would keep one another


def _abandon(working: "asyncio.Task[Response]") -> None:
    """Free what an answer still holds that nobody will read."""
    if not working.cancelled() and working.exception() is None and isinstance(answer := working.result(), EventStream):
        answer.abandon()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
