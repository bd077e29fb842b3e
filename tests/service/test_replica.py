"""An engine replica with a real engine, in this process."""

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Callable
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from model.attention.weights import AttentionRequest
from model.engine.forward import NativeForward
from model.errors import Busy
from model.sampling.params import GrammarSpec, SamplingParams
from model.text.tokenizer import Tokenizer
from service import replica as replica_module
from service.autoscaling import Load
from service.balance import RouteHint, Standing
from service.channel import Output, Refused, Submission, Work
from service.replica import EngineReplica, Queue

OPTIONS: dict[str, Any] = {
    "dtype": "fp32",
    "device": "cpu",
    "max_num_seqs": 4,
    "kv_cache_tokens": 4096,
    "num_threads": 1,
}


def submission(name: str, *, max_tokens: int = 5, output_ids: tuple[int, ...] = (), prompt: int = 3) -> Submission:
    params = SamplingParams(max_tokens=max_tokens, seed=1, ignore_eos=True)
    return Submission(name, Work([5] * prompt, params), list(output_ids), bool(output_ids))


@pytest.fixture
async def replica(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[EngineReplica]:
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="r1"))
    monkeypatch.setattr(replica_module.serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(replica_module, "TURN_S", 0.01)
    monkeypatch.setattr("service.channel.SILENT_INGRESS_TURNS", 2_000)
    replica = EngineReplica(str(tiny_model), "tiny", OPTIONS, Queue(max_waiting=2))
    yield replica
    replica.__del__()


async def read(channel: AsyncIterator[list[Output]], until_finished: int) -> dict[str, list[int]]:
    """Tokens by request, until that many requests have finished."""
    tokens: dict[str, list[int]] = {}
    finished = 0
    async with asyncio.timeout(20):
        async for outputs in channel:
            for request_id, token_ids, reason, *_ in outputs:
                tokens.setdefault(request_id, []).extend(token_ids)
                finished += reason is not None
            if finished == until_finished:
                break
    return tokens


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def sample(replica: EngineReplica, name: str) -> float:
    lines = replica._metrics.expose().splitlines()
    return float(next(line for line in lines if line.startswith(f"attendant_{name}{{")).split()[-1])


async def test_a_replica_that_is_left_the_choice_computes_in_bf16_with_native_kernels(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="r1"))
    monkeypatch.setattr(replica_module.serve, "get_replica_context", lambda: context)
    replica = EngineReplica(str(tiny_model), "tiny", OPTIONS | {"dtype": "auto"}, Queue(max_waiting=2))
    assert isinstance(replica._engine.runner.compute, NativeForward)
    assert replica._engine.config.dtype == "bf16"
    replica.__del__()


async def test_outputs_that_came_before_the_channel_was_opened_are_not_lost(replica: EngineReplica) -> None:
    assert (await replica.submit("c", [submission("a")], RouteHint()))[:2] == ("r1", 0)
    await until(lambda: not replica._owners)
    assert len((await read(replica.channel("c", 0, "r1"), 1))["a"]) == 5


async def test_one_channel_carries_all_requests_of_its_ingress_and_no_others(replica: EngineReplica) -> None:
    await replica.submit("mine", [submission("a"), submission("b")], RouteHint())
    await replica.submit("theirs", [submission("c")], RouteHint())
    assert set(await read(replica.channel("mine", 0, "r1"), 2)) == {"a", "b"}


async def test_several_choices_of_one_prompt_compute_it_once(replica: EngineReplica) -> None:
    choices = [submission(name, prompt=49) for name in "abcd"]
    await replica.submit("c", choices, RouteHint())
    await read(replica.channel("c", 0, "r1"), 4)
    assert sample(replica, "prefix_cache_hits_total") == 3 * 48


async def test_a_resumed_request_goes_on_where_it_stopped(replica: EngineReplica) -> None:
    await replica.submit("c", [submission("whole", max_tokens=8)], RouteHint())
    whole = (await read(replica.channel("c", 0, "r1"), 1))["whole"]
    await replica.submit("d", [submission("rest", max_tokens=8, output_ids=tuple(whole[:3]))], RouteHint())
    assert (await read(replica.channel("d", 1, "r1"), 1))["rest"] == whole[3:]


