"""`/v1/responses` over a real engine, read by the `openai` package's own types."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai.types.responses as types
import pytest
from pydantic import TypeAdapter

from tests.service.live import post

INPUT = "Tell me a story about a fox and a lantern in the deep forest."
CALL = {"animal": "fox"}
TOOL = {
    "type": "function",
    "name": "find",
    "parameters": {
        "type": "object",
        "properties": {"animal": {"const": "fox"}},
        "required": ["animal"],
        "additionalProperties": False,
    },
    "strict": True,
}
EVENT = TypeAdapter(types.ResponseStreamEvent)


async def respond(live: httpx.AsyncClient, **fields: object) -> types.Response:
    answer = await live.post(
        "/v1/responses", json={"input": INPUT, "max_output_tokens": 12, "temperature": 0, **fields}
    )
    assert answer.status_code == 200, answer.text
    return types.Response.model_validate(answer.json())


async def streamed(live: httpx.AsyncClient, **fields: object) -> list[Any]:
    body = {"input": INPUT, "max_output_tokens": 12, "temperature": 0, "stream": True, **fields}
    return list(parsed((await live.post("/v1/responses", json=body)).text))


def parsed(text: str) -> Iterator[Any]:
    *events, done = text.removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]", text
    for number, event in enumerate(events):
        name, data = event.split("\n")
        body = json.loads(data.removeprefix("data: "))
        assert name == f"event: {body['type']}"
        assert body["sequence_number"] == number
        yield EVENT.validate_python(body)


async def refusal(live: httpx.AsyncClient, **fields: object) -> str:
    answer = await live.post("/v1/responses", json={"input": INPUT, **fields})
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]["param"]


@pytest.mark.honours("responses.input", "responses.max_output_tokens", "responses.model")
async def test_a_response_says_what_the_chat_says(live: httpx.AsyncClient) -> None:
    response = await respond(live, model="tiny")
    messages = [{"role": "user", "content": INPUT}]
    chat = await post(live, "chat", messages=messages, temperature=0, ignore_eos=None)
    assert response.output_text == chat["choices"][0]["message"]["content"]
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.usage.output_tokens == 12
    assert response.usage.input_tokens == chat["usage"]["prompt_tokens"]


@pytest.mark.honours("responses.input")
async def test_items_are_the_messages_of_a_chat(live: httpx.AsyncClient) -> None:
    parts = [{"type": "input_text", "text": "Tell me a story "}, {"type": "input_text", "text": INPUT[16:]}]
    assert (await respond(live, input=[{"role": "user", "content": parts}])).output_text == (
        await respond(live)
    ).output_text


@pytest.mark.honours("responses.input")
async def test_an_answer_can_be_sent_back_with_what_its_calls_gave(live: httpx.AsyncClient) -> None:
    first = await respond(live)
    called = await respond(live, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, max_output_tokens=90)
    (call,) = called.output
    items = [{"role": "user", "content": "x"}, *first.output, call]
    items = [item if isinstance(item, dict) else item.model_dump(exclude_unset=True) for item in items]
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": "found"})
    assert (await respond(live, input=items)).usage.input_tokens > first.usage.input_tokens


@pytest.mark.honours("responses.instructions")
async def test_instructions_come_before_the_input(live: httpx.AsyncClient) -> None:
    messages = [{"role": "developer", "content": "Rhyme."}, {"role": "user", "content": INPUT}]
    assert (await respond(live, instructions="Rhyme.")).output_text == (await respond(live, input=messages)).output_text
    assert (await respond(live, instructions="Rhyme.")).instructions == "Rhyme."


@pytest.mark.honours("responses.temperature", "responses.top_p")
async def test_sampling_is_as_asked(live: httpx.AsyncClient) -> None:
    assert len({(await respond(live, temperature=2)).output_text for _ in range(2)}) == 2
    assert (await respond(live, temperature=2, top_p=1e-6)).output_text == (await respond(live)).output_text


@pytest.mark.honours("responses.stream")
async def test_the_events_of_a_text_come_in_order_and_say_what_the_whole_says(live: httpx.AsyncClient) -> None:
    events = await streamed(live)
    names = [event.type for event in events]
    assert names[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert set(names[4:-4]) == {"response.output_text.delta"}
    assert names[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    whole = (await respond(live)).output_text
    assert "".join(event.delta for event in events[4:-4]) == events[-4].text == whole
    assert events[-1].response.output_text == whole
    assert events[-1].response.usage.output_tokens == 12


@pytest.mark.honours("responses.stream_options")
async def test_events_are_never_padded(live: httpx.AsyncClient) -> None:
    plain = await streamed(live, stream_options={"include_obfuscation": False})
    assert all(not getattr(event, "obfuscation", None) for event in plain)
    assert await refusal(live, stream=True, stream_options={"include_obfuscation": True}) is not None


@pytest.mark.honours("responses.tools", "responses.tool_choice", "responses.parallel_tool_calls")
@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "find"}], ids=["required", "named"])
async def test_a_call_is_an_item(live: httpx.AsyncClient, choice: object) -> None:
    fields = {"tools": [TOOL], "tool_choice": choice, "parallel_tool_calls": False, "max_output_tokens": 90}
    response = await respond(live, **fields)
    (item,) = response.output
    assert (item.type, item.name, json.loads(item.arguments), item.status) == (
        "function_call",
        "find",
        CALL,
        "completed",
    )
    assert response.status == "completed"
    events = await streamed(live, **fields)
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    (done,) = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert "".join(deltas) == done.arguments == item.arguments
    assert events[-1].type == "response.completed"


@pytest.mark.honours("responses.tool_choice")
async def test_allowed_tools_may_be_called_and_no_others(live: httpx.AsyncClient) -> None:
    other = {**TOOL, "name": "lose"}
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "find"}]}
    fields = {"parallel_tool_calls": False, "max_output_tokens": 90, "temperature": 2}
    response = await respond(live, tools=[other, TOOL], tool_choice=choice, **fields)
    assert [item.name for item in response.output] == ["find"]


@pytest.mark.honours("responses.text")
async def test_a_text_keeps_to_its_schema(live: httpx.AsyncClient) -> None:
    form = {"type": "json_schema", "name": "pet", "schema": TOOL["parameters"], "strict": True}
    response = await respond(live, text={"format": form}, max_output_tokens=90)
    assert json.loads(response.output_text) == CALL
    assert response.text.format.type == "json_schema"


@pytest.mark.honours("responses.include", "responses.top_logprobs")
async def test_log_probabilities_are_told_when_included(live: httpx.AsyncClient) -> None:
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    (part,) = (await respond(live, **fields)).output[0].content
    assert len(part.logprobs) == 12
    assert all(len(entry.top_logprobs) == 2 for entry in part.logprobs)
    deltas = [e for e in await streamed(live, **fields) if e.type == "response.output_text.delta"]
    assert sum(len(event.logprobs) for event in deltas) == 12
    assert (await respond(live)).output[0].content[0].logprobs == []


@pytest.mark.honours("responses.metadata", "responses.user")
async def test_metadata_and_user_come_back(live: httpx.AsyncClient) -> None:
    response = await respond(live, metadata={"a": "b"}, user="me")
    assert (response.metadata, response.user) == ({"a": "b"}, "me")


async def test_a_response_of_nothing_still_has_its_message(live: httpx.AsyncClient) -> None:
    form = {"format": {"type": "json_object"}}
    assert (await respond(live, text=form)).output[0].type == "message"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"truncation": "auto"}, "truncation"),
        ({"input": []}, "input"),
        ({"input": [{"type": "reasoning"}]}, "input[0].type"),
        ({"input": "word " * 2000}, "input"),
        ({"max_output_tokens": 5000}, "max_output_tokens"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "lose"}}, "tool_choice"),
        ({"tools": [{**TOOL, "parameters": {"not": {}}}]}, "tools"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}}, "text"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"include": ["message.output_text.logprobs"], "tools": [TOOL]}, "include"),
        ({"stream_options": {}}, "stream_options"),
    ],
)
async def test_what_cannot_be_done_is_refused_in_the_bodys_own_words(
    live: httpx.AsyncClient, fields: dict[str, Any], param: str
) -> None:
    assert await refusal(live, **fields) == param


async def test_what_asks_for_nothing_is_taken(live: httpx.AsyncClient) -> None:
    fields = {"store": False, "background": False, "truncation": "disabled", "previous_response_id": None}
    assert (await respond(live, **fields)).store is False
