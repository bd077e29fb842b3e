"""Writes docs/compatibility.md: every field of the `openai` package's request types, and what becomes of it here.

The fields are read from the installed package and from our schemas, the proofs from the tests: a test that sees the
effect of a field says so with `@pytest.mark.honours("chat.seed")`. Run it after a change: `make compatibility`.
"""

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import openai
from openai.types import chat as messages
from openai.types import completion_create_params as completions
from openai.types.chat import completion_create_params as chat
from openai.types.responses import response_create_params as responses

from model.errors import InvalidRequest
from service.api.schemas.chat import AssistantMessage, ChatRequest, Instruction, ToolMessage, UserMessage
from service.api.schemas.completions import CompletionRequest
from service.api.schemas.responses import ResponseRequest
from service.api.schemas.strict import Body, Strict, parse

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
DOCUMENT = ROOT / "docs" / "compatibility.md"
ASKING = {"asked": ["for"]}  # no field's way to ask for nothing


class Endpoint(NamedTuple):
    """name: as the marks call it; required: fields without which no body is read."""

    name: str
    path: str
    schema: type[Body]
    fields: tuple[str, ...]
    required: dict[str, Any]


class Message(NamedTuple):
    """A kind of message of a chat: OpenAI's fields, and our schema."""

    role: str
    fields: tuple[str, ...]
    schema: type[Strict]


def fields_of(*variants: type) -> tuple[str, ...]:
    """The fields of a request type, streaming or not."""
    return tuple(sorted({field for variant in variants for field in variant.__annotations__}))


ENDPOINTS = (
    Endpoint(
        "completions",
        "/v1/completions",
        CompletionRequest,
        fields_of(completions.CompletionCreateParamsNonStreaming, completions.CompletionCreateParamsStreaming),
        {"prompt": "x"},
    ),
    Endpoint(
        "chat",
        "/v1/chat/completions",
        ChatRequest,
        fields_of(chat.CompletionCreateParamsNonStreaming, chat.CompletionCreateParamsStreaming),
        {"messages": [{"role": "user", "content": "x"}]},
    ),
    Endpoint(
        "responses",
        "/v1/responses",
        ResponseRequest,
        fields_of(responses.ResponseCreateParamsNonStreaming, responses.ResponseCreateParamsStreaming),
        {"input": "x"},
    ),
)


MESSAGES = (
    Message("system", fields_of(messages.ChatCompletionSystemMessageParam), Instruction),
    Message("developer", fields_of(messages.ChatCompletionDeveloperMessageParam), Instruction),
    Message("user", fields_of(messages.ChatCompletionUserMessageParam), UserMessage),
    Message("assistant", fields_of(messages.ChatCompletionAssistantMessageParam), AssistantMessage),
    Message("tool", fields_of(messages.ChatCompletionToolMessageParam), ToolMessage),
    Message("function", fields_of(messages.ChatCompletionFunctionMessageParam), Strict),
)


def proofs() -> dict[str, list[str]]:
    """Field, as `endpoint.field` -> the tests that see its effect, as `file::test`."""
    found: dict[str, list[str]] = {}
    for file in sorted(HERE.glob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                for field in _honoured(node):
                    found.setdefault(field, []).append(f"{file.name}::{node.name}")
    return found


def _honoured(test: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    for decorator in test.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.honours":
            yield from (ast.literal_eval(argument) for argument in decorator.args)


def refusal(endpoint: Endpoint, field: str) -> InvalidRequest | None:
    """What is said to a body that asks for something in a field."""
    try:
        parse(endpoint.schema, {**endpoint.required, field: ASKING})
    except InvalidRequest as error:
        return error
    return None


def names(schema: type[Body]) -> set[str]:
    """The fields that a schema declares."""
    return set(schema.model_fields)


def write() -> str:
    """The whole document."""
    shown = proofs()
    lines = [
        "# Compatibility",
        "",
        f"Every field of the request types of the `openai` package, {openai.__version__}, read from the package, and",
        "what becomes of it here. *Honoured* names a test that sees its effect; *refused* is a 400 with the field in",
        "`param`. `null` always means the default. `make compatibility` writes this; a test fails when it is out of",
        "date, or when a field has neither a test nor a refusal.",
    ]
    for endpoint in ENDPOINTS:
        ours = sorted(names(endpoint.schema) - set(endpoint.fields))
        lines += ["", f"## `POST {endpoint.path}`", "", "| field | | seen by |", "|---|---|---|"]
        lines += [_row(endpoint, field, shown) for field in endpoint.fields]
        if ours:
            lines += ["", "Beyond OpenAI's:", "", "| field | | seen by |", "|---|---|---|"]
            lines += [_row(endpoint, field, shown) for field in ours]
    return "\n".join([*lines, *_messages()]) + "\n"


def _messages() -> Iterator[str]:
    yield from ("", "## `messages` of a chat", "")
    yield "The same of each message, by its role. Of the parts of a `content`, text is the only kind that is taken."
    yield "A `name` goes to the model's chat template, which does with it what it does."
    columns = tuple(message.role for message in MESSAGES)
    yield from ("", f"| field | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|")
    for field in sorted({field for message in MESSAGES for field in message.fields}):
        yield f"| `{field}` | {' | '.join(_taken(message, field) for message in MESSAGES)} |"


def _taken(message: Message, field: str) -> str:
    if field not in message.fields:
        return ""
    if field not in message.schema.model_fields:
        return "refused"
    is_null_alone = message.schema.model_fields[field].annotation in (None, type(None))
    return "refused but for `null`" if is_null_alone else "honoured"


def _row(endpoint: Endpoint, field: str, shown: dict[str, list[str]]) -> str:
    if field in names(endpoint.schema):
        tests = ", ".join(f"`{test}`" for test in shown.get(f"{endpoint.name}.{field}", ()))
        return f"| `{field}` | honoured | {tests} |"
    idle = endpoint.schema.no_op.get(field)
    taken = ", ".join(f"`{json.dumps(value)}`" for value in idle or ())
    return f"| `{field}` | refused{f' but for {taken}' if taken else ''} | |"


if __name__ == "__main__":
    DOCUMENT.write_text(write())