async def test_the_end_of_a_channel_frees_what_its_ingress_had_running(replica: EngineReplica) -> None:
    await replica.submit("c", [submission("a", max_tokens=1000)], RouteHint())
    channel = replica.channel("c", 0, "r1")
    await anext(channel)
    await channel.aclose()
    assert not replica._owners, "aborted at once, not finished some time"
    await until(lambda: sample(replica, "num_requests_running") == 0)
    assert sample(replica, "kv_cache_usage_ratio") == 0


async def test_a_later_call_carries_a_channel_on_and_nothing_is_aborted(replica: EngineReplica) -> None:
    await replica.submit("c", [submission("a", max_tokens=200)], RouteHint())
    first, second = replica.channel("c", 0, "r1"), replica.channel("c", 0, "r1")
    got = await anext(first)
    later = asyncio.create_task(anext(second))
    got += [output for outputs in [item async for item in first] for output in outputs]
    got += await later
    while not any(finish_reason for _, _, finish_reason, _, _ in got):
        got += await anext(second)
    assert sum(len(token_ids) for _, token_ids, _, _, _ in got) == 200
    await second.aclose()
    assert replica._outboxes == {}


async def test_an_ingress_that_falls_silent_is_forgotten(
    replica: EngineReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.channel.SILENT_INGRESS_TURNS", 0)
    await replica.submit("c", [submission("a", max_tokens=1000)], RouteHint())
    await until(lambda: not replica._outboxes and not replica._owners)
    await until(lambda: sample(replica, "num_requests_running") == 0)


async def test_a_replica_that_is_to_go_finishes_what_it_has_though_serve_lets_no_pings_through(
    replica: EngineReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.channel.SILENT_INGRESS_TURNS", 2)
    monkeypatch.setattr(replica_module, "UNASKED_TURNS", 0)
    replica.check_health()  # and never again
    await replica.submit("c", [submission("a", max_tokens=1000)], RouteHint())
    assert len((await read(replica.channel("c", 0, "r1"), 1))["a"]) == 1000
    await until(lambda: not replica._outboxes)


async def test_an_engine_that_is_to_sleep_lets_go_of_an_ingress_that_has_nothing_running(
    replica: EngineReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica, "_idle_channel_s", 0.05)
    await replica.submit("c", [submission("a", max_tokens=200)], RouteHint())
    assert len((await read(replica.channel("c", 0, "r1"), until_finished=2))["a"]) == 200, "and not while it has"
    assert replica._outboxes == {}
    await replica.submit("c", [submission("b")], RouteHint())
    assert len((await read(replica.channel("c", 1, "r1"), until_finished=1))["b"]) == 5, "it may come back"


async def test_an_ingress_that_does_not_read_is_forgotten_before_it_fills_the_memory(
    replica: EngineReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.channel.MAX_UNREAD", 50)
    await replica.submit("c", [submission("a", max_tokens=1000)], RouteHint())
    channel = replica.channel("c", 0, "r1")
    await anext(channel)
    await until(lambda: not replica._owners)
    with pytest.raises(StopAsyncIteration):
        await anext(channel)


async def test_a_session_that_is_over_ends_at_once_and_leaves_the_next_one_alone(replica: EngineReplica) -> None:
    await replica.submit("c", [submission("a", max_tokens=1000)], RouteHint())
    old = replica.channel("c", 0, "r1")
    await anext(old)
    replica._outboxes["c"].close()
    assert (await replica.submit("c", [submission("b")], RouteHint()))[:2] == ("r1", 1)
    assert [item async for item in replica.channel("c", 0, "r1")] == []
    await old.aclose()
    assert len((await read(replica.channel("c", 1, "r1"), 1))["b"]) == 5


async def test_a_stuck_step_ends_the_channels_and_the_replica_is_well_when_it_goes_on(
    replica: EngineReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.step_watch.LEAST_S", 0.2)
    await replica.submit("c", [submission("a", max_tokens=1000)], RouteHint())
    channel = replica.channel("c", 0, "r1")
    await anext(channel)
    step, go_on = replica._engine.step, threading.Event()
    monkeypatch.setattr(replica._engine, "step", lambda: (go_on.wait(20), step())[1])
    async with asyncio.timeout(20):
        async for _ in channel:
            pass
    refused = await replica.submit("c", [submission("b")], RouteHint())
    assert isinstance(refused, Refused)
    assert refused.kind == "failed"
    with pytest.raises(RuntimeError, match="stuck"):
        replica.check_health()
    assert not await replica.ping("c", None, 0, "r1")
    go_on.set()
    await until(lambda: replica._is_well)
    await until(lambda: sample(replica, "num_requests_running") == 0)
    assert (await replica.submit("c", [submission("b")], RouteHint()))[:2] == ("r1", 1)
    assert len((await read(replica.channel("c", 1, "r1"), 1))["b"]) == 5


async def test_a_full_replica_refuses_and_starts_nothing(replica: EngineReplica) -> None:
    await replica.submit("c", [submission(str(i), max_tokens=900) for i in range(6)], RouteHint())
    refused = await replica.submit("c", [submission("late")], RouteHint())
    assert isinstance(refused, Refused)
    assert refused.kind == "overloaded"
    assert "late" not in replica._owners


async def test_with_each_answer_a_replica_says_how_full_it_is(replica: EngineReplica) -> None:
    accepted = await replica.submit("c", [submission(str(i), max_tokens=900) for i in range(5)], RouteHint())
    refused = await replica.submit("c", [submission("one"), submission("two")], RouteHint())
    assert accepted.occupancy is not None
    assert refused.occupancy is not None
    assert (accepted.occupancy.num_requests, accepted.occupancy.max_requests) == (5, 6)
    assert 5 * 890 < refused.occupancy.num_tokens <= accepted.occupancy.num_tokens <= 5 * 910
    assert refused.occupancy.num_requests == 5, "what was not taken is not in it"


async def test_a_refusal_for_load_says_when_to_come_back_and_why(replica: EngineReplica) -> None:
    replica._admission.observe(100, 1.0)  # tokens in a second
    await replica.submit("c", [submission(str(i), max_tokens=900) for i in range(6)], RouteHint())
    refused = await replica.submit("c", [submission("late")], RouteHint())
    assert isinstance(refused, Refused)
    assert refused.retry_after_s > 1
    assert 'reason="requests",replica="r1"} 1.0' in replica._metrics.expose()


async def test_the_backlog_in_tokens_is_bounded_too(replica: EngineReplica) -> None:
    # (4 running + 2 waiting) x a context of 1024 / 4
    await replica.submit("c", [submission("long", max_tokens=1000)], RouteHint())
    refused = await replica.submit("c", [submission("late", max_tokens=1000)], RouteHint())
    assert isinstance(refused, Refused)
    assert "1536 may be outstanding" in refused.message
    assert sample(replica, "backlog_tokens") > 1536 - 1000  # it works on: some of them are done by now


async def test_a_request_past_its_deadline_is_never_computed(replica: EngineReplica) -> None:
    late = submission("late")._replace(seconds_left=0.0)
    await replica.submit("c", [late], RouteHint())
    outputs = await anext(replica.channel("c", 0, "r1"))
    assert [(output[0], output[1], output[2]) for output in outputs] == [("late", [], "deadline")]
    assert "attendant_iteration_tokens_count" in replica._metrics.expose()
    assert sample(replica, "iteration_tokens_sum") == 0


async def test_a_deadline_that_passes_in_decode_ends_the_request_and_frees_its_blocks(replica: EngineReplica) -> None:
    await replica.submit("c", [submission("a", max_tokens=1000)._replace(seconds_left=0.1)], RouteHint())
    tokens, reason = 0, None
    async with asyncio.timeout(20):
        async for outputs in replica.channel("c", 0, "r1"):
            tokens += sum(len(output[1]) for output in outputs)
            reason = outputs[-1][2] if outputs else None
            if reason:
                break
    assert reason == "deadline"
    assert tokens < 1000
    await until(lambda: sample(replica, "kv_cache_usage_ratio") == 0)


async def test_who_has_priority_is_computed_first(replica: EngineReplica) -> None:
    await replica.submit("c", [submission(str(i), max_tokens=200) for i in range(4)], RouteHint())
    last, first = submission("last", max_tokens=1), submission("first", max_tokens=1)
    await replica.submit("c", [last._replace(work=last.work._replace(priority=1))], RouteHint())
    await replica.submit("c", [first._replace(work=first.work._replace(priority=-1))], RouteHint())
    ended = []
    async with asyncio.timeout(20):
        async for outputs in replica.channel("c", 0, "r1"):
            ended += [output[0] for output in outputs if output[2]]
            if len(ended) == 6:
                break
    assert ended.index("first") < ended.index("last")


async def test_a_stream_that_lost_its_replica_is_taken_by_a_full_one(replica: EngineReplica) -> None:
    await replica.submit("c", [submission(str(i), max_tokens=900) for i in range(6)], RouteHint())
    assert (await replica.submit("c", [submission("moved", output_ids=(7,))], RouteHint()))[:2] == ("r1", 0)


async def test_one_bad_request_of_several_starts_none_of_them(replica: EngineReplica) -> None:
    refused = await replica.submit("c", [submission("good"), submission("long", prompt=2000)], RouteHint())
    assert isinstance(refused, Refused)
    assert (refused.kind, refused.param) == ("invalid", "prompt")
    assert not replica._owners


async def test_what_was_never_accepted_is_not_told_of(replica: EngineReplica, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "service.replica")
    await replica.submit("c", [submission("good"), submission("long", prompt=2000)], RouteHint())
    assert "done" not in caplog.messages


def constrained(name: str, spec: GrammarSpec) -> Submission:
    return Submission(name, Work([5] * 3, SamplingParams(max_tokens=30, seed=1), spec), [], False)


async def test_an_output_keeps_to_its_grammar(replica: EngineReplica, tiny_model: Path) -> None:
    spec = GrammarSpec("choice", '["red", "green"]')
    assert (await replica.submit("c", [constrained("a", spec)], RouteHint()))[:2] == ("r1", 0)
    token_ids = (await read(replica.channel("c", 0, "r1"), 1))["a"]
    assert Tokenizer.from_directory(tiny_model).decode(token_ids) in ("red", "green")


async def test_a_grammar_that_cannot_be_compiled_is_refused_before_anything_starts(replica: EngineReplica) -> None:
    refused = await replica.submit("c", [constrained("a", GrammarSpec("json_schema", '{"not": {}}'))], RouteHint())
    assert isinstance(refused, Refused)
    assert (refused.kind, refused.param) == ("invalid", "response_format")
    assert not replica._owners


async def test_where_too_many_grammars_are_compiled_a_client_is_told_to_come_back(
    replica: EngineReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(spec: GrammarSpec) -> None:
        raise Busy("too many")

    monkeypatch.setattr(replica._grammars, "_compile_one", busy)
    refused = await replica.submit("c", [constrained("a", GrammarSpec("json_object"))], RouteHint())
    assert isinstance(refused, Refused)
    assert (refused.kind, refused.retry_after_s, refused.param) == ("overloaded", 1, None)
    assert re.search(r'admission_rejections_total{.*reason="grammars".*} 1.0', replica._metrics.expose())
    assert not replica._owners


async def test_a_request_that_is_aborted_while_its_grammar_compiles_never_starts(
    replica: EngineReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammars, go_on = replica._grammars, threading.Event()
    compile_one = grammars._compile_one
    monkeypatch.setattr(grammars, "_compile_one", lambda spec: (go_on.wait(20), compile_one(spec))[1])
    submitting = asyncio.create_task(replica.submit("c", [constrained("a", GrammarSpec("json_object"))], RouteHint()))
    await until(lambda: grammars.waiting)
    await replica.abort(["a"])
    go_on.set()
    await submitting
    assert not replica._owners


async def test_details_cross_the_channel_for_those_who_ask(replica: EngineReplica) -> None:
    params = SamplingParams(max_tokens=2, seed=1, ignore_eos=True, logprobs=1, prompt_logprobs=0)
    work = Work([5] * 3, params, attention=AttentionRequest((1,), (0,), 2))
    await replica.submit("c", [Submission("a", work, [], False), submission("b")], RouteHint())
    found = {"a": [], "b": []}
    async with asyncio.timeout(20):
        async for outputs in replica.channel("c", 0, "r1"):
            for request_id, _, _, _, details in outputs:
                found[request_id].append(details)
            if not replica._owners:
                break
    assert found["b"][:-1] == [None] * 4
    last = found["b"][-1]
    assert last[:3] == (None, None, None), "only how long the engine had it, which every request is told at its end"
    assert last.engine_seconds > 0
    assert len(found["a"][0].prompt_logprobs) == 3
    assert found["a"][0].prompt_logprobs[0] is None
    assert [len(entry.top) for details in found["a"] for entry in details.logprobs] == [1, 1]
    assert [len(head.weights) for details in found["a"] for token in details.attention for head in token] == [2, 2]


async def test_a_replica_says_how_it_stands(replica: EngineReplica) -> None:
    assert Standing(**replica.record_routing_stats()) == Standing()
    for i in range(6):
        await replica.submit("c", [submission(str(i), max_tokens=200, prompt=40)], RouteHint())
    await until(lambda: Standing(**replica.record_routing_stats())[:2] == (4, 2))
    standing = Standing(**replica.record_routing_stats())
    assert standing.is_full
    assert standing.pending_tokens == 2 * 40
    assert 0 < standing.kv_usage < 1


async def test_a_replica_says_what_of_it_is_scarce(replica: EngineReplica) -> None:
    assert Load(**replica.record_autoscaling_stats()).of_one(max_wait_s=2) == 0
    for i in range(6):
        await replica.submit("c", [submission(str(i), max_tokens=200, prompt=40)], RouteHint())
    said: list[Load] = []
    await until(lambda: said.append(Load(**replica.record_autoscaling_stats())) or said[-1][:2] == (4, 2))
    load = said[-1]
    assert (load.max_running, load.pending_tokens, load.pending_kv) == (4, 80, 80 / 4096)
    assert load.tokens_per_second > 0
    assert load.of_one(max_wait_s=1e9) == 6 / 4


async def test_a_dead_engine_ends_the_channels_and_fails_the_health_check(replica: EngineReplica) -> None:
    await replica.submit("c", [submission("a", max_tokens=1000)], RouteHint())
    channel = replica.channel("c", 0, "r1")
    await anext(channel)
    replica._loop.stop()
    async with asyncio.timeout(20):
        async for _ in channel:
            pass
    with pytest.raises(RuntimeError, match="engine thread is dead"):
        replica.check_health()
    refused = await replica.submit("c", [submission("b")], RouteHint())
    assert isinstance(refused, Refused)
    assert refused.kind == "failed"


async def test_a_timed_request_has_a_receipt_once_and_others_have_none(
    replica: EngineReplica, tiny_model: Path
) -> None:
    timed = [submission(name, prompt=300)._replace(timed=True) for name in "ab"]
    await replica.submit("c", [*timed], RouteHint())
    await replica.submit("c", [submission("plain")], RouteHint())
    await read(replica.channel("c", 0, "r1"), 3)
    receipt = await replica.receipt("a", "r1")
    assert receipt is not None
    assert receipt.queue is not None
    assert receipt.prefill is not None
    assert receipt.prefill > 0
    assert receipt.decode is not None
    assert receipt.decode > 0
    assert receipt.weights_sha256 == sha256((tiny_model / "model.safetensors").read_bytes()).hexdigest()
    assert await replica.receipt("a", "r1") is None
    assert await replica.receipt("plain", "r1") is None
    assert not replica._timings
    assert not replica._unstarted
