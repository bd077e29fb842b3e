"""Holds one conversation with the server over HTTP and records how it went.

Latencies are differences of `perf_counter`; only the send itself is told in Unix time, which all workers share.
"""

import json
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import gevent
from gevent import GreenletExit
from locust.contrib.fasthttp import FAILURE_EXCEPTIONS, FastHttpSession, ResponseContextManager

from loadtest.results import Record
from loadtest.stream import Completion, StreamError, read_stream
from loadtest.workload import Conversation, Workload

# What a server says that has no room: too many requests, or no replica to take one.
REFUSALS = (429, 503)

SLOW_BUFFER_BYTES = 4096  # of a slow reader's socket: with the system's own, the kernel would read ahead for it

Keep = Callable[[Record, list[float]], None]


def converse(
    http: FastHttpSession, conversation: Conversation, *, intended: float, fields: dict[str, Any], keep: Keep
) -> None:
    """All turns of a conversation, until one fails or is left. The first is sent now.

    intended: Unix time at which it should have been. fields: added to every body.
    keep: takes the record of each turn, and the gaps between its chunks.
    """
    answers: list[str] = []
    for number, turn in enumerate(conversation.turns):
        if number:
            gevent.sleep(turn.think_seconds)
            intended = time.time()
        record = Record(
            index=conversation.index,
            turn=number,
            kind=conversation.workload.name,
            intended=intended,
            sent=time.time(),
            e2e=0.0,
            outcome="failed",
            max_tokens=turn.max_tokens,
            paced=conversation.workload.read_seconds > 0,
        )
        completion = _ask(http, conversation.path, conversation.request(number, answers) | fields, conversation, record)
        keep(record, completion.gaps)
        if record.outcome != "ok":
            return
        answers.append(completion.text)


def _ask(
    http: FastHttpSession, path: str, body: dict[str, Any], conversation: Conversation, record: Record
) -> Completion:
    """One request. Fills in the record, and says in it what went wrong: raises nothing that a server can cause."""
    completion = Completion()
    started = time.perf_counter()
    headers = {"Accept-Encoding": "identity"}
    try:
        with http.post(path, json=body, headers=headers, stream=True, catch_response=True) as response:
            try:
                completion = _read(response, conversation.workload, record)
                _check(completion, conversation.workload)
                record.outcome = "ok" if completion.finished else "cancelled"
                response.success()
            except (StreamError, ValueError, *FAILURE_EXCEPTIONS) as error:
                record.error = str(error)[:300] or type(error).__name__
                response.failure(error)
            record.e2e = (completion.ended or time.perf_counter()) - started
            # With stream=True Locust's own figure is the time to the headers.
            response.request_meta["response_time"] = 1e3 * record.e2e
    except GreenletExit:
        record.e2e = time.perf_counter() - started
        record.error = "the test ended before the answer did"
    if completion.arrivals:
        record.ttft = completion.arrivals[0] - started
    record.tpot = completion.tpot
    record.chunks = len(completion.arrivals)
    record.prompt_tokens = completion.usage.get("prompt_tokens", 0)
    record.completion_tokens = completion.usage.get("completion_tokens", 0)
    return completion


def _read(response: ResponseContextManager, workload: Workload, record: Record) -> Completion:
    """The answer to one request. Raises `StreamError` for a bad one, `OSError` where the connection broke."""
    if response.status_code == 0:
        raise StreamError(f"no answer: {response.request_meta['exception']!r}")
    if response.status_code != 200:
        record.outcome = "refused" if response.status_code in REFUSALS else "failed"
        record.retry_after = "retry-after" in (response.headers or {})
        raise StreamError(f"status {response.status_code}: {(response.text or '')[:200]}")
    stream = response.stream
    pause = None
    if workload.read_seconds:
        assert stream._sock is not None
        stream._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW_BUFFER_BYTES)
        pause = partial(gevent.sleep, workload.read_seconds)
    try:
        # Not `iter_lines`: it reads blocks of 1,024 bytes and would see the first token late.
        readline = partial(stream.readline, b"\n")
        completion = read_stream(readline, leave_after=workload.cancel_after, on_chunk=pause)
        while completion.finished and readline():
            pass  # the end of the body comes after [DONE]; only then can the connection be used again
    finally:
        stream.release()  # back to the pool, or closed where the body has not ended: so a reader leaves
    return completion


def _check(completion: Completion, workload: Workload) -> None:
    """Raises `StreamError` for an answer that is complete and yet not what was asked for."""
    if workload.json and completion.finish_reason == "stop":
        try:
            json.loads(completion.text)
        except ValueError:
            raise StreamError(f"not JSON, though asked for: {completion.text[:100]}") from None
