"""Server-sent events: the bytes of a stream, and its end, whichever way it comes."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from service.api.errors import describe
from service.completion import Completion, Delta
from service.metrics import IngressMetrics

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def event(body: Mapping[str, object]) -> bytes:
    """One event with a JSON body."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class ChunkWriter:
    """Writes chunks that differ only in a choice's index, text and finish reason.

    The rest of a chunk is encoded once: a stream has one chunk a token, and a pydantic model each would cost more
    than the token does. `before` and `after` are the JSON around the text, inside a choice. `usage` counts the tokens
    in each chunk, for those who ask for that.
    """

    def __init__(
        self,
        envelope: Mapping[str, object],
        before: str,
        after: str,
        *,
        with_usage: bool,
        usage: Callable[[], object] | None = None,
    ) -> None:
        head = json.dumps({**envelope, "choices": []}, ensure_ascii=False, separators=(",", ":"))
        self._head = "data: " + head.removesuffix("]}") + '{"index":'
        self._before = "," + before
        self._after = after + ',"finish_reason":'
        # With `include_usage`, every chunk but the last says that its usage is null.
        self._tail = '}],"usage":null}\n\n' if with_usage else "}]}\n\n"
        self._usage = usage

    def chunk(self, choice: int, text: str | None, finish_reason: str | None) -> bytes:
        """One event. `text=None` writes an empty object in the text's place: a delta that adds nothing."""
        reason = "null" if finish_reason is None else f'"{finish_reason}"'
        body = "{}" if text is None else json.dumps(text, ensure_ascii=False)
        tail = self._tail if self._usage is None else f'}}],"usage":{json.dumps(self._usage())}}}\n\n'
        return f"{self._head}{choice}{self._before}{body}{self._after}{reason}{tail}".encode()


class EventStream(StreamingResponse):
    """Streams a completion. It is closed even when the client left before the first byte."""

    def __init__(
        self,
        completion: Completion,
        metrics: IngressMetrics,
        write: Callable[[list[Delta]], bytes],
        *,
        first: bytes = b"",
        last: Callable[[], Awaitable[bytes]],
        failed: Callable[[Exception], bytes] = lambda error: event(describe(error)[1]),
    ) -> None:
        self._completion = completion
        self._metrics = metrics
        self._ended = False
        self._failed = failed
        self._iterator = self._events(write, first, last)
        super().__init__(self._iterator, media_type="text/event-stream", headers=HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI call; when it ends, whatever the reason, the request's blocks are freed.

        A client that lets too much pile up is cut off: the server closes the connection of an answer that is not whole.
        """
        task = asyncio.current_task()
        assert task is not None
        self._completion.on_overrun(task.cancel)
        try:
            await super().__call__(scope, receive, send)
        except asyncio.CancelledError:
            if not self._completion.is_overrun:
                raise
            task.uncancel()
            logger.warning("a client that did not take its tokens was cut off")
        finally:
            self._completion.close()
            if not self._ended:
                self._metrics.disconnects.inc()
            # A task that was cancelled keeps this frame, an iterator that was not read to its end keeps us, and a task
            # group that was left its error, with our frames: the request would stay until the garbage collector comes.
            del task, self._completion
            await self._iterator.aclose()

    async def stream_response(self, send: Send) -> None:
        """As Starlette does; if it is cancelled, without a word of where that was: see above."""
        try:
            await super().stream_response(send)
        except asyncio.CancelledError as cancelled:
            raise cancelled.with_traceback(None) from None

    def abandon(self) -> None:
        """Nobody is going to call it: its client has left."""
        self._completion.close()

    async def _events(
        self, write: Callable[[list[Delta]], bytes], first: bytes, last: Callable[[], Awaitable[bytes]]
    ) -> AsyncGenerator[bytes, None]:
        try:
            async for deltas in self._completion:
                yield first + write(deltas)
                first = b""
            ending = await last() + DONE
        except Exception as error:
            logger.exception("a stream broke off")
            self._completion.call.failed(error)
            ending = self._failed(error) + DONE
        self._ended = True
        yield ending
