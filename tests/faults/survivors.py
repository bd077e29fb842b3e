"""Streams that are read while something is done to the service under them: what they said, and how long they paused."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.service.conftest import Running

PROMPT = "Once upon a time"


@dataclass
class Told:
    """One stream. pause: the longest time between two chunks, in seconds; error: the message of a typed one."""

    text: str = ""
    reason: str | None = None
    pause: float = 0.0
    error: str | None = None
    is_done: bool = False


async def tell(
    client: httpx.AsyncClient, running: Running, number: int, max_tokens: int, heard: Callable[[], object]
) -> Told:
    """Read one stream to its end, greedy or seeded by its number, and call `heard` with each chunk."""
    body = {
        "model": running.model,
        "prompt": f"{PROMPT} {number}",
        "max_tokens": max_tokens,
        "seed": number,
        "temperature": number % 2,
        "stream": True,
        "ignore_eos": True,
    }
    told, last = Told(), None
    async with client.stream("POST", f"{running.url}/v1/completions", json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                told.is_done = True
            elif data and "error" in (chunk := json.loads(data)):
                told.error = chunk["error"]["message"]
            elif data:
                now = time.perf_counter()
                told.pause = max(told.pause, now - (last or now))
                last = now
                told.text += chunk["choices"][0]["text"]
                told.reason = chunk["choices"][0]["finish_reason"]
                heard()
    return told


async def tell_all(
    running: Running, count: int, max_tokens: int, disturb: Callable[[], Awaitable[None]] | None = None
) -> list[Told]:
    """Read so many streams side by side. `disturb` is called once, when a quarter of what they say is out."""
    num_heard, due = 0, count * max_tokens // 4
    disturbing: list[asyncio.Task[None]] = []

    def heard() -> None:
        nonlocal num_heard
        num_heard += 1
        if disturb is not None and num_heard == due:
            disturbing.append(asyncio.ensure_future(disturb()))  # type: ignore[arg-type]

    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as client:
        streams = (tell(client, running, number, max_tokens, heard) for number in range(count))
        told = list(await asyncio.gather(*streams))
    for task in disturbing:
        await task
    assert disturb is None or disturbing, "the streams ended before anything was done to them"
    return told


async def until(condition: Callable[[], object], seconds: float) -> None:
    """Wait for a condition, which may take its time to look."""
    async with asyncio.timeout(seconds):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.1)


def steps_taken(running: Running) -> dict[str, float]:
    """By engine."""
    families = text_string_to_metric_families(httpx.get(f"{running.url}/metrics", timeout=10).text)
    samples = (sample for family in families for sample in family.samples)
    return {s.labels["replica"]: s.value for s in samples if s.name == "attendant_iteration_tokens_count"}


async def until_engines(running: Running, number: int) -> None:
    """Wait until so many engines get work: one that has only been started, or is not trusted yet, gets none."""
    async with asyncio.timeout(60):
        while True:
            before = await asyncio.to_thread(steps_taken, running)
            await tell_all(running, 4 * number, 2)
            after = await asyncio.to_thread(steps_taken, running)
            if sum(after[replica] > before.get(replica, 0) for replica in after) == number:
                return


def same(told: list[Told], undisturbed: list[Told]) -> int:
    """How many say what they would have said."""
    pairs = zip(told, undisturbed, strict=True)
    return sum((one.text, one.reason, one.is_done) == (other.text, other.reason, True) for one, other in pairs)


def pause_at(told: list[Told], share: float) -> float:
    """The pause that this share of streams did not exceed."""
    pauses = sorted(one.pause for one in told)
    return pauses[min(len(pauses) - 1, int(share * len(pauses)))]
