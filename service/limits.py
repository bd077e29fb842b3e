"""What one client may ask for at most: one frozen record, set by the operator, read at the door.

Some of these have a ceiling beyond which they cannot be raised, because the data behind them is sized for it; those
stand in `service.api.schemas` and `model.sampling.params`.
"""

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model.errors import ConfigError, InvalidRequest

if TYPE_CHECKING:
    from service.api.schemas.sampling import GenerationFields

BRACKET = re.compile(r"[()\[\]{}]")

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]


class Limits(BaseModel):
    """Every limit with its default. What exceeds one is refused by name, before anything is allocated for it.

    max_body_bytes: of a request's body (413). max_body_seconds: until it must have arrived whole (408).
    max_header_bytes: of all header lines together (431); HAProxy by itself takes 63 KiB at most.
    max_prompt_tokens: of one prompt; None means what the model's context holds.
    max_choices: `n` times the prompts of one request. max_messages: of one chat.
    max_logprobs, max_stop_strings, max_logit_bias: entries of those fields.
    max_attention_weights: of one token: layers times heads times top_k. Some 90 bytes each until the client takes it.
    max_schema_bytes, max_schema_depth: of a schema or grammar that an output is held to, and of tools.
    max_streams_per_key: requests that one key may have open at once at an ingress, if it has no limit of its own.
    max_unread_tokens: of one request, generated but not yet taken by its client; a slower reader is cut off.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_body_bytes: Count = 1 << 20
    max_body_seconds: Seconds = 10.0
    max_header_bytes: Count = 8 << 10
    max_prompt_tokens: Count | None = None
    max_choices: Annotated[int, Field(ge=1, le=128)] = 128
    max_messages: Annotated[int, Field(ge=1, le=4096)] = 1024
    max_logprobs: Annotated[int, Field(ge=0, le=20)] = 20
    max_stop_strings: Annotated[int, Field(ge=0, le=16)] = 16
    max_logit_bias: Annotated[int, Field(ge=0, le=1024)] = 1024
    max_attention_weights: Annotated[int, Field(ge=0)] = 256
    max_schema_bytes: Annotated[int, Field(ge=1, le=1 << 16)] = 1 << 16
    max_schema_depth: Count = 32
    max_streams_per_key: Count = 256
    max_unread_tokens: Count = 2048

    @classmethod
    def from_texts(cls, texts: Sequence[str]) -> Self:
        """From `name=value` each. Raises `ConfigError`."""
        try:
            return cls.model_validate_strings(dict(text.partition("=")[::2] for text in texts))
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            names = ", ".join(cls.model_fields)
            raise ConfigError(f"limit {fault['loc'][0]}: {fault['msg']}; the limits are {names}") from None

    def check(self, body: "GenerationFields") -> None:
        """Raises `InvalidRequest` naming the field of which there is too much."""
        at_most("best_of" if body.num_candidates > body.num_choices else "n", body.num_candidates, self.max_choices)
        at_most("logprobs", body.num_logprobs or 0, self.max_logprobs)
        at_most("prompt_logprobs", body.num_prompt_logprobs or 0, self.max_logprobs)
        at_most("logit_bias", len(body.logit_bias or ()), self.max_logit_bias)
        if (asked := body.inspection) is not None:
            count = len(asked.layers) * len(asked.heads) * (asked.top_k or 1)
            at_most("attention", count, self.max_attention_weights, "weights a token")
        at_most("stop", len(body.stop_strings), self.max_stop_strings)
        at_most("messages", len(getattr(body, "messages", ())), self.max_messages)
        if (spec := body.grammar) is not None:
            self._check_schema(spec.param, spec.source)
        if tools := getattr(body, "tools", None):
            self._check_schema("tools", json.dumps([tool.function.parameters for tool in tools]))

    def _check_schema(self, field: str, source: str) -> None:
        at_most(field, len(source.encode(errors="replace")), self.max_schema_bytes, "bytes")
        at_most(field, _depth(source), self.max_schema_depth, "levels of brackets")

    def check_prompts(self, prompts: Sequence[Sequence[int]], max_model_len: int) -> None:
        """Raises `InvalidRequest` for a prompt, in tokens, that is too long, before it crosses to an engine."""
        room = max_model_len - 1  # for one more
        limit = room if self.max_prompt_tokens is None else min(room, self.max_prompt_tokens)
        at_most("prompt", max(map(len, prompts)), limit, "tokens")


def _depth(text: str) -> int:
    """How deep the brackets of a schema or grammar are nested; one in a text counts, too."""
    level = deepest = 0
    for bracket in BRACKET.findall(text):
        level += 1 if bracket in "([{" else -1
        deepest = max(deepest, level)
    return deepest


def at_most(field: str, count: int, limit: int, what: str = "") -> None:
    """Raises `InvalidRequest` if `count` exceeds `limit`."""
    if count > limit:
        unit = f" {what}" if what else ""
        raise InvalidRequest(f"{field} has {count}{unit}; at most {limit} are served here", param=field)
