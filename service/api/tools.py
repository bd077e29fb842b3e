"""Tools: what a model may call is told to it by its chat template, held to a grammar, and read back from its text.

A call is written as the model was trained to write it, so the chat template says which of the syntaxes below is its
own. The grammar leaves nothing but the arguments open, and those keep to the tool's JSON Schema: what comes out can be
read by looking for fixed texts, and by counting braces.
"""

import json
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from model.errors import InvalidRequest
from model.sampling.params import GrammarSpec
from model.text.chat_template import ChatTemplate
from model.text.tokenizer import Tokenizer
from service.api.schemas.chat import ChatRequest, Tool
from service.api.schemas.sampling import json_grammar

OPENING = '{"name": "'
JSON_OBJECT = '{"type": "object"}'
NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
# As chat templates write JSON. Bounded white space besides: nothing else makes a model end a run of spaces.
SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class ToolSyntax:
    """How a family of models writes a call: `begin`, an object of a name and of `arguments`, `end`.

    Several calls are divided by a newline where the family knows of several.
    """

    begin: str
    arguments: str
    end: str
    several: bool

    @property
    def start(self) -> str:
        """What every call starts with, and no other text does."""
        return f"{self.begin}\n{OPENING}" if self.begin else OPENING

    @property
    def after_name(self) -> str:
        """What stands between a function's name and its arguments."""
        return f'", "{self.arguments}": '


TAGGED = ToolSyntax("<tool_call>", "arguments", "</tool_call>", several=True)  # Hermes, Qwen 2.5 and 3
BARE = ToolSyntax("", "parameters", "", several=False)  # Llama 3.1 and later


def syntax_of(template: ChatTemplate) -> ToolSyntax:
    """The syntax that a template teaches. Raises `InvalidRequest` where it knows no tools, or a syntax unknown here."""
    if not re.search(r"\btools\b", template.source):
        raise InvalidRequest("this model's chat template knows no tools; leave them out", param="tools")
    if TAGGED.begin in template.source and "<function=" not in template.source:
        return TAGGED
    if '"parameters": ' in template.source:
        return BARE
    raise InvalidRequest("this model's chat template writes tool calls in a way that is not known here", param="tools")


@dataclass(frozen=True)
class ToolPlan:
    """What one chat's tools come to: those the template is told of, and the grammar of the answer."""

    described: list[dict[str, Any]]
    syntax: ToolSyntax
    grammar: GrammarSpec


def plan_tools(body: ChatRequest, template: ChatTemplate, tokenizer: Tokenizer) -> ToolPlan | None:
    """None for a chat in which nothing may be called. Raises `InvalidRequest`."""
    names = body.callable_names
    if not names:
        return None
    if body.structured_outputs is not None:
        raise InvalidRequest(
            "structured_outputs leaves no room for tools; send one of them", param="structured_outputs"
        )
    tools = body.tools or []
    syntax = syntax_of(template)
    called = [tool for tool in tools if tool.function.name in names]
    several = syntax.several and body.parallel_tool_calls is not False
    form = None if body.must_call else json_grammar(body.response_format)
    lark = _lark(syntax, called, tokenizer, several=several, must_call=body.must_call, form=form)
    return ToolPlan([_described(tool) for tool in tools], syntax, GrammarSpec("lark", lark))


def _described(tool: Tool) -> dict[str, Any]:
    """A tool as a template expects it: every key there."""
    function = tool.function
    return {
        "type": "function",
        "function": {
            "name": function.name,
            "description": function.description or "",
            "parameters": function.parameters or NO_ARGUMENTS,
        },
    }


def _lark(
    syntax: ToolSyntax,
    tools: list[Tool],
    tokenizer: Tokenizer,
    *,
    several: bool,
    must_call: bool,
    form: GrammarSpec | None,
) -> str:
    """The grammar: calls alone, or JSON instead of them, or any text that may end in calls.

    A mark that the vocabulary has as one token is that token: spelled out, it is not what the model was trained on.
    """
    newline = '"\\n"' if syntax.begin else ""
    more = ' ("\\n" call)*' if several else ""
    rules = ["%llguidance {}"]
    rules.append(f"call: {_mark(syntax.begin, tokenizer)} body")
    rules.append(f"body: {newline} {json.dumps(OPENING)} function {newline} {_mark(syntax.end, tokenizer)}")
    rules.append("function: " + " | ".join(f"function_{i}" for i in range(len(tools))))
    for i, tool in enumerate(tools):
        name = json.dumps(tool.function.name + syntax.after_name)
        rules.append(f'function_{i}: {name} {_json(_parameters(tool))} "}}"')
    if must_call:
        return "\n".join([*rules, f"start: call{more}"])
    if form is not None:
        if not syntax.begin:
            raise InvalidRequest(
                "this model's tool calls cannot be told from other JSON; leave one of the two out",
                param="response_format",
            )
        return "\n".join([*rules, f"start: call{more} | {_json(json.loads(form.source or JSON_OBJECT))}"])
    rules.append("TEXT: /(.|\\n)*/")
    if not syntax.begin:  # a call is all of the answer, and noticed by how it starts
        rules += ["start: TEXT | seen function", f"seen[lazy]: {json.dumps(OPENING)}"]
    elif tokenizer.token_id(syntax.begin) is not None:
        rules.append(f"start: TEXT | TEXT call{more}")
    else:
        rules += [f"start: TEXT | seen body{more}", f"seen[lazy]: TEXT {json.dumps(syntax.begin)}"]
    return "\n".join(rules)


