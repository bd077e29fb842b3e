"""Calls of tools: the grammar that holds a model to them, the reader that finds them, and both through the API."""

import json
import random
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer

from model.errors import InvalidRequest
from model.sampling.grammar import to_library
from model.text.chat_template import ChatTemplate
from model.text.tokenizer import Tokenizer
from service.api.schemas.chat import ChatRequest
from service.api.schemas.strict import parse
from service.api.tools import BARE, TAGGED, CallDelta, ToolReader, ToolSyntax, plan_tools, read_whole, syntax_of
from tests.conftest import STORYTELLER
from tests.service.live import EOS, events, post, refusal

PET = {
    "type": "object",
    "properties": {"animal": {"enum": ["fox", "owl"]}, "age": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["animal", "age"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "find_pet", "description": "Finds one.", "parameters": PET}},
    {"type": "function", "function": {"name": "stop"}},
]
CALL = '<tool_call>\n{"name": "find_pet", "arguments": {"animal": "fox", "age": 3}}\n</tool_call>'
STOP = '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
LLAMA = '{"name": "find_pet", "parameters": {"animal": "owl", "age": 1}}'
TAGGED_TEMPLATE = ChatTemplate("{{ tools }} Answer in <tool_call></tool_call>. {{ messages }}", {})
BARE_TEMPLATE = ChatTemplate('{{ tools }} Answer {"name": function name, "parameters": values}. {{ messages }}', {})


# The grammar.


@pytest.fixture(scope="module", params=["one token", "spelled out"])
def directory(request: pytest.FixtureRequest, tiny_model: Path) -> Path:
    """A vocabulary that has the marks of a call as tokens, and one that has not."""
    return tiny_model if request.param == "one token" else STORYTELLER


def allows(directory: Path, text: str, template: ChatTemplate = TAGGED_TEMPLATE, **fields: Any) -> bool:
    """Whether the grammar of a chat's answer takes a text, to its end."""
    body = parse(ChatRequest, {"messages": [{"role": "user", "content": "x"}], "tools": TOOLS, **fields})
    tokenizer = Tokenizer.from_directory(directory)
    plan = plan_tools(body, template, tokenizer)
    assert plan is not None
    library = LLTokenizer((directory / "tokenizer.json").read_text(), n_vocab=tokenizer.vocab_size, eos_token=[EOS])
    matcher = LLMatcher(library, to_library(plan.grammar))
    assert not matcher.is_error(), matcher.get_error()
    ids = tokenizer.encode(text, add_special_tokens=False)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.mark.parametrize("text", [CALL, STOP, f"{CALL}\n{STOP}", f"Let me see.\n{CALL}", "Just text.", '{"name": "x"}'])
def test_a_free_answer_is_text_or_calls_or_text_and_then_calls(directory: Path, text: str) -> None:
    assert allows(directory, text)


@pytest.mark.parametrize(
    "text",
    [
        CALL.replace("fox", "cat"),
        CALL.replace("find_pet", "lose_pet"),
        CALL.replace("}}", "}"),
        f"{CALL} and more",
        "See: <tool_call>what",
        STOP.replace("{}", '{"now": 1}'),
    ],
)
def test_a_call_is_well_formed_wherever_it_stands(directory: Path, text: str) -> None:
    assert not allows(directory, text)


def test_a_required_call_leaves_no_room_for_text(directory: Path) -> None:
    assert allows(directory, STOP, tool_choice="required")
    assert not allows(directory, "Just text.", tool_choice="required")
    assert not allows(directory, f"Well. {STOP}", tool_choice="required")


def test_a_named_tool_is_the_only_one(directory: Path) -> None:
    choice = {"type": "function", "function": {"name": "stop"}}
    assert allows(directory, STOP, tool_choice=choice)
    assert not allows(directory, CALL, tool_choice=choice)


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_only_allowed_tools_can_be_called(directory: Path, mode: str) -> None:
    named = {"type": "function", "function": {"name": "stop"}}
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named]}}
    assert allows(directory, STOP, tool_choice=choice)
    assert not allows(directory, CALL, tool_choice=choice)
    assert allows(directory, "Text.", tool_choice=choice) == (mode == "auto")


def test_calls_in_parallel_can_be_forbidden(directory: Path) -> None:
    assert not allows(directory, f"{CALL}\n{STOP}", parallel_tool_calls=False)
    assert allows(directory, CALL, parallel_tool_calls=False)


