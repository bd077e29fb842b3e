"""Log-probabilities in OpenAI's two shapes: parallel lists for completions, a list of objects for chats.

There is one entry for each token that `usage` counts, so also for an end-of-sequence token, which has no text.
"""

import codecs
from collections.abc import Iterable
from typing import Any

from model.text.tokenizer import Tokenizer
from service.completion import Entry

LEAST = -9999.0  # OpenAI's word for minus infinity, which JSON does not have


class LogprobsWriter:
    """The entries of one choice of a completion, written piece by piece.

    start: where the first token's text begins in the choice's text.
    """

    def __init__(self, tokenizer: Tokenizer, start: int = 0) -> None:
        self._tokenizer = tokenizer
        self._offset = start
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def write(self, entries: Iterable[Entry]) -> dict[str, list[Any]]:
        """OpenAI's `logprobs` object for these tokens. The sampled token is always among the listed ones."""
        tokens, offsets = [], []
        logprobs: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        for token_id, logprob in entries:
            name = legacy_text(self._tokenizer, token_id)
            tokens.append(name)
            offsets.append(max(0, self._offset))
            self._offset += len(self._utf8.decode(self._tokenizer.token_bytes(token_id)))
            if logprob is None:  # of the first token of a prompt nothing is known
                logprobs.append(None)
                tops.append(None)
            else:
                logprobs.append(_finite(logprob.logprob))
                top = {legacy_text(self._tokenizer, other): _finite(value) for other, value in logprob.top}
                tops.append({name: _finite(logprob.logprob)} | top)
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


def chat_logprobs(tokenizer: Tokenizer, entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """OpenAI's entries for the tokens of a message."""
    return [
        {
            **_token(tokenizer, token_id, logprob.logprob),
            "top_logprobs": [_token(tokenizer, other, value) for other, value in logprob.top],
        }
        for token_id, logprob in entries
        if logprob is not None
    ]


def prompt_logprobs(tokenizer: Tokenizer, entries: Iterable[Entry]) -> list[dict[str, Any] | None]:
    """For each token of a prompt what vLLM's clients read: an object by token id, the token's own first."""
    told: list[dict[str, Any] | None] = []
    for token_id, logprob in entries:
        if logprob is None:
            told.append(None)
            continue
        values = {token_id: logprob.logprob} | dict(logprob.top)
        told.append(
            {
                str(other): {"logprob": _finite(value), "decoded_token": _text(tokenizer, other)}
                for other, value in values.items()
            }
        )
    return told


def legacy_text(tokenizer: Tokenizer, token_id: int) -> str:
    r"""A token by its text, a special one by its name, and one that holds half a character as `bytes:\xe2\x80`."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode() if raw else tokenizer.token_name(token_id)
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token_id)
    return {
        "token": _text(tokenizer, token_id),
        "logprob": _finite(logprob),
        "bytes": list(raw) if raw else None,
    }


def _text(tokenizer: Tokenizer, token_id: int) -> str:
    raw = tokenizer.token_bytes(token_id)
    return raw.decode(errors="replace") if raw else tokenizer.token_name(token_id)


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)
