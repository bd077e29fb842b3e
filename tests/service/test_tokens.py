"""`/tokenize` and `/detokenize`."""

from typing import Any

import httpx
import pytest

from model.text.tokenizer import Tokenizer

TEXT = "Once upon a time, une forêt 🦊"
CHAT = [{"role": "user", "content": "hi"}]


async def tokenize(live: httpx.AsyncClient, **body: object) -> dict[str, Any]:
    answer = await live.post("/tokenize", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_a_text_becomes_the_tokens_that_a_completion_reads(live: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    body = await tokenize(live, prompt=TEXT)
    assert body["tokens"] == tokenizer.encode(TEXT)
    assert (body["count"], body["max_model_len"], body["token_strs"]) == (len(body["tokens"]), 1024, None)
    usage = (await live.post("/v1/completions", json={"prompt": TEXT, "max_tokens": 1})).json()["usage"]
    assert usage["prompt_tokens"] == body["count"]


async def test_special_tokens_can_be_left_out(live: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    body = await tokenize(live, prompt=TEXT, add_special_tokens=False, return_token_strs=True)
    assert body["tokens"] == tokenizer.encode(TEXT, add_special_tokens=False)
    assert body["token_strs"] == [tokenizer.token_name(token_id) for token_id in body["tokens"]]


async def test_a_chat_becomes_the_tokens_that_its_template_writes(live: httpx.AsyncClient) -> None:
    whole, bare = [(await tokenize(live, messages=CHAT, **f))["tokens"] for f in ({}, {"add_generation_prompt": False})]
    assert whole[: len(bare)] == bare != whole
    usage = (await live.post("/v1/chat/completions", json={"messages": CHAT, "max_tokens": 1})).json()["usage"]
    assert usage["prompt_tokens"] == len(whole)


async def test_tokens_become_their_text_again(live: httpx.AsyncClient) -> None:
    tokens = (await tokenize(live, prompt=TEXT))["tokens"]
    assert (await live.post("/detokenize", json={"tokens": tokens})).json() == {"prompt": TEXT}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": CHAT}, "prompt"),
        ("/tokenize", {"prompt": "x", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/tokenize", {"messages": CHAT, "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"prompt": "x", "nonsense": 1}, "nonsense"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [99999]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
    ],
)
async def test_what_is_wrong_is_named(live: httpx.AsyncClient, path: str, body: dict[str, Any], param: str) -> None:
    answer = await live.post(path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