def test_json_is_asked_for_beside_calls(directory: Path) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "pet", "schema": PET}}
    assert allows(directory, '{"animal": "owl", "age": 2}', response_format=form)
    assert allows(directory, CALL, response_format=form)
    assert not allows(directory, "Just text.", response_format=form)


@pytest.mark.parametrize("text", [LLAMA, "Just text.", '{"other": 1}', 'He said {"name": "x"}'])
def test_a_bare_call_is_known_by_how_it_starts(text: str) -> None:
    assert allows(STORYTELLER, text, BARE_TEMPLATE)
    assert allows(STORYTELLER, text, BARE_TEMPLATE, tool_choice="required") == (text == LLAMA)


def test_a_bare_call_that_is_not_well_formed_is_not_allowed() -> None:
    assert not allows(STORYTELLER, LLAMA.replace("owl", "cat"), BARE_TEMPLATE)


def test_bare_calls_and_json_cannot_be_told_apart() -> None:
    with pytest.raises(InvalidRequest) as refused:
        allows(STORYTELLER, "", BARE_TEMPLATE, response_format={"type": "json_object"})
    assert refused.value.param == "response_format"


@pytest.mark.parametrize("source", ["{{ messages }}", "{{ tools }}", "{{ tools }} <tool_call><function=f>"])
def test_a_template_without_tools_or_with_a_syntax_unknown_here_is_refused(source: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        syntax_of(ChatTemplate(source, {}))
    assert refused.value.param == "tools"


def test_parameters_that_are_no_object_are_refused() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}
    with pytest.raises(InvalidRequest) as refused:
        allows(STORYTELLER, "", tools=[tool])
    assert refused.value.param == "tools"


# The reader.


def pieces(text: str, seed: int) -> list[str]:
    """A text in random pieces."""
    source, rest, cut = random.Random(seed), text, []
    while rest:
        length = source.randint(1, 5)
        cut.append(rest[:length])
        rest = rest[length:]
    return cut


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    ("syntax", "text", "content", "names"),
    [
        (TAGGED, CALL, "", ["find_pet"]),
        (TAGGED, f"Let me <tool see.\n{CALL}\n{STOP}", "Let me <tool see.\n", ["find_pet", "stop"]),
        (TAGGED, "a < b <tool_call>", "a < b <tool_call>", []),
        (TAGGED, '<tool_call>\n{"name": "f', "", []),
        (TAGGED, "no call", "no call", []),
        (BARE, LLAMA, "", ["find_pet"]),
        (BARE, f"He wrote {LLAMA}", f"He wrote {LLAMA}", []),
        (BARE, '{"nam', '{"nam', []),
    ],
)
def test_a_text_in_pieces_is_read_as_it_is_read_whole(
    seed: int, syntax: ToolSyntax, text: str, content: str, names: list[str]
) -> None:
    reader = ToolReader(syntax)
    parts = [part for piece in pieces(text, seed) for part in reader.feed(piece)]
    said = "".join(part for part in parts if isinstance(part, str)) + reader.flush()
    assert said == content
    assert [part.name for part in parts if isinstance(part, CallDelta) and part.name] == names
    whole = read_whole(text, syntax)
    assert (whole.content, [call.name for call in whole.calls]) == (content, names)
    for call in whole.calls:
        streamed = "".join(
            part.arguments for part in parts if isinstance(part, CallDelta) and names[part.index] == call.name
        )
        assert streamed == call.arguments
        json.loads(call.arguments)


