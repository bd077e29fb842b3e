"""What every endpoint that generates has in common: sampling, limits, streaming and the form of the output."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from model.attention.weights import AttentionRequest
from model.errors import InvalidRequest
from model.sampling.params import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_TOKEN_IDS,
    GrammarSpec,
    SamplingParams,
)
from service.api.schemas.strict import Body, ListOf, Strict

MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenCount = Annotated[int, Field(ge=1, lt=2**31)]
Index = Annotated[int, Field(ge=0)]
NumTop = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
TokenIdText = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]

# Fields that a request and `SamplingParams` call the same. What is not sent has the default there.
SAMPLED = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
)


class StreamOptions(Strict):
    """`include_usage`: one last chunk that counts the tokens; with `continuous_usage_stats`, every chunk does.

    Chunks are never padded with noise.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TextFormat(Strict):
    """Free text."""

    type: Literal["text"]


class JsonObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(Strict):
    """A schema and its name. It is held to whether `strict` or not."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class JsonSchemaFormat(Strict):
    """JSON that matches a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Strict):
    """What the whole output has to match, as vLLM's clients write it. Exactly one of them."""

    regex: str | None = None
    choice: Annotated[ListOf[str], Field(min_length=1, max_length=1000)] | None = None
    lark: str | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if sum(value is not None for value in (self.regex, self.choice, self.lark)) != 1:
            raise InvalidRequest(
                "structured_outputs takes exactly one of regex, choice, lark", param="structured_outputs"
            )
        return self

    @property
    def grammar(self) -> GrammarSpec:
        """The one that was given."""
        if self.regex is not None:
            return GrammarSpec("regex", self.regex)
        if self.choice is not None:
            return GrammarSpec("choice", json.dumps(self.choice))
        return GrammarSpec("lark", self.lark or "")


class AttentionFields(Strict):
    """Show with each token where these heads of these layers looked to choose it: the `top_k` heaviest positions."""

    layers: Annotated[ListOf[Index], Field(min_length=1)]
    heads: Annotated[ListOf[Index], Field(min_length=1)]
    top_k: Annotated[int, Field(ge=1)] = 8


class GenerationFields(Body):
    """What all endpoints that generate share. `None` means the default, as it does for OpenAI.

    `user` is a label for the operator and changes nothing, as with OpenAI. `cache_salt`: prompts share their cached
    prefixes only with others of the same salt. `deadline_ms`, or the header `X-Request-Deadline-Ms`: milliseconds from
    the request's arrival until it must be over; what is then not finished ends with an error, and what has not begun
    never does. `receipt`: the answer says where its time went and which weights gave it.
    """

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    logit_bias: (
        Annotated[
            dict[TokenIdText, Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=MAX_LOGIT_BIAS, json_schema_extra={"additionalProperties": False}),
        ]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopString | Annotated[ListOf[StopString], Field(max_length=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: Annotated[ListOf[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    ignore_eos: bool | None = None
    receipt: bool | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    deadline_ms: Annotated[int, Field(ge=0, le=24 * 3600 * 1000)] | None = None
    user: str | None = None
    stream: bool | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a sequence, whichever way it was sent."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def num_choices(self) -> int:
        """How many completions of each prompt come back."""
        return self.n or 1

    @property
    def num_candidates(self) -> int:
        """How many completions of each prompt are written, for the best of them to be chosen."""
        return self.num_choices

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens are reported beside each one; None for no report."""
        return None

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same for each token of the prompt."""
        return None

    @property
    def inspection(self) -> AttentionRequest | None:
        """The attention weights that are shown with each token."""
        return None

    @property
    def grammar(self) -> GrammarSpec | None:
        """What the output is held to."""
        return self.structured_outputs.grammar if self.structured_outputs is not None else None

    def sampling(self, max_tokens: int, seed: int) -> SamplingParams:
        """The engine's parameters for one completion. Raises `InvalidRequest`."""
        asked = {name: value for name in SAMPLED if (value := getattr(self, name)) is not None}
        ranked = self.num_candidates > self.num_choices  # the best is known by its log-probability
        return SamplingParams(
            max_tokens=max_tokens,
            seed=seed,
            top_k=max(0, self.top_k or 0),  # -1 is another server's word for "off"
            logit_bias={int(token_id): bias for token_id, bias in (self.logit_bias or {}).items()},
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logprobs=self.num_logprobs or 0 if ranked else self.num_logprobs,
            prompt_logprobs=self.num_prompt_logprobs,
            **asked,
        )


class ChoiceFields(GenerationFields):
    """What `/v1/completions` and `/v1/chat/completions` share beyond that."""

    max_tokens: TokenCount | None = None
    response_format: ResponseFormat | None = None
    stream_options: StreamOptions | None = None
    attention: AttentionFields | None = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options is only for stream: true", param="stream_options")
        if self.counts_on and not self.include_usage:
            raise InvalidRequest("continuous_usage_stats is only beside include_usage", param="stream_options")
        return self

    @model_validator(mode="after")
    def _one_form_of_output(self) -> Self:
        if self.structured_outputs is not None and json_grammar(self.response_format) is not None:
            raise InvalidRequest(
                "response_format and structured_outputs both say what the output is like; send one of them",
                param="structured_outputs",
            )
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that counts the tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def counts_on(self) -> bool:
        """Whether each of a stream's chunks counts the tokens so far."""
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    @property
    def inspection(self) -> AttentionRequest | None:
        """`attention`, as the engine takes it."""
        if self.attention is None:
            return None
        return AttentionRequest(tuple(self.attention.layers), tuple(self.attention.heads), self.attention.top_k)

    @property
    def grammar(self) -> GrammarSpec | None:
        """What the output is held to."""
        return json_grammar(self.response_format) or super().grammar


def json_grammar(form: TextFormat | JsonObjectFormat | JsonSchemaFormat | None) -> GrammarSpec | None:
    """The grammar of a response format; None for free text. Key order is the schema author's, and is kept."""
    if isinstance(form, JsonObjectFormat):
        return GrammarSpec("json_object")
    if isinstance(form, JsonSchemaFormat):
        return GrammarSpec("json_schema", json.dumps(form.json_schema.schema_ or {}))
    return None
