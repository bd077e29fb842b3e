"""The body of `POST /v1/responses`, and the chat that it comes to.

The stateless form: everything that an answer depends on is in the body, and nothing is kept.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from model.errors import InvalidRequest
from service.api.schemas.chat import MAX_MESSAGES, MAX_TOOLS, CallId, ChatRequest, FunctionName
from service.api.schemas.sampling import JsonObjectFormat, NumTop, TextFormat, TokenCount
from service.api.schemas.strict import Body, ListOf, Strict, parse

LOGPROBS = "message.output_text.logprobs"

# What a field of the chat is called here.
NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text",
    "logprobs": "include",
}


class TextItemPart(Strict):
    """A part of a message's content; text is the only kind there is. What an answer had beside it was empty."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: Annotated[ListOf[Any], Field(max_length=0)] | None = None
    logprobs: ListOf[dict[str, Any]] | None = None


ItemContent = str | ListOf[TextItemPart]


class MessageItem(Strict):
    """A message of either side; an earlier answer may come back as it was."""

    type: Literal["message"] | None = None
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: ItemContent

    def for_chat(self) -> dict[str, Any]:
        """The message as a chat has it."""
        return {"role": self.role, "content": _joined(self.content)}


class CallItem(Strict):
    """A call that the assistant made."""

    type: Literal["function_call"]
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    call_id: CallId
    name: FunctionName
    arguments: str

    def for_chat(self) -> dict[str, Any]:
        """The call as a chat's message has it."""
        return {
            "id": self.call_id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


class CallOutputItem(Strict):
    """What a called function answered."""

    type: Literal["function_call_output"]
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    call_id: CallId
    output: ItemContent

    def for_chat(self) -> dict[str, Any]:
        """The message as a chat has it."""
        return {"role": "tool", "content": _joined(self.output), "tool_call_id": self.call_id}


def _kind(item: Any) -> str:
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return kind or "message"


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")],
    Discriminator(_kind),
]


class FunctionTool(Strict):
    """A function that may be called, without the nesting that a chat has."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunctionTool(Strict):
    """This function must be called."""

    type: Literal["function"]
    name: FunctionName


class AllowedFunctionTools(Strict):
    """Only some of the functions may be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[ListOf[NamedFunctionTool], Field(min_length=1, max_length=MAX_TOOLS)]


class JsonSchemaText(Strict):
    """JSON that matches a schema, without the nesting that a chat has."""

    type: Literal["json_schema"]
    name: FunctionName
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class TextOptions(Strict):
    """The form of the answer's text."""

    format: Annotated[TextFormat | JsonObjectFormat | JsonSchemaText, Field(discriminator="type")] | None = None
    verbosity: None = None


class ResponseStreamOptions(Strict):
    """Events are never padded with noise."""

    include_obfuscation: Literal[False] | None = None


class ResponseRequest(Body):
    """Body of `POST /v1/responses`. `metadata` comes back with the answer, and is not kept."""

    no_op: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "access_programs": (),
        "background": (False,),
        "background_options": (),
        "context_management": (),
        "conversation": (),
        "image": (),
        "max_tool_calls": (),
        "moderation": (),
        "previous_response_id": (),
        "prompt": (),
        "prompt_cache_key": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": (),
        "reasoning": ({},),
        "safety_identifier": (),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "truncation": ("disabled",),
    }

    input: str | Annotated[ListOf[Item], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: TokenCount | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    text: TextOptions | None = None
    tools: Annotated[ListOf[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunctionTool | AllowedFunctionTools | None = None
    parallel_tool_calls: bool | None = None
    include: Annotated[ListOf[Literal["message.output_text.logprobs"]], Field(max_length=1)] | None = None
    top_logprobs: NumTop | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = None
    user: str | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None

    def as_chat(self) -> ChatRequest:
        """The chat that this comes to. Raises `InvalidRequest` in this body's own words."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options is only for stream: true", param="stream_options")
        if self.top_logprobs is not None and not self.include:
            raise InvalidRequest(f"top_logprobs is only for include: [{LOGPROBS!r}]", param="top_logprobs")
        if self.include and self.tools and self.tool_choice != "none":
            raise InvalidRequest("log-probabilities are of text; with tools leave include out", param="include")
        chat = {
            "messages": self._messages(),
            "max_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "response_format": self._response_format(),
            "tools": [_nested(tool) for tool in self.tools] if self.tools else None,
            "tool_choice": self._tool_choice(),
            "parallel_tool_calls": self.parallel_tool_calls,
            "logprobs": True if self.include else None,
            "top_logprobs": self.top_logprobs,
            "stream": self.stream,
        }
        try:
            return parse(ChatRequest, chat)
        except InvalidRequest as error:
            raise in_own_words(error) from None

    def _messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if self.instructions is not None:
            messages.append({"role": "developer", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        for item in self.input:
            if not isinstance(item, CallItem):
                messages.append(item.for_chat())
            elif messages and messages[-1]["role"] == "assistant":  # calls go with what was said before them
                messages[-1].setdefault("tool_calls", []).append(item.for_chat())
            else:
                messages.append({"role": "assistant", "content": None, "tool_calls": [item.for_chat()]})
        return messages

    def _response_format(self) -> dict[str, Any] | None:
        form = self.text.format if self.text is not None else None
        if isinstance(form, JsonSchemaText):
            schema = form.model_dump(by_alias=True, exclude={"type"})
            return {"type": "json_schema", "json_schema": schema}
        return None if form is None else form.model_dump()

    def _tool_choice(self) -> str | dict[str, Any] | None:
        match self.tool_choice:
            case NamedFunctionTool(name=name):
                return _named(name)
            case AllowedFunctionTools(mode=mode, tools=tools):
                allowed = {"mode": mode, "tools": [_named(tool.name) for tool in tools]}
                return {"type": "allowed_tools", "allowed_tools": allowed}
            case other:
                return other


def in_own_words(error: InvalidRequest) -> InvalidRequest:
    """A refusal of the chat that a response comes to, naming the field that the client sent."""
    field = (error.param or "").replace("[", ".").split(".")[0]
    if field in NAMES:
        error.param = NAMES[field]
    return error


def _joined(content: ItemContent) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _nested(tool: FunctionTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude={"type"})}


def _named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}