def test_braces_and_quotes_inside_arguments_do_not_end_them() -> None:
    arguments = json.dumps({"a": 'x}"\\{', "b": [{"c": "]"}]})
    (call,) = read_whole(f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>', TAGGED).calls
    assert call.arguments == arguments


# Through the API, over a real engine.

MARK = {"tools": TOOLS, "max_tokens": 200, "ignore_eos": False}


def check_calls(calls: list[dict[str, Any]]) -> None:
    for call in calls:
        arguments = json.loads(call["function"]["arguments"])
        jsonschema.validate(arguments, PET if call["function"]["name"] == "find_pet" else {"maxProperties": 0})
        assert call["id"].startswith("call_")
        assert call["type"] == "function"
    assert len({call["id"] for call in calls}) == len(calls) > 0


@pytest.mark.honours("chat.tools", "chat.tool_choice")
@pytest.mark.parametrize("seed", range(3))
async def test_a_required_call_comes_with_arguments_of_its_schema(live: httpx.AsyncClient, seed: int) -> None:
    body = await post(live, "chat", **MARK, tool_choice="required", seed=seed, parallel_tool_calls=False)
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    check_calls(choice["message"]["tool_calls"])


@pytest.mark.honours("chat.tool_choice")
async def test_a_tool_can_be_named(live: httpx.AsyncClient) -> None:
    choice = {"type": "function", "function": {"name": "stop"}}
    body = await post(live, "chat", **MARK, tool_choice=choice, parallel_tool_calls=False)
    (call,) = body["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "stop", "arguments": "{}"}


@pytest.mark.honours("chat.tools", "chat.tool_choice")
async def test_a_free_answer_is_text_until_the_model_calls(live: httpx.AsyncClient, tiny_model: Path) -> None:
    fields = MARK | {"max_tokens": 20, "ignore_eos": False, "temperature": 0}
    (said,) = (await post(live, "chat", **fields))["choices"]
    assert "tool_calls" not in said["message"]
    assert said["message"]["content"]
    mark = Tokenizer.from_directory(tiny_model).token_id("<tool_call>")
    (called,) = (await post(live, "chat", **MARK, logit_bias={str(mark): 100, str(EOS): 100}))["choices"]
    check_calls(called["message"]["tool_calls"])
    assert called["finish_reason"] == "tool_calls"


@pytest.mark.honours("chat.tool_choice")
async def test_without_a_choice_of_tools_the_prompt_has_none(live: httpx.AsyncClient) -> None:
    plain = await post(live, "chat")
    assert (await post(live, "chat", tools=TOOLS, tool_choice="none"))["choices"][0]["message"] == (
        plain["choices"][0]["message"]
    )
    with_tools = await post(live, "chat", **MARK)
    assert with_tools["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"]


@pytest.mark.honours("chat.parallel_tool_calls")
async def test_several_calls_at_once_can_be_forbidden(live: httpx.AsyncClient, tiny_model: Path) -> None:
    newline = Tokenizer.from_directory(tiny_model).encode("\n", add_special_tokens=False)[0]
    fields = {**MARK, "tool_choice": "required", "logit_bias": {str(newline): 100}}
    many = (await post(live, "chat", **fields))["choices"][0]["message"]["tool_calls"]
    one = (await post(live, "chat", **fields, parallel_tool_calls=False))["choices"][0]["message"]["tool_calls"]
    assert len(many) > len(one) == 1


async def test_a_streamed_call_is_the_whole_one(live: httpx.AsyncClient) -> None:
    fields = {**MARK, "tool_choice": "required", "parallel_tool_calls": False, "n": 2}
    whole = (await post(live, "chat", **fields))["choices"]
    chunks = [chunk["choices"][0] for chunk in await events(live, "chat", **fields)]
    for choice in whole:
        own = [chunk for chunk in chunks if chunk["index"] == choice["index"]]
        calls = [call for chunk in own for call in chunk["delta"].get("tool_calls", ())]
        (expected,) = choice["message"]["tool_calls"]
        assert own[0]["delta"]["role"] == "assistant"
        assert calls[0]["function"] == {"name": expected["function"]["name"], "arguments": ""}
        assert calls[0]["id"].startswith("call_")
        assert all(set(call) == {"index", "function"} for call in calls[1:])
        assert "".join(call["function"]["arguments"] for call in calls) == expected["function"]["arguments"]
        assert own[-1]["finish_reason"] == "tool_calls"


async def test_a_call_that_is_cut_short_ends_for_its_length(live: httpx.AsyncClient) -> None:
    (choice,) = (await post(live, "chat", **{**MARK, "max_tokens": 14}, tool_choice="required"))["choices"]
    assert choice["finish_reason"] == "length"


async def test_a_call_and_its_result_are_part_of_the_chat(live: httpx.AsyncClient) -> None:
    (choice,) = (await post(live, "chat", **MARK, tool_choice="required", parallel_tool_calls=False))["choices"]
    (call,) = choice["message"]["tool_calls"]
    messages = [
        {"role": "user", "content": "x"},
        choice["message"],
        {"role": "tool", "tool_call_id": call["id"], "content": "found"},
    ]
    body = await post(live, "chat", messages=messages, **{**MARK, "max_tokens": 4})
    alone = await post(live, "chat", messages=messages[:1], **{**MARK, "max_tokens": 4})
    assert body["usage"]["prompt_tokens"] > alone["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}]}, "tools"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"ignore_eos": True}, "ignore_eos"),
    ],
)
async def test_tools_that_cannot_be_held_to_are_refused(
    live: httpx.AsyncClient,
    fields: dict[str, Any],
    param: str,
) -> None:
    assert await refusal(live, "chat", **{"tools": TOOLS, **fields}) == param
