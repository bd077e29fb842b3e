"""A stream is timed by its chunks of text, and one that is not complete is refused."""

import itertools
import json

import pytest

from loadtest.stream import Completion, StreamError, read_stream

pytestmark = pytest.mark.fast


def event(**chunk: object) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n"


def text(text: str, **more: object) -> bytes:
    return event(choices=[{"index": 0, "text": text, **more}])


def delta(**delta: str) -> bytes:
    return event(choices=[{"index": 0, "delta": delta}])


USAGE = event(choices=[], usage={"prompt_tokens": 5, "completion_tokens": 4})
DONE = b"data: [DONE]\n"


def read(lines: list[bytes], **options: object) -> Completion:
    """Read lines that arrive one second apart, the first at second 1."""
    clock, arriving = itertools.count(1.0), iter([*lines, b""])
    return read_stream(lambda: next(arriving), clock=lambda: next(clock), **options)  # type: ignore[arg-type]


def test_a_chunk_without_text_is_no_token():
    completion = read(
        [delta(role="assistant", content=""), b"\n", delta(content="a"), delta(content="b c"), USAGE, DONE]
    )
    assert (completion.arrivals, completion.gaps, completion.ended) == ([2.0, 3.0], [1.0], 5.0)
    assert (completion.text, completion.finished) == ("ab c", True)


def test_time_per_output_token_divides_by_the_tokens_after_the_first():
    assert read([text("a"), text("b"), USAGE, DONE]).tpot == pytest.approx((4.0 - 1.0) / 3)


def test_a_completion_of_one_token_has_no_time_per_output_token():
    assert read([text("a"), event(choices=[], usage={"prompt_tokens": 5, "completion_tokens": 1}), DONE]).tpot is None


def test_thoughts_of_a_reasoning_model_are_text_that_its_reader_waits_for():
    assert read([delta(reasoning_content="hm"), delta(content="a"), USAGE, DONE]).arrivals == [1.0, 2.0]


def test_the_reason_of_the_end_is_kept():
    assert read([text("a"), text("b", finish_reason="stop"), USAGE, DONE]).finish_reason == "stop"


def test_a_reader_may_leave_after_some_chunks():
    completion = read([text("a"), text("b"), text("c")], leave_after=2)
    assert (completion.arrivals, completion.ended, completion.finished) == ([1.0, 2.0], 2.0, False)
    assert (completion.usage, completion.tpot) == ({}, None)


def test_a_reader_may_take_its_time_after_each_chunk():
    pauses: list[None] = []
    read([text("a"), text("b"), USAGE, DONE], on_chunk=lambda: pauses.append(None))
    assert len(pauses) == 2


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([text("a"), USAGE], "without \\[DONE\\]"),
        ([text("a"), DONE], "no usage"),
        ([USAGE, DONE], "no text"),
        ([text("a"), event(error={"message": "replica lost"}), DONE], "replica lost"),
        ([b"data: {oops\n"], "not JSON: {oops"),
        ([b"data: 3\n"], "not an object: 3"),
    ],
)
def test_a_stream_that_is_not_complete_is_an_error(lines, words):
    with pytest.raises(StreamError, match=words):
        read(lines)
