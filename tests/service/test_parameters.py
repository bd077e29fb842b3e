"""What each field of a request does, seen in the answer: the HTTP application over a real engine, without Ray.

`honours` names the fields whose effect a test sees; docs/compatibility.md is made of it.
"""

import asyncio
import json
import math
from typing import Any

import httpx
import jsonschema
import pytest

from model.text.tokenizer import Tokenizer
from service.api.logprobs import _finite, legacy_text
from tests.service.live import EOS, PATHS, PROMPT, body_for, events, generate, post, refusal, sampled, text_of

SCHEMA = {
    "type": "object",
    "properties": {"animal": {"enum": ["fox", "owl"]}, "age": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["animal", "age"],
    "additionalProperties": False,
}


@pytest.mark.honours("completions.temperature", "chat.temperature")
async def test_without_temperature_no_seed_makes_a_difference(live: httpx.AsyncClient, endpoint: str) -> None:
    greedy = [await generate(live, endpoint, temperature=0, seed=seed) for seed in (1, 2)]
    hot = [await generate(live, endpoint, temperature=2, seed=seed) for seed in (1, 2)]
    assert greedy[0] == greedy[1]
    assert hot[0] != hot[1]


@pytest.mark.honours("completions.seed", "chat.seed")
async def test_a_seed_repeats_a_completion(live: httpx.AsyncClient, endpoint: str) -> None:
    texts = [await generate(live, endpoint, seed=seed) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("field", [{"top_p": 1e-6}, {"top_k": 1}, {"min_p": 1.0}], ids=["top_p", "top_k", "min_p"])
@pytest.mark.honours(
    "completions.top_p", "chat.top_p", "completions.top_k", "chat.top_k", "completions.min_p", "chat.min_p"
)
async def test_what_leaves_one_token_to_choose_from_is_greedy(
    live: httpx.AsyncClient, endpoint: str, field: dict[str, Any]
) -> None:
    assert await generate(live, endpoint, **field) == await generate(live, endpoint, temperature=0)
    assert await generate(live, endpoint) != await generate(live, endpoint, temperature=0)


@pytest.mark.parametrize(
    "penalty",
    [{"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"repetition_penalty": 10.0}],
    ids=["presence", "frequency", "repetition"],
)
@pytest.mark.honours(
    "completions.presence_penalty",
    "chat.presence_penalty",
    "completions.frequency_penalty",
    "chat.frequency_penalty",
    "completions.repetition_penalty",
    "chat.repetition_penalty",
)
async def test_a_penalty_makes_a_text_repeat_itself_less(
    live: httpx.AsyncClient, endpoint: str, penalty: dict[str, float], tokenizer: Tokenizer
) -> None:
    # Left alone, the bias of one token would have it said every time.
    fields = {"temperature": 0, "max_tokens": 24, "logit_bias": {"40": 3.0, "41": 2.9, "42": 2.8, "43": 2.7}}
    plain = await sampled(live, endpoint, tokenizer, **fields)
    penalized = await sampled(live, endpoint, tokenizer, **fields, **penalty)
    assert len(set(penalized)) > len(set(plain))


@pytest.mark.honours("completions.logit_bias", "chat.logit_bias")
async def test_a_bias_makes_a_token_certain_or_impossible(
    live: httpx.AsyncClient, endpoint: str, tokenizer: Tokenizer
) -> None:
    token = tokenizer.encode("fox", add_special_tokens=False)[0]
    name = tokenizer.token_bytes(token).decode()
    assert set(await sampled(live, endpoint, tokenizer, logit_bias={str(token): 100})) == {name}
    first = (await sampled(live, "completions", tokenizer, temperature=0))[0]
    called_so = [i for i in range(tokenizer.vocab_size) if legacy_text(tokenizer, i) == first]
    never = dict.fromkeys(map(str, called_so), -100)
    without = await sampled(live, "completions", tokenizer, temperature=0, logit_bias=never)
    assert first not in without


@pytest.mark.honours("completions.max_tokens", "chat.max_tokens")
async def test_a_completion_ends_at_its_token_limit(live: httpx.AsyncClient, endpoint: str) -> None:
    body = await post(live, endpoint, max_tokens=5)
    assert body["usage"]["completion_tokens"] == 5
    assert body["choices"][0]["finish_reason"] == "length"


@pytest.mark.honours("chat.max_completion_tokens")
async def test_a_chats_limit_goes_by_its_newer_name_too(live: httpx.AsyncClient) -> None:
    body = await post(live, "chat", max_tokens=None, max_completion_tokens=5)
    assert body["usage"]["completion_tokens"] == 5


@pytest.mark.honours("completions.ignore_eos", "chat.ignore_eos")
async def test_the_end_of_the_sequence_can_be_ignored(live: httpx.AsyncClient, endpoint: str) -> None:
    ends = {"logit_bias": {str(EOS): 100}}
    assert (await post(live, endpoint, ignore_eos=False, **ends))["usage"]["completion_tokens"] == 1
    assert (await post(live, endpoint, ignore_eos=True, **ends))["usage"]["completion_tokens"] == 12


@pytest.mark.honours("completions.min_tokens", "chat.min_tokens")
async def test_no_end_comes_before_the_least_number_of_tokens(live: httpx.AsyncClient, endpoint: str) -> None:
    body = await post(live, endpoint, ignore_eos=False, min_tokens=4, logit_bias={str(EOS): 100})
    assert body["usage"]["completion_tokens"] == 5


@pytest.mark.honours("completions.min_tokens", "chat.min_tokens")
async def test_no_stop_string_ends_it_before_the_least_number_of_tokens(
    live: httpx.AsyncClient, endpoint: str, tokenizer: Tokenizer
) -> None:
    bias = {str(tokenizer.encode("fox", add_special_tokens=False)[0]): 100}
    stop = tokenizer.token_bytes(int(next(iter(bias)))).decode()
    body = await post(live, endpoint, min_tokens=4, stop=stop, logit_bias=bias)
    assert text_of(body["choices"][0]) == stop * 3
    assert body["usage"]["completion_tokens"] == 4


@pytest.mark.honours("completions.stop", "chat.stop")
async def test_a_text_ends_before_a_stop_string(live: httpx.AsyncClient, endpoint: str) -> None:
    text = await generate(live, endpoint, temperature=0)
    (choice,) = (await post(live, endpoint, temperature=0, stop=["never said", text[3:5]]))["choices"]
    assert text_of(choice) == text[: text.index(text[3:5])]
    assert choice["finish_reason"] == "stop"


@pytest.mark.honours("completions.stop_token_ids", "chat.stop_token_ids")
async def test_a_stop_token_ends_a_completion(live: httpx.AsyncClient, endpoint: str) -> None:
    body = await post(live, endpoint, stop_token_ids=[40], logit_bias={"40": 100})
    assert body["usage"]["completion_tokens"] == 1
    assert body["choices"][0]["finish_reason"] == "stop"


@pytest.mark.honours("completions.n", "chat.n")
async def test_several_choices_differ(live: httpx.AsyncClient, endpoint: str) -> None:
    choices = (await post(live, endpoint, n=3))["choices"]
    assert len({text_of(choice) for choice in choices}) == 3


@pytest.mark.honours("completions.best_of")
async def test_the_best_of_several_is_the_likeliest_a_token(live: httpx.AsyncClient) -> None:
    best = (await post(live, "completions", best_of=5, n=2))["choices"]
    all_of_them = (await post(live, "completions", n=5, logprobs=0))["choices"]
    ranked = sorted(all_of_them, key=lambda choice: -sum(choice["logprobs"]["token_logprobs"]))
    assert [choice["text"] for choice in best] == [choice["text"] for choice in ranked[:2]]
    assert [choice["index"] for choice in best] == [0, 1]
    assert all(choice["logprobs"] is None for choice in best)


async def test_the_tokens_of_all_candidates_are_counted(live: httpx.AsyncClient) -> None:
    assert (await post(live, "completions", best_of=3))["usage"]["completion_tokens"] == 36


@pytest.mark.honours("completions.prompt")
async def test_each_form_of_a_prompt_gives_the_same(live: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(PROMPT)
    forms = [PROMPT, [PROMPT], ids, [ids]]
    assert len({await generate(live, "completions", prompt=form) for form in forms}) == 1
    assert len((await post(live, "completions", prompt=[PROMPT, "x"]))["choices"]) == 2


@pytest.mark.honours("chat.messages")
async def test_every_message_of_a_chat_counts(live: httpx.AsyncClient) -> None:
    one = {"role": "user", "content": "x"}
    messages = [{"role": "developer", "content": "y"}, one, {"role": "assistant", "content": "z"}, one]
    usages = [(await post(live, "chat", messages=messages[-i:]))["usage"]["prompt_tokens"] for i in (1, 2, 3, 4)]
    assert usages == sorted(set(usages))


@pytest.mark.honours("completions.model", "chat.model")
async def test_a_model_is_answered_for_only_by_its_name(live: httpx.AsyncClient, endpoint: str) -> None:
    assert (await post(live, endpoint, model="tiny"))["model"] == "tiny"
    answer = await live.post("/v1/completions", json={"prompt": "x", "model": "other"})
    assert answer.status_code == 404


@pytest.mark.honours("completions.user", "chat.user")
async def test_the_user_is_a_label_and_changes_nothing(live: httpx.AsyncClient, endpoint: str) -> None:
    assert await generate(live, endpoint, user="somebody") == await generate(live, endpoint)


@pytest.mark.honours("completions.stream", "chat.stream")
async def test_a_stream_says_what_the_whole_says(live: httpx.AsyncClient, endpoint: str) -> None:
    chunks = [chunk["choices"][0] for chunk in await events(live, endpoint)]
    streamed = "".join(chunk["text"] if "text" in chunk else chunk["delta"].get("content", "") for chunk in chunks)
    assert streamed == await generate(live, endpoint)
    assert len(chunks) > 6


@pytest.mark.honours("completions.stream_options", "chat.stream_options")
async def test_a_stream_counts_its_tokens_when_asked(live: httpx.AsyncClient, endpoint: str) -> None:
    *chunks, last = await events(live, endpoint, stream_options={"include_usage": True})
    assert last["usage"]["completion_tokens"] == 12
    assert all(chunk["usage"] is None for chunk in chunks)


@pytest.mark.honours("completions.stream_options", "chat.stream_options")
@pytest.mark.parametrize("with_logprobs", [False, True])
async def test_every_chunk_counts_the_tokens_when_asked(
    live: httpx.AsyncClient, endpoint: str, with_logprobs: bool
) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    fields = {"logprobs": 0 if endpoint == "completions" else True} if with_logprobs else {}
    chunks = await events(live, endpoint, stream_options=options, **fields)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert len(set(counts)) > 6
    assert counts[-1] == 12


# Log-probabilities.


@pytest.mark.honours("completions.logprobs")
async def test_a_completion_tells_the_likeliest_tokens(live: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    (choice,) = (await post(live, "completions", logprobs=3, temperature=0))["choices"]
    logprobs = choice["logprobs"]
    assert set(logprobs) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    for token, value, top, _ in zip(*map(logprobs.get, logprobs), strict=True):
        assert top[token] == value == max(top.values()), "greedy: the sampled token is the likeliest"
        assert len(top) == 3


@pytest.mark.honours("chat.logprobs", "chat.top_logprobs")
async def test_a_chat_tells_the_likeliest_tokens(live: httpx.AsyncClient) -> None:
    (choice,) = (await post(live, "chat", logprobs=True, top_logprobs=2, temperature=0))["choices"]
    content = choice["logprobs"]["content"]
    said = b"".join(bytes(entry["bytes"]) for entry in content)
    assert said.decode(errors="replace") == choice["message"]["content"]
    for entry in content:
        assert [len(entry["top_logprobs"]), entry["top_logprobs"][0]["token"]] == [2, entry["token"]]
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] <= 0
    (bare,) = (await post(live, "chat", logprobs=True))["choices"]
    assert bare["logprobs"]["content"][0]["top_logprobs"] == []


async def test_a_special_token_is_told_by_its_name_and_has_no_bytes(live: httpx.AsyncClient) -> None:
    fields = {"ignore_eos": False, "logit_bias": {str(EOS): 100}}
    (choice,) = (await post(live, "chat", logprobs=True, **fields))["choices"]
    assert [(e["token"], e["bytes"]) for e in choice["logprobs"]["content"]] == [("</s>", None)]
    (choice,) = (await post(live, "completions", logprobs=0, **fields))["choices"]
    assert choice["logprobs"]["tokens"] == ["</s>"]


async def test_half_a_character_is_told_by_its_bytes(live: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    half = next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b"\xe2")
    fields = {"logit_bias": {str(half): 100}, "max_tokens": 1}
    (choice,) = (await post(live, "completions", logprobs=0, **fields))["choices"]
    assert choice["logprobs"]["tokens"] == ["bytes:\\xe2"]
    (choice,) = (await post(live, "chat", logprobs=True, **fields))["choices"]
    assert choice["logprobs"]["content"][0]["bytes"] == [0xE2]


async def test_streamed_logprobs_are_those_of_the_whole(live: httpx.AsyncClient) -> None:
    whole = (await post(live, "completions", logprobs=2, echo=True))["choices"][0]
    chunks = [chunk["choices"][0] for chunk in await events(live, "completions", logprobs=2, echo=True)]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    for name, values in whole["logprobs"].items():
        assert [value for chunk in chunks for value in chunk["logprobs"][name]] == values
    content = (await post(live, "chat", logprobs=True, top_logprobs=1))["choices"][0]["logprobs"]["content"]
    streamed = [chunk["choices"][0]["logprobs"] for chunk in await events(live, "chat", logprobs=True, top_logprobs=1)]
    assert [entry for logprobs in streamed if logprobs for entry in logprobs["content"]] == content


async def test_tokens_behind_a_stop_string_have_no_logprobs(live: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    fields = {"temperature": 0, "logprobs": 0}
    tokens = (await post(live, "completions", **fields))["choices"][0]["logprobs"]["tokens"]
    body = await post(live, "completions", **fields, stop=tokens[2])
    assert body["choices"][0]["logprobs"]["tokens"] == tokens[: body["usage"]["completion_tokens"]]
    assert body["usage"]["completion_tokens"] < 12


@pytest.mark.honours("completions.echo")
async def test_an_echo_tells_the_prompt_and_what_is_known_of_it(live: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    plain = await generate(live, "completions")
    assert await generate(live, "completions", echo=True) == PROMPT + plain
    (choice,) = (await post(live, "completions", echo=True, logprobs=1))["choices"]
    logprobs, ids = choice["logprobs"], tokenizer.encode(PROMPT)
    assert len(logprobs["tokens"]) == len(ids) + 12
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert all(value <= 0 for value in logprobs["token_logprobs"][1:])
    assert logprobs["text_offset"][len(ids)] == len(PROMPT)
    begun = list(zip(logprobs["text_offset"], logprobs["tokens"], strict=True))[1 : len(ids)]
    assert all(PROMPT[offset:].startswith(token) for offset, token in begun)


async def test_each_of_several_prompts_is_echoed_before_its_choices(live: httpx.AsyncClient) -> None:
    choices = (await post(live, "completions", prompt=["one", "two"], n=2, echo=True))["choices"]
    assert [choice["text"][:3] for choice in choices] == ["one", "one", "two", "two"]
    chunks = await events(live, "completions", prompt=["one", "two"], n=2, echo=True)
    assert [chunk["choices"][0]["text"] for chunk in chunks[:4]] == ["one", "one", "two", "two"]


async def test_a_prompt_alone_can_be_scored(live: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    body = await post(live, "completions", echo=True, logprobs=0, max_tokens=0)
    assert body["choices"][0]["text"] == PROMPT
    assert len(body["choices"][0]["logprobs"]["tokens"]) == len(tokenizer.encode(PROMPT))
    assert body["usage"]["completion_tokens"] == 0
    (chunk,) = await events(live, "completions", echo=True, logprobs=0, max_tokens=0)
    assert chunk["choices"] == body["choices"]


@pytest.mark.honours("completions.prompt_logprobs")
async def test_prompt_logprobs_are_those_of_the_echo(live: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    (choice,) = (await post(live, "completions", prompt_logprobs=1))["choices"]
    (echoed,) = (await post(live, "completions", echo=True, logprobs=1, max_tokens=0))["choices"]
    ids = tokenizer.encode(PROMPT)
    first, *told = choice["prompt_logprobs"]
    assert first is None
    assert [entry[str(i)]["logprob"] for i, entry in zip(ids[1:], told, strict=True)] == pytest.approx(
        echoed["logprobs"]["token_logprobs"][1:]
    )
    assert choice["text"] == await generate(live, "completions"), "the completion is as it would have been"


# Forms of output.


@pytest.mark.honours("completions.response_format", "chat.response_format")
@pytest.mark.parametrize("strict", [True, None])
async def test_an_output_keeps_to_its_json_schema(live: httpx.AsyncClient, endpoint: str, strict: bool | None) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA, "strict": strict}}
    (choice,) = (await post(live, endpoint, response_format=form, max_tokens=200, ignore_eos=False))["choices"]
    jsonschema.validate(json.loads(text_of(choice)), SCHEMA)
    assert choice["finish_reason"] == "stop"


@pytest.mark.honours("completions.response_format", "chat.response_format")
async def test_a_json_object_begins_as_one(live: httpx.AsyncClient, endpoint: str) -> None:
    form = {"type": "json_object"}
    text = await generate(live, endpoint, response_format=form, ignore_eos=False)
    assert text.lstrip().startswith("{")
    assert not (await generate(live, endpoint, response_format={"type": "text"})).startswith("{")


@pytest.mark.honours("completions.structured_outputs", "chat.structured_outputs")
@pytest.mark.parametrize(
    ("outputs", "texts"),
    [
        ({"choice": ["red", "green"]}, {"red", "green"}),
        ({"regex": "a{3}|b{3}"}, {"aaa", "bbb"}),
        ({"lark": 'start: "x" "y"'}, {"xy"}),
    ],
    ids=["choice", "regex", "lark"],
)
async def test_an_output_keeps_to_its_structure(
    live: httpx.AsyncClient, endpoint: str, outputs: dict[str, Any], texts: set[str]
) -> None:
    assert await generate(live, endpoint, structured_outputs=outputs, ignore_eos=False) in texts


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}}, None),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
        ({"response_format": {"type": "json_object"}, "min_tokens": 2}, "min_tokens"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"stop_token_ids": [99999]}, "stop_token_ids"),
        ({"min_tokens": 13, "max_tokens": 12}, "min_tokens"),
    ],
)
async def test_what_only_the_engine_can_refuse_is_refused_by_name(
    live: httpx.AsyncClient, endpoint: str, fields: dict[str, Any], param: str | None
) -> None:
    assert await refusal(live, endpoint, **fields) == (param or "response_format")


# Who comes first, and who shares what.


@pytest.mark.honours("completions.cache_salt", "chat.cache_salt")
async def test_prefixes_are_shared_only_under_one_salt(live: httpx.AsyncClient, endpoint: str) -> None:
    async def cached(salt: str | None) -> int:
        body = await post(live, endpoint, max_tokens=1, cache_salt=salt)
        return body["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [await cached(salt) for salt in ("a", "b", None)] == [0, 0, 0]
    assert min([await cached(salt) for salt in ("a", "b", None)]) > 0


@pytest.mark.honours("completions.priority", "chat.priority")
@pytest.mark.parametrize("max_num_seqs", [1])
async def test_who_has_the_lower_priority_number_goes_first(live: httpx.AsyncClient, endpoint: str) -> None:
    finished: list[str] = []

    async def run(name: str, **fields: object) -> None:
        await post(live, endpoint, **fields)
        finished.append(name)

    running = asyncio.create_task(run("running", max_tokens=200))
    await asyncio.sleep(0)
    await asyncio.gather(running, run("last", priority=5), run("first", priority=-5))
    assert finished.index("first") < finished.index("last")


@pytest.mark.honours("completions.deadline_ms", "chat.deadline_ms")
async def test_a_deadline_ends_a_request(live: httpx.AsyncClient, endpoint: str) -> None:
    body = body_for(endpoint, {"max_tokens": 900, "ignore_eos": True, "deadline_ms": 1})
    answer = await live.post(PATHS[endpoint], json=body)
    assert answer.status_code == 408


@pytest.mark.honours("completions.receipt", "chat.receipt")
async def test_a_receipt_comes_when_asked_for(live: httpx.AsyncClient, endpoint: str) -> None:
    receipt = (await post(live, endpoint, receipt=True))["receipt"]
    assert len(receipt["weights_sha256"]) == 64
    assert "receipt" not in await post(live, endpoint)


def test_a_log_probability_of_nothing_is_openais_least() -> None:
    assert _finite(-math.inf) == -9999.0
