import json

import pytest

from model.errors import InvalidRequest
from service.api import answers
from service.api.schemas.chat import ChatRequest
from service.api.schemas.completions import CompletionRequest
from service.api.schemas.strict import parse

MESSAGES = [{"role": "user", "content": "hello"}]


def called(name: str, arguments: str) -> dict[str, object]:
    """An assistant's message that calls a function."""
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": "call_1", "type": "function", "function": function}]}


def refusal(schema: type, **body: object) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as refused:
        parse(schema, body)
    return refused.value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("audio", {"voice": "alloy"}),
        ("functions", [{"name": "f"}]),
        ("metadata", {"a": "b"}),
        ("modalities", ["audio"]),
        ("reasoning_effort", "low"),
        ("service_tier", "flex"),
        ("store", True),
        ("store", 0),
        ("web_search_options", {}),
    ],
)
def test_a_chat_field_that_is_not_done_is_refused_by_name(field: str, value: object) -> None:
    assert refusal(ChatRequest, messages=MESSAGES, **{field: value}).param == field


@pytest.mark.parametrize("field", sorted(ChatRequest.no_op))
def test_null_in_a_field_that_is_not_done_asks_for_nothing(field: str) -> None:
    assert parse(ChatRequest, {"messages": MESSAGES, field: None}).n is None


@pytest.mark.parametrize(("field", "values"), sorted(ChatRequest.no_op.items()))
def test_a_default_value_in_a_field_that_is_not_done_asks_for_nothing(field: str, values: tuple[object, ...]) -> None:
    for value in values:
        assert parse(ChatRequest, {"messages": MESSAGES, field: value}).n is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", True),
        ("max_tokens", 0),
        ("max_tokens", 2**63),
        ("max_tokens", "5"),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", float("inf")),
        ("top_p", 0),
        ("top_k", -2),
        ("seed", 2**63),
        ("n", 0),
        ("n", 10**6),
        ("stream", "yes"),
        ("stop", ""),
        ("stop", ["x"] * 100_000),
        ("stop", "x" * 257),
        ("user", 7),
        ("nonsense", 1),
        ("model", 3),
        ("prompt", 3),
        ("prompt", [[], ["a"]]),
        ("prompt", [1, "a"]),
        ("prompt", [-1]),
        ("prompt", [True]),
        ("prompt", None),
        ("ignore_eos", 1),
        ("suffix", "the end"),
        ("best_of", True),
        ("best_of", 0),
        ("echo", 1),
        ("logprobs", 21),
        ("logprobs", True),
        ("prompt_logprobs", -1),
        ("min_p", 1.5),
        ("min_tokens", -1),
        ("frequency_penalty", False),
        ("presence_penalty", -2.5),
        ("repetition_penalty", 5e-324),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {str(token_id): 1 for token_id in range(1025)}),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", list(range(129))),
        ("cache_salt", ""),
        ("priority", 2**31),
        ("response_format", {"type": "xml"}),
        ("response_format", {"type": "json_schema"}),
        ("structured_outputs", {}),
        ("structured_outputs", {"regex": "a", "lark": "b"}),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_field(field: str, value: object) -> None:
    assert refusal(CompletionRequest, **{"prompt": "x", field: value}).param.replace(".", "[").split("[")[0] == field


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hello", "messages"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "robot", "content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": "x", "name": ""}], "messages[0].name"),
        ([{"role": "user", "content": "x", "name": 3}], "messages[0].name"),
        ([{"role": "tool", "content": "x", "tool_call_id": "1", "name": "Bo"}], "messages[0].name"),
        ([{"role": "user", "content": [{"type": "image_url", "text": "x"}]}], "messages[0].content[0].type"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "assistant"}], "messages"),
        ([{"role": "tool", "content": "x"}], "messages[0].tool_call_id"),
        ([{"role": "assistant", "tool_calls": [{"id": "1"}]}], "messages[0].tool_calls[0].type"),
        ([called("f", "[1]")], "messages"),
        ([called("f", "{")], "messages"),
    ],
)
def test_a_wrong_message_is_refused_by_its_place(messages: object, param: str) -> None:
    assert refusal(ChatRequest, messages=messages).param == param


def test_a_field_of_several_forms_is_refused_with_all_of_them() -> None:
    assert "a string of 1 to 256 characters, or a list of at most 16" in str(
        refusal(CompletionRequest, prompt="x", stop=3)
    )


