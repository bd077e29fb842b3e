"""Drives the HTTP application over a real engine in this process: requests in, parsed answers out."""

import json
from typing import Any

import httpx

from model.text.tokenizer import Tokenizer

PROMPT = "Once upon a time there was a fox and a lantern in the deep forest. She told him a story."
EOS = 1
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


def body_for(endpoint: str, fields: dict[str, Any]) -> dict[str, Any]:
    """A body with a prompt, and `fields` beside or instead of it."""
    chat = {"messages": [{"role": "user", "content": PROMPT}]}
    return {**({"prompt": PROMPT} if endpoint == "completions" else chat), **fields}


async def post(live: httpx.AsyncClient, endpoint: str, **fields: object) -> dict[str, Any]:
    """The answer to a request for 12 tokens, unless `fields` say otherwise."""
    body = body_for(endpoint, {"seed": 7, "max_tokens": 12, "ignore_eos": True, **fields})
    answer = await live.post(PATHS[endpoint], json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def text_of(choice: dict[str, Any]) -> str:
    return choice["text"] if "text" in choice else choice["message"]["content"]


async def generate(live: httpx.AsyncClient, endpoint: str, **fields: object) -> str:
    return text_of((await post(live, endpoint, **fields))["choices"][0])


async def sampled(live: httpx.AsyncClient, endpoint: str, tokenizer: Tokenizer, **fields: object) -> list[str]:
    """The tokens of a completion, by their text."""
    body = await post(live, endpoint, **{"logprobs": 0 if endpoint == "completions" else True, **fields})
    logprobs = body["choices"][0]["logprobs"]
    if endpoint == "completions":
        return logprobs["tokens"]
    return [entry["token"] for entry in logprobs["content"]]


async def events(live: httpx.AsyncClient, endpoint: str, **fields: object) -> list[dict[str, Any]]:
    """The chunks of a stream, whose end must be `[DONE]`."""
    body = body_for(endpoint, {"seed": 7, "max_tokens": 12, "ignore_eos": True, "stream": True, **fields})
    answer = await live.post(PATHS[endpoint], json=body)
    *lines, done = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert done == "[DONE]", answer.text
    return [json.loads(line) for line in lines]


async def refusal(live: httpx.AsyncClient, endpoint: str, **fields: object) -> str:
    """The field that a refused request is refused for."""
    answer = await live.post(PATHS[endpoint], json=body_for(endpoint, fields))
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]["param"]
