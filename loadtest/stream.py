"""Reads one streamed completion and times it as the reader of the text would.

The traps that this file is about: a client that reads in blocks sees the first token only when a block is full; the
role-only first delta of a chat is not a token; a chunk may hold several tokens, so they are counted by `usage`.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

Line = bytes | bytearray


class StreamError(Exception):
    """The stream was not what a completion must look like. Its text says how."""


@dataclass
class Completion:
    """What a stream held, and when. Times are those of the reader's clock.

    arrivals: one for each chunk of text. usage: the server's own count of tokens. finished: False where the reader
    left before the end, and usage is then empty.
    """

    arrivals: list[float] = field(default_factory=list)
    ended: float = 0.0
    finished: bool = False
    text: str = ""
    finish_reason: str = ""
    usage: dict[str, Any] = field(default_factory=dict)

    @property
    def gaps(self) -> list[float]:
        """Seconds between one chunk of text and the next."""
        return [later - earlier for earlier, later in pairwise(self.arrivals)]

    @property
    def tpot(self) -> float | None:
        """Seconds for each token after the first; None for a completion of one token, or one that was left."""
        tokens = self.usage.get("completion_tokens", 0)
        return (self.ended - self.arrivals[0]) / (tokens - 1) if tokens > 1 else None


def read_stream(
    readline: Callable[[], Line],
    *,
    leave_after: int | None = None,
    on_chunk: Callable[[], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Completion:
    """Read server-sent events to their end, or until `leave_after` chunks of text have come.

    readline: returns the next line as soon as it has arrived, and nothing at the end of the body.
    on_chunk: called after each chunk of text; a slow reader takes its time there.
    Raises `StreamError` for an error event, a stream without text, without `usage` or without its `[DONE]`.
    """
    completion = Completion()
    for payload in _events(readline):
        now = clock()
        if payload == "[DONE]":
            completion.ended, completion.finished = now, True
            return _complete(completion)
        chunk = _chunk(payload)
        for choice in chunk.get("choices", ()):
            completion.finish_reason = choice.get("finish_reason") or completion.finish_reason
        if text := "".join(map(_text, chunk.get("choices", ()))):
            completion.arrivals.append(now)
            completion.text += text
            if len(completion.arrivals) == leave_after:
                completion.ended = now
                return completion
            if on_chunk is not None:
                on_chunk()
        completion.usage = chunk.get("usage") or completion.usage
    raise StreamError("the stream ended without [DONE]")


def _events(readline: Callable[[], Line]) -> Iterator[str]:
    while line := readline():
        if line.startswith(b"data:"):
            yield line[5:].decode().strip()


def _chunk(payload: str) -> dict[str, Any]:
    try:
        chunk = json.loads(payload)
    except ValueError:
        raise StreamError(f"an event is not JSON: {payload[:100]}") from None
    if not isinstance(chunk, dict):
        raise StreamError(f"an event is not an object: {payload[:100]}")
    if "error" in chunk:
        error = chunk["error"]
        raise StreamError(f"error event: {error.get('message') if isinstance(error, dict) else error}")
    return chunk


def _text(choice: dict[str, Any]) -> str:
    """What a choice adds to the text, in a completion or in a chat; servers of reasoning models send thoughts apart."""
    delta = choice.get("delta") or {}
    return choice.get("text") or delta.get("content") or delta.get("reasoning_content") or ""


def _complete(completion: Completion) -> Completion:
    if not completion.usage:
        raise StreamError("the stream has no usage chunk, so its tokens cannot be counted")
    if not completion.arrivals:
        raise StreamError("the stream has no text")
    return completion