def _mark(text: str, tokenizer: Tokenizer) -> str:
    if not text:
        return ""
    return text if tokenizer.token_id(text) is not None else json.dumps(text)


def _json(schema: dict[str, Any]) -> str:
    return "%json " + json.dumps(schema | {"x-guidance": SPACING})


def _parameters(tool: Tool) -> dict[str, Any]:
    schema = {"type": "object"} | (tool.function.parameters or NO_ARGUMENTS)
    if schema["type"] != "object":
        raise InvalidRequest(f"the parameters of {tool.function.name} must have the type object", param="tools")
    return schema


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A piece of a call. The first of a call has its id and name; then come its arguments, piece by piece."""

    index: int
    id: str | None
    name: str | None
    arguments: str


class ToolReader:
    """Takes one choice's text apart into content and calls, as it comes.

    num_calls: how many have begun.
    """

    def __init__(self, syntax: ToolSyntax) -> None:
        self.num_calls = 0
        self._syntax = syntax
        self._held = ""
        self._next: Callable[[], str | CallDelta | None] = self._content
        self._braces = Braces()

    def feed(self, text: str) -> list[str | CallDelta]:
        """New text: the content and the pieces of calls in it, in order."""
        self._held += text
        parts = []
        while self._held and (part := self._next()) is not None:
            parts.append(part)
        return parts

    def flush(self) -> str:
        """At the end: content that was held back, for it could have become a call."""
        return self._held if self._next == self._content else ""

    def _content(self) -> str | CallDelta | None:
        """What comes before a call; a part that may be the start of one is held back."""
        start = self._syntax.start
        at = self._held.find(start)
        if at == 0 or (at > 0 and self._syntax.begin):
            self._next = self._name
            return self._take(at, drop=len(start))
        if not self._syntax.begin:  # a call is the whole answer, or there is none
            if start.startswith(self._held):
                return None
            self._next = self._prose
            return self._prose()
        held = min(len(start) - 1, len(self._held))
        while not start.startswith(self._held[len(self._held) - held :]):
            held -= 1
        return self._take(len(self._held) - held) or None

    def _prose(self) -> str:
        return self._take(len(self._held))

    def _name(self) -> CallDelta | None:
        at = self._held.find(self._syntax.after_name)
        if at < 0:
            return None
        name = self._take(at, drop=len(self._syntax.after_name))
        self.num_calls += 1
        self._next, self._braces = self._arguments, Braces()
        return CallDelta(self.num_calls - 1, f"call_{uuid.uuid4().hex[:24]}", name, "")

    def _arguments(self) -> CallDelta:
        end = self._braces.end_in(self._held)
        if end is not None:
            self._next = self._between
        return CallDelta(self.num_calls - 1, None, None, self._take(len(self._held) if end is None else end))

    def _between(self) -> CallDelta | None:
        """Behind a call nothing but another one can follow."""
        at = self._held.find(self._syntax.start)
        if at < 0 or not self._syntax.begin:
            return None
        self._take(at, drop=len(self._syntax.start))
        self._next = self._name
        return self._name()

    def _take(self, end: int, *, drop: int = 0) -> str:
        taken, self._held = self._held[:end], self._held[end + drop :]
        return taken


class Call(NamedTuple):
    """A whole call; `arguments` is JSON text, as OpenAI has it."""

    id: str
    name: str
    arguments: str


class Answer(NamedTuple):
    """A whole text, taken apart."""

    content: str
    calls: list[Call]


def read_whole(text: str, syntax: ToolSyntax) -> Answer:
    """What a `ToolReader` makes of a whole text."""
    reader = ToolReader(syntax)
    content, calls = [], []
    for part in [*reader.feed(text), reader.flush()]:
        if isinstance(part, str):
            content.append(part)
        elif part.name is not None:
            calls.append(Call(part.id or "", part.name, ""))
        else:
            calls[-1] = calls[-1]._replace(arguments=calls[-1].arguments + part.arguments)
    return Answer("".join(content), calls)


class Braces:
    """Finds the end of a JSON object that comes piece by piece."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def end_in(self, text: str) -> int | None:
        """Where the object ends in this piece of it; None if it goes on."""
        for i, character in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "]}":
                self._depth -= 1
                if self._depth == 0:
                    return i + 1
        return None
