"""What a request body may say. A field is honoured, or refused by name: nothing is accepted and ignored.

Three kinds of fields: those declared on the models below are honoured; those in `NO_OP_VALUES` are known but not
done, and pass only with a value that asks for nothing; any other is unknown. Types are strict: `true` is no integer.
"""

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from model.errors import InvalidRequest

MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256

# For each field of the OpenAI schema (and of other servers) that is not done here: the values that ask for nothing.
NO_OP_VALUES: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "cache_salt": (),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "metadata": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "priority": (0,),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "prompt_logprobs": (),
    "reasoning_effort": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "stop_token_ids": ([],),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (),
    "verbosity": (),
    "web_search_options": (),
}

# Fields of several forms, in words: pydantic would complain about one of the forms at random.
FORMS = {
    "prompt": "a string, a list of strings, a list of token ids, or a list of such lists",
    "stop": f"a string of 1 to {MAX_STOP_LENGTH} characters, or a list of at most {MAX_STOP_STRINGS} of them",
}

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


class Strict(BaseModel):
    """No coercion, no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class StreamOptions(Strict):
    """`include_usage`: one last chunk that counts the tokens."""

    include_usage: bool | None = None


class SamplingFields(Strict):
    """What both endpoints share. `None` means the default, as it does for OpenAI.

    `model` may be left out: a service has one. `user` is metadata for the operator and has no effect, as with OpenAI.
    `deadline_ms`, or the header `X-Request-Deadline-Ms`: milliseconds from the request's arrival until it must be
    over; what is then not finished ends with an error, and what has not begun never does.
    """

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    user: str | None = None
    deadline_ms: Annotated[int, Field(ge=0, le=24 * 3600 * 1000)] | None = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options is only for stream: true", param="stream_options")
        return self

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a sequence, whichever way it was sent."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that counts the tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionRequest(SamplingFields):
    """Body of `POST /v1/completions`."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]

    @model_validator(mode="after")
    def _some_prompts(self) -> Self:
        if self.prompt == []:
            raise InvalidRequest("prompt must not be an empty list", param="prompt")
        if len(self.texts) > MAX_CHOICES or len(self.token_prompts) > MAX_CHOICES:
            raise InvalidRequest(f"at most {MAX_CHOICES} prompts are served in one request", param="prompt")
        return self

    @property
    def texts(self) -> list[str]:
        """The prompts one by one, when they came as text."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [prompt for prompt in self.prompt if isinstance(prompt, str)]

    @property
    def token_prompts(self) -> list[list[int]]:
        """The prompts one by one, when they came as token ids."""
        if isinstance(self.prompt, str):
            return []
        lists = [prompt for prompt in self.prompt if isinstance(prompt, list)]
        ids = [token_id for token_id in self.prompt if isinstance(token_id, int)]
        return lists or ([ids] if ids else [])


class TextPart(Strict):
    """A part of a message's content; text is the only kind there is."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """One turn. `developer` is OpenAI's newer word for `system` and means the same."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def for_template(self) -> dict[str, str]:
        """The plain form that a chat template reads."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(SamplingFields):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None

    @model_validator(mode="after")
    def _one_token_limit(self) -> Self:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise InvalidRequest(
                f"max_tokens ({self.max_tokens}) and max_completion_tokens ({self.max_completion_tokens}) mean the "
                "same; send one of them",
                param="max_completion_tokens",
            )
        return self

    @property
    def token_limit(self) -> int | None:
        """The limit under either of its names."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


RequestBody = TypeVar("RequestBody", bound=SamplingFields)


def parse(schema: type[RequestBody], body: object) -> RequestBody:
    """A decoded JSON body as `schema`. Raises `InvalidRequest` that names the field at fault."""
    if not isinstance(body, dict):
        raise InvalidRequest("the body must be a JSON object")
    honoured = {name: value for name, value in body.items() if not _asks_for_nothing(schema, name, value)}
    for name in honoured:
        if name in NO_OP_VALUES and name not in schema.model_fields:
            raise InvalidRequest(f"{name} is not supported here; leave it out", param=name)
    try:
        return schema.model_validate(honoured)
    except ValidationError as error:
        raise _fault(error) from None


def _asks_for_nothing(schema: type[SamplingFields], name: str, value: object) -> bool:
    if name in schema.model_fields or name not in NO_OP_VALUES:
        return False
    if value is None:
        return True
    # `False == 0` in Python, but a penalty of `false` is a wrong type, not a harmless one.
    return any(value == idle and isinstance(value, bool) == isinstance(idle, bool) for idle in NO_OP_VALUES[name])


def _fault(error: ValidationError) -> InvalidRequest:
    """The deepest thing that pydantic found: in a union, the branch that was meant got furthest."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    path, fault = max(((_path(fault["loc"]), fault) for fault in faults), key=lambda found: len(found[0]))
    if fault["type"] == "extra_forbidden":
        return InvalidRequest(f"unknown field: {path}", param=path)
    if fault["type"] == "missing":
        return InvalidRequest(f"{path} is required", param=path)
    field = path.split("[")[0]
    if field in FORMS:
        return InvalidRequest(f"{field} must be {FORMS[field]}", param=field)
    return InvalidRequest(f"{path}: {fault['msg']}", param=path)


def _path(location: tuple[int | str, ...]) -> str:
    """A place in the body as its author would write it: `messages[0].content`, without pydantic's names of types."""
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not path:
            path = step
        elif location[0] in ("messages", "stream_options") and step.isidentifier() and step != "str":
            path += f".{step}"
    return path
