"""R14: a deadline passes. Who waits is never computed, who is being told is told no more, and blocks are free."""

import asyncio
import itertools
from types import SimpleNamespace

import httpx
import pytest

from model.config import EngineConfig
from model.engine import engine as engine_module
from model.engine.engine import Engine
from model.engine.request import Request
from model.sampling.params import SamplingParams
from tests.faults.conftest import MAX_RUNNING, scaled, settled
from tests.faults.streams import body, read
from tests.service.conftest import Running

pytestmark = [pytest.mark.slow, pytest.mark.faults]

LONG = 900


async def test_a_deadline_that_passes_in_the_queue_costs_nothing(small: Running) -> None:
    """An engine that looks at deadlines only once it has computed something, under an ingress that leaves them to it,
    would compute the prompt for nobody as soon as there is room.
    """
    async with httpx.AsyncClient(base_url=small.url, timeout=60) as client:
        for _ in range(scaled(1, 20)):
            running = [
                asyncio.create_task(read(client, body(small.model, number, LONG))) for number in range(MAX_RUNNING)
            ]
            await asyncio.to_thread(small.wait_for, "attendant_num_requests_running", MAX_RUNNING)
            looked_up = small.metrics()["attendant_prefix_cache_queries_total"]
            late = await read(client, body(small.model, 99, 8, deadline_ms=100))
            assert (late.status, late.error["code"]) == (408, "deadline_exceeded")
            assert small.metrics()["attendant_num_requests_running"] == MAX_RUNNING, "the queue stood all the time"
            for task in running:
                task.cancel()
            await asyncio.wait(running)
            await settled(small, 10)
            assert small.metrics()["attendant_prefix_cache_queries_total"] == looked_up, "its prompt was looked at"


async def test_a_deadline_that_passes_in_the_middle_ends_the_stream_with_an_error_of_its_own(small: Running) -> None:
    """Cut off without a word, it would look like a broken connection, and clients would ask again."""
    async with httpx.AsyncClient(base_url=small.url, timeout=60) as client:
        for number in range(scaled(2, 50)):
            story = await read(client, body(small.model, number, LONG, deadline_ms=400))
            assert story.status == 200
            assert story.text
            assert story.error["code"] == "deadline_exceeded"
            assert story.done
        await settled(small, 10)


def test_a_running_request_stops_at_the_first_step_behind_its_deadline(
    tiny_llama: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where deadlines are looked at every now and then, it goes on until the next look."""
    clock = itertools.count()  # a second passes with each look at it
    monkeypatch.setattr(engine_module, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    engine = Engine.from_checkpoint(tiny_llama[0], EngineConfig(kv_cache_tokens=1024))
    params = SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True)
    engine.add(Request("late", [5, 6, 7], params, deadline=10.0))
    outputs = []
    for _ in range(11):
        outputs += engine.step()
    assert sum(len(output.token_ids) for output in outputs) == 10, "at 0, 1 and so on to 9"
    assert outputs[-1].finish_reason == "deadline"
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks
    assert not engine.has_work
