"""The body of `POST /v1/chat/completions`: messages, tools, and what the sampling fields are called here."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import from_json

from model.errors import InvalidRequest
from service.api.schemas.sampling import ChoiceFields, NumTop, TokenCount
from service.api.schemas.strict import ListOf, Strict

MAX_TOOLS = 128

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
CallId = Annotated[str, Field(min_length=1, max_length=256)]
Name = Annotated[str, Field(min_length=1, max_length=256)]


class TextPart(Strict):
    """A part of a message's content; text is the only kind there is."""

    type: Literal["text"]
    text: str


MAX_MESSAGES = 4096

Content = str | ListOf[TextPart]


def plain(content: Content | None) -> str:
    """Content as one text."""
    if isinstance(content, list):
        return "".join(part.text for part in content)
    return content or ""


class Spoken(Strict):
    """A message of somebody who may have a name. What that changes is up to the model's chat template."""

    name: Name | None = None

    def written(self, role: str, content: Content | None) -> dict[str, Any]:
        """The plain form that a chat template reads."""
        message = {"role": role, "content": plain(content)}
        return message if self.name is None else message | {"name": self.name}


class Instruction(Spoken):
    """What holds for the whole chat. `developer` is OpenAI's newer word for `system` and means the same."""

    role: Literal["system", "developer"]
    content: Content

    def for_template(self) -> dict[str, Any]:
        """The plain form that a chat template reads."""
        return self.written("system", self.content)


class UserMessage(Spoken):
    """What the user says."""

    role: Literal["user"]
    content: Content

    def for_template(self) -> dict[str, Any]:
        """The plain form that a chat template reads."""
        return self.written("user", self.content)


class CalledFunction(Strict):
    """A function's name, and its arguments as JSON text. No text is no arguments: clients send that for a function
    without parameters.
    """

    name: FunctionName
    arguments: str

    def parsed(self) -> Any:
        """The arguments. Raises `ValueError` for what is no JSON."""
        return from_json(self.arguments, allow_inf_nan=False) if self.arguments.strip() else {}


class ToolCall(Strict):
    """A call that the assistant made."""

    id: CallId
    type: Literal["function"]
    function: CalledFunction

    @model_validator(mode="after")
    def _arguments_are_an_object(self) -> Self:
        try:
            arguments = self.function.parsed()
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            raise InvalidRequest("the arguments of a tool call must be a JSON object, as text", param="messages")
        return self

    def for_template(self) -> dict[str, Any]:
        """The plain form that a chat template reads: with arguments as an object."""
        function = {"name": self.function.name, "arguments": self.function.parsed()}
        return {"id": self.id, "type": "function", "function": function}


class AssistantMessage(Spoken):
    """What the assistant said or called. Clients send its answers back whole, with what was empty in them."""

    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: Annotated[ListOf[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[ListOf[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _something_was_said(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise InvalidRequest("an assistant's message needs content or tool_calls", param="messages")
        return self

    def for_template(self) -> dict[str, Any]:
        """The plain form that a chat template reads."""
        message = self.written("assistant", self.content)
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        return message


class ToolMessage(Strict):
    """What a called function answered."""

    role: Literal["tool"]
    content: Content
    tool_call_id: CallId

    def for_template(self) -> dict[str, Any]:
        """The plain form that a chat template reads."""
        return {"role": "tool", "content": plain(self.content), "tool_call_id": self.tool_call_id}


Message = Annotated[Instruction | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(Strict):
    """A function that may be called. Its arguments are held to `parameters`, whether `strict` or not."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool; functions are the only kind there is."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """A function by its name."""

    name: FunctionName


class NamedTool(Strict):
    """This tool must be called."""

    type: Literal["function"]
    function: NamedFunction


class AllowedToolSet(Strict):
    """Some of the tools, and whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[ListOf[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedTools(Strict):
    """Only some of the tools may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedToolSet


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedTools


class ChatRequest(ChoiceFields):
    """Body of `POST /v1/chat/completions`."""

    no_op: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "audio": (),
        "function_call": ("none",),
        "functions": ([],),
        "metadata": ({},),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "prompt_cache_key": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": (),
        "reasoning_effort": (),
        "safety_identifier": (),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "verbosity": (),
        "web_search_options": (),
    }

    messages: Annotated[ListOf[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: TokenCount | None = None
    tools: Annotated[ListOf[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: NumTop | None = None

    @model_validator(mode="after")
    def _tools_to_choose_from(self) -> Self:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise InvalidRequest("two tools have the same name", param="tools")
        if self.tool_choice == "required" and not names:
            raise InvalidRequest("tool_choice asks for a call, and there are no tools", param="tool_choice")
        unknown = [name for name in self.callable_names if name not in names]
        if unknown:
            raise InvalidRequest(f"tool_choice names {unknown[0]}, which is none of the tools", param="tool_choice")
        return self

    @model_validator(mode="after")
    def _one_token_limit(self) -> Self:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise InvalidRequest(
                f"max_tokens ({self.max_tokens}) and max_completion_tokens ({self.max_completion_tokens}) mean the "
                "same; send one of them",
                param="max_completion_tokens",
            )
        return self

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs is only for logprobs: true", param="top_logprobs")
        return self

    @property
    def token_limit(self) -> int | None:
        """The limit under either of its names."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def callable_names(self) -> list[str]:
        """The functions that the assistant may call now."""
        match self.tool_choice:
            case "none":
                return []
            case NamedTool(function=function):
                return [function.name]
            case AllowedTools(allowed_tools=allowed):
                return [tool.function.name for tool in allowed.tools]
        return [tool.function.name for tool in self.tools or ()]

    @property
    def must_call(self) -> bool:
        """Whether a call is all that the assistant may answer with."""
        match self.tool_choice:
            case AllowedTools(allowed_tools=allowed):
                return allowed.mode == "required"
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def num_logprobs(self) -> int | None:
        """`logprobs` and `top_logprobs`: here two fields."""
        return (self.top_logprobs or 0) if self.logprobs else None
