"""What the answers look like, for the document that describes the API. The answers themselves are written by hand.

A test holds the two together: schemathesis validates what comes back against these.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, RootModel


class Answer(BaseModel):
    """Nothing more than what is declared."""

    model_config = ConfigDict(extra="forbid")


class Fault(Answer):
    """Why a request was refused or failed; `param` is the field at fault, where one is."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(Answer):
    """The one shape of every error."""

    error: Fault


class PromptTokensDetails(Answer):
    """Prompt tokens that were found in the cache."""

    cached_tokens: int


class Usage(Answer):
    """Tokens, a prompt's once however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(Answer):
    """Parallel lists, one entry a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One completion. `prompt_logprobs` and `attention` are there for those who ask."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class CompletionAnswer(BaseModel):
    """Answer of `POST /v1/completions`. `receipt` is there for those who ask."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TopLogprob(Answer):
    """A token that might have been."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token that was said."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    """One entry a token."""

    content: list[TokenLogprob]
    refusal: None


class CalledFunction(Answer):
    """A function's name, and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(Answer):
    """A call that the assistant makes."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantAnswer(BaseModel):
    """The assistant's message. `tool_calls` is there where it calls."""

    role: Literal["assistant"]
    content: str | None
    refusal: None


class ChatChoice(BaseModel):
    """One answer to a chat. `attention` is there for those who ask."""

    index: int
    message: AssistantAnswer
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatAnswer(BaseModel):
    """Answer of `POST /v1/chat/completions`. `receipt` is there for those who ask."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ResponseAnswer(BaseModel):
    """Answer of `POST /v1/responses`, with OpenAI's further fields as they were sent."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any]


class TokenizeAnswer(Answer):
    """Answer of `POST /tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeAnswer(Answer):
    """Answer of `POST /detokenize`."""

    prompt: str


class ModelCard(BaseModel):
    """A model that is served here."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(Answer):
    """The models that are served here."""

    object: Literal["list"]
    data: list[ModelCard]


class Status(Answer):
    """A word on how it is."""

    status: str


class Version(Answer):
    """The release."""

    version: str


class Target(Answer):
    """A process that exposes its metrics by itself, in Prometheus' words."""

    targets: list[str]
    labels: dict[str, str]


class Targets(RootModel[list[Target]]):
    """All of them."""
