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


class StreamError(Exception):
    """The stream was not what a completion must look like. Its text says how."""


@dataclass
class Timing:
    """One request. Times are seconds from the moment it was sent.

    gaps: between one chunk of text and the next.
    """

    ttft: float
    e2e: float
    completion_tokens: int
    prompt_tokens: int
    gaps: list[float] = field(default_factory=list)

    @property
    def tpot(self) -> float | None:
        """Seconds for each token after the first; None for a completion of one token."""
        if self.completion_tokens < 2:
            return None
        return (self.e2e - self.ttft) / (self.completion_tokens - 1)


def read_stream(
    readline: Callable[[], bytes | bytearray], started: float, clock: Callable[[], float] = time.perf_counter
) -> Timing:
    """Read server-sent events to their end. `started`: the clock when the request was sent.

    readline: returns the next line as soon as it has arrived, and nothing at the end of the body.
    Raises `StreamError` for an error event, a stream without text, without `usage` or without its `[DONE]`.
    """
    arrivals: list[float] = []
    usage: dict[str, Any] | None = None
    for payload in _events(readline):
        now = clock()
        if payload == "[DONE]":
            return _timing(started, now, arrivals, usage)
        chunk = json.loads(payload)
        if "error" in chunk:
            raise StreamError(f"error event: {chunk['error'].get('message')}")
        if any(map(_text, chunk["choices"])):
            arrivals.append(now)
        usage = chunk.get("usage") or usage
    raise StreamError("the stream ended without [DONE]")


def _events(readline: Callable[[], bytes | bytearray]) -> Iterator[str]:
    while line := readline():
        if line.startswith(b"data:"):
            yield line[5:].decode().strip()


def _text(choice: dict[str, Any]) -> str:
    """What a choice adds to the text, in a completion or in a chat."""
    return choice.get("text") or choice.get("delta", {}).get("content") or ""


def _timing(started: float, ended: float, arrivals: list[float], usage: dict[str, Any] | None) -> Timing:
    if usage is None:
        raise StreamError("the stream has no usage chunk, so its tokens cannot be counted")
    if not arrivals:
        raise StreamError("the stream has no text")
    return Timing(
        ttft=arrivals[0] - started,
        e2e=ended - started,
        completion_tokens=usage["completion_tokens"],
        prompt_tokens=usage["prompt_tokens"],
        gaps=[later - earlier for earlier, later in pairwise(arrivals)],
    )