def test_a_whole_number_is_an_integer_however_it_is_written() -> None:
    body = parse(CompletionRequest, {"prompt": [1.0, 2], "max_tokens": 5.0, "temperature": 1.0})
    assert (body.token_prompts, body.max_tokens, body.temperature) == ([[1, 2]], 5, 1.0)
    assert refusal(CompletionRequest, prompt="x", max_tokens=5.5).param == "max_tokens"
    assert refusal(CompletionRequest, prompt="x", max_tokens=5.0, n=0).param == "n"


def test_a_missing_prompt_is_named() -> None:
    error = refusal(CompletionRequest)
    assert (error.param, str(error)) == ("prompt", "prompt is required")


def test_a_body_that_is_no_object_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="JSON object"):
        parse(CompletionRequest, [1, 2])


def test_two_different_token_limits_in_a_chat_are_refused() -> None:
    error = refusal(ChatRequest, messages=MESSAGES, max_tokens=3, max_completion_tokens=4)
    assert error.param == "max_completion_tokens"


def test_stream_options_without_a_stream_are_refused() -> None:
    assert refusal(CompletionRequest, prompt="x", stream_options={"include_usage": True}).param == "stream_options"


@pytest.mark.parametrize(
    ("prompt", "texts", "token_prompts"),
    [
        ("a", ["a"], []),
        ("", [""], []),
        (["a", "b"], ["a", "b"], []),
        ([1, 2], [], [[1, 2]]),
        ([[1], [2, 3]], [], [[1], [2, 3]]),
    ],
)
def test_every_form_of_a_prompt_becomes_a_list_of_prompts(prompt: object, texts: object, token_prompts: object) -> None:
    body = parse(CompletionRequest, {"prompt": prompt})
    assert (body.texts, body.token_prompts) == (texts, token_prompts)


@pytest.mark.parametrize("prompt", [[], ["x"] * 129, [[1]] * 129], ids=["none", "texts", "token lists"])
def test_no_prompt_and_too_many_prompts_are_refused(prompt: object) -> None:
    assert refusal(CompletionRequest, prompt=prompt).param == "prompt"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
    ],
)
def test_fields_of_a_completion_that_contradict_one_another_are_refused(fields: dict[str, object], param: str) -> None:
    assert refusal(CompletionRequest, prompt="x", **fields).param == param


TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [TOOL]}, "tool_choice"),
        ({"tool_choice": 3, "tools": [TOOL]}, "tool_choice"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools[0].function.name"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name"),
    ],
)
def test_fields_of_a_chat_that_cannot_be_are_refused_by_their_place(fields: dict[str, object], param: str) -> None:
    assert refusal(ChatRequest, messages=MESSAGES, **fields).param == param


def test_an_assistants_answer_can_be_sent_back_as_it_came() -> None:
    answer = {"role": "assistant", "content": None, "refusal": None, "annotations": [], "audio": None}
    message = {**called("f", '{"x": 1}'), **answer, "function_call": None}
    (sent,) = parse(ChatRequest, {"messages": [message]}).messages
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert sent.for_template() == {"role": "assistant", "content": "", "tool_calls": [call]}


def test_text_parts_of_a_message_are_joined_for_the_template() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    body = parse(ChatRequest, {"messages": [{"role": "developer", "content": parts}]})
    assert body.messages[0].for_template() == {"role": "system", "content": "one two"}


def test_the_schema_of_a_body_is_plain_json() -> None:
    assert "prompt" in json.dumps(CompletionRequest.model_json_schema())


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_the_name_of_who_speaks_reaches_the_chat_template(role: str) -> None:
    chat = {"messages": [{"role": role, "content": "x", "name": "Bo"}, {"role": "user", "content": "y"}]}
    named, nameless = (message.for_template() for message in parse(ChatRequest, chat).messages)
    assert named["name"] == "Bo"
    assert "name" not in nameless, "templates ask whether there is one"


@pytest.mark.parametrize("arguments", ["", " ", "{}"])
def test_a_call_of_a_function_without_parameters_may_have_no_arguments(arguments: str) -> None:
    """Clients send back what they got, and of such a function some give an empty text."""
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": arguments}}
    (message,) = parse(ChatRequest, {"messages": [{"role": "assistant", "tool_calls": [call]}]}).messages
    assert message.for_template()["tool_calls"][0]["function"] == {"name": "now", "arguments": {}}


@pytest.mark.parametrize("choice", [answers.CompletionChoice, answers.ChatChoice])
def test_the_document_offers_no_reason_that_never_comes(choice: type) -> None:
    """A deadline ends an answer with an error."""
    assert "deadline" not in choice.model_json_schema()["properties"]["finish_reason"]["enum"]
