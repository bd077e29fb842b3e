"""S4: numbers and lists that would fill the memory: a 400 within 50 ms of work, and nothing allocated for them."""

import asyncio
import gc
import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from tests.faults.conftest import Answer, InProcess

pytestmark = pytest.mark.faults

STALL_LIMIT_S = 0.050
WORK_LIMIT_S = 0.5
ROOM_BYTES = 1 << 20

HOSTILE: dict[str, dict[str, Any]] = {
    "n": {"n": 10**6},
    "best_of": {"best_of": 10**6},
    "max_tokens": {"max_tokens": 2**63},
    "min_tokens": {"min_tokens": 2**31 - 1},
    "logprobs": {"logprobs": 10**6},
    "prompt_logprobs": {"prompt_logprobs": 10**6},
    "top_k": {"top_k": 2**63},
    "seed": {"seed": 2**64},
    "priority": {"priority": 2**63},
    "stop strings": {"stop": ["x"] * 100_000},
    "a stop string": {"stop": "x" * 100_000},
    "stop token ids": {"stop_token_ids": [5] * 100_000},
    "logit_bias": {"logit_bias": {str(i): 1 for i in range(60_000)}},
    "prompts": {"prompt": ["x"] * 100_000},
    "prompts of token ids": {"prompt": [[5]] * 100_000},
    "token ids": {"prompt": [5] * 140_000},
    "choices": {"structured_outputs": {"choice": ["x"] * 100_000}},
    "deadline": {"deadline_ms": 2**63},
}


def hostile_chats() -> dict[str, dict[str, Any]]:
    deep: dict[str, Any] = {}
    for _ in range(60):
        deep = {"properties": {"a": deep}}
    wide = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}, "x": "y" * 70_000}
    tool = {"type": "function", "function": {"name": "f", "parameters": wide}}
    return {
        "messages": {"messages": [{"role": "user", "content": "x"}] * 20_000},
        "parts": {"messages": [{"role": "user", "content": [{"type": "image_url"}] * 20_000}]},
        "a deep schema": {"response_format": schema_of(deep)},
        "a large schema": {"response_format": schema_of(wide)},
        "large tools": {"tools": [tool]},
        "many tools": {"tools": [tool] * 100},
        "top_logprobs": {"logprobs": True, "top_logprobs": 10**6},
    }


def schema_of(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}


@pytest.mark.parametrize("what", HOSTILE)
async def test_a_number_out_of_all_proportion_is_refused_at_once(
    in_process: Callable[..., InProcess], what: str
) -> None:
    """Without bounds on `n` or on lists, the request object or pydantic's own errors fill gigabytes first."""
    await refuse(in_process(), "/v1/completions", {"prompt": "x", "max_tokens": 4, **HOSTILE[what]})


@pytest.mark.parametrize("what", hostile_chats())
async def test_a_chat_out_of_all_proportion_is_refused_at_once(in_process: Callable[..., InProcess], what: str) -> None:
    """Without `Limits.check`, the schemas and tools go on to the compiler."""
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
    answer = await refuse(in_process(), "/v1/chat/completions", {**chat, **hostile_chats()[what]})
    words = (b"at most", b"more than", b"exceeds", b"less than or equal")
    assert what == "parts" or any(word in answer.body for word in words), answer.body


async def forgotten() -> None:
    """Until nothing is left of a refused body. The thread that read it may let go of it after the answer is out."""
    kept = ROOM_BYTES
    for _ in range(200):
        gc.collect()
        kept, _ = tracemalloc.get_traced_memory()
        if kept < ROOM_BYTES:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"the refusal leaves {kept} bytes behind")


async def refuse(service: InProcess, path: str, body: dict[str, Any]) -> Answer:
    raw = json.dumps(body).encode()
    await service.post(path, b"{}")  # what is imported and cached at the first request is no matter here
    tracemalloc.start()
    try:
        answer = await service.post(path, raw)
        await forgotten()
    finally:
        tracemalloc.stop()
    assert answer.status == (413 if len(raw) > 1 << 20 else 400), answer.body
    assert not service.fleet.replicas["a"].submitted
    answer = await service.post(path, raw)  # without tracemalloc, which slows it down
    assert answer.stall < STALL_LIMIT_S
    assert answer.work < WORK_LIMIT_S
    return answer
