"""Around every request: its id, its count, its entry in the book, and an honest 500 for what nobody foresaw."""

import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model.errors import InvalidRequest
from service.api.errors import describe, error_response
from service.call import Call, attach
from service.logs import current_request
from service.metrics import IngressMetrics
from service.request_book import RequestBook

logger = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
TRACE_RESPONSE = "traceresponse"
SANE_ID = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)
INSANE_ID = InvalidRequest(f"the header {REQUEST_ID} must match {SANE_ID.pattern}", param=REQUEST_ID)


class Envelope:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp, metrics: IngressMetrics, book: RequestBook) -> None:
        self._app = app
        self._metrics = metrics
        self._book = book

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI call."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        # Serve gives every request an id, the client's own if it sent one, and returns it in the answer.
        given = Headers(scope=scope).get(REQUEST_ID)
        sane = given is None or SANE_ID.fullmatch(given) is not None
        call = Call(given if given is not None and sane else uuid.uuid4().hex)
        attach(scope, call)
        current_request.set(call.request_id)
        self._book.open(scope, call)
        status = 0

        async def send_counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._metrics.responded(_route(scope), status)
                if given is None:
                    MutableHeaders(scope=message)[REQUEST_ID] = call.request_id
                if call.trace_response is not None:
                    MutableHeaders(scope=message)[TRACE_RESPONSE] = call.trace_response
            await send(message)

        try:
            if sane:
                await self._app(scope, receive, send_counted)
            else:
                call.failed(INSANE_ID)
                await error_response(INSANE_ID)(scope, receive, send_counted)
        except Exception as error:
            call.failed(error)
            logger.exception("a request failed")
            if not status:
                await error_response(error)(scope, receive, send_counted)
        finally:
            if call.error is not None:
                self._metrics.failed(describe(call.error)[1]["error"]["type"])
            self._book.close(scope, call, _route(scope), status)


def _route(scope: Scope) -> str:
    """The pattern that matched, never the path that was asked for: clients must not create label values."""
    route = scope.get("route")
    return getattr(route, "path", "none")
