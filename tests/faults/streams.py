"""Streams as a client reads them: every event, and whether the end was an end."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass
class Story:
    """What one stream gave. `status` 0: the connection broke before an answer. num_moves: for one with a receipt."""

    status: int = 0
    text: str = ""
    finish_reason: str | None = None
    error: Any = None
    done: bool = False
    headers: dict[str, str] = field(default_factory=dict)
    asked_at: float = 0.0
    answered_at: float = 0.0
    num_moves: int = 0
    arrivals: list[float] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        """It came to its natural end, and said so."""
        return self.status == 200 and self.done and self.finish_reason == "length" and self.error is None


def body(model: str, number: int, max_tokens: int, **fields: object) -> dict[str, object]:
    """A request for exactly `max_tokens`; even ones are greedy, odd ones drawn from their seed."""
    return {
        "model": model,
        "prompt": f"Once upon a time there were {number} foxes",
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
        "seed": number,
        "temperature": number % 2,
        **fields,
    }


async def events(response: httpx.Response) -> AsyncIterator[str]:
    """The data of each event."""
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


async def read(
    client: httpx.AsyncClient, request: dict[str, object], story: Story | None = None, pause: float = 0.0
) -> Story:
    """Follow one stream to its end, into `story` for who wants to look on, with a `pause` after each event."""
    story = story or Story()
    story.asked_at = time.perf_counter()
    try:
        async with client.stream("POST", "/v1/completions", json=request) as response:
            story.status, story.headers = response.status_code, dict(response.headers)
            story.answered_at = time.perf_counter()
            if response.status_code != 200:
                story.error = json.loads(await response.aread())["error"]
                return story
            async for data in events(response):
                story.arrivals.append(time.perf_counter())
                _take(story, data)
                if pause:
                    await asyncio.sleep(pause)
    except (httpx.HTTPError, json.JSONDecodeError) as broken:
        story.error = story.error or repr(broken)
    return story


def _take(story: Story, data: str) -> None:
    if data == "[DONE]":
        story.done = True
        return
    event = json.loads(data)
    if "error" in event:
        story.error = event["error"]
    elif event["choices"]:
        story.text += event["choices"][0]["text"]
        story.finish_reason = event["choices"][0]["finish_reason"]
    if "receipt" in event:
        story.num_moves = event["receipt"]["resumes"]
