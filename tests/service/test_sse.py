import json

import pytest

from service.api.sse import ChunkWriter, event

ENVELOPE = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "tiny"}


def decoded(chunk: bytes) -> dict[str, object]:
    text = chunk.decode()
    assert text.startswith("data: ")
    assert text.endswith("\n\n")
    assert "\n" not in text[:-2], "a newline inside would end the event"
    return json.loads(text.removeprefix("data: "))


@pytest.mark.parametrize("text", ["plain", 'quo"te', "line\nbreak", "back\\slash", "emoji 🦊", "\x00\x1f", "\u2028"])
@pytest.mark.parametrize("reason", [None, "stop"])
@pytest.mark.parametrize("with_usage", [False, True])
def test_a_chunk_is_what_encoding_all_of_it_would_give(text: str, reason: str | None, with_usage: bool) -> None:
    writer = ChunkWriter(ENVELOPE, '"text":', ',"logprobs":null', with_usage=with_usage)
    choice = {"index": 2, "text": text, "logprobs": None, "finish_reason": reason}
    whole = {**ENVELOPE, "choices": [choice], **({"usage": None} if with_usage else {})}
    assert decoded(writer.chunk(2, text, reason)) == whole


def test_a_chunk_without_text_has_an_empty_delta() -> None:
    writer = ChunkWriter(ENVELOPE, '"delta":', ',"logprobs":null', with_usage=False)
    (choice,) = decoded(writer.chunk(0, None, "length"))["choices"]  # type: ignore[misc]
    assert choice == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}


def test_an_event_is_one_line_of_json() -> None:
    assert decoded(event({"text": "a\nb"})) == {"text": "a\nb"}
