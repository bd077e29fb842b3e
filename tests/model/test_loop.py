"""The engine's own thread: submit and abort from outside, failures that stay where they belong."""

import queue

import pytest

from model.config import EngineConfig
from model.engine.engine import Engine
from model.engine.loop import MAX_FAILED_STEPS, EngineLoop
from model.engine.request import Request, TokenOutput
from model.errors import GroupLost, InvalidRequest
from model.sampling.params import SamplingParams

ENDLESS = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)


class Listener:
    """Collects what a loop delivers."""

    def __init__(self) -> None:
        self.deliveries: queue.Queue = queue.Queue()

    def __call__(self, outputs, stats) -> None:
        self.deliveries.put((outputs, stats))

    def next_for(self, request_id: str) -> TokenOutput:
        while True:
            outputs, _ = self.deliveries.get(timeout=10)
            for output in outputs:
                if output.request_id == request_id:
                    return output

    def tokens(self, request_id: str) -> list[int]:
        tokens: list[int] = []
        while True:
            output = self.next_for(request_id)
            tokens += output.token_ids
            if output.finish_reason:
                return tokens


@pytest.fixture
def running(tiny_llama):
    engine = Engine.from_checkpoint(tiny_llama[0], EngineConfig(block_size=8))
    listener = Listener()
    loop = EngineLoop(engine, listener)
    loop.start()
    yield loop, listener
    loop.stop()
    assert not loop.is_alive


def test_a_request_from_another_thread_gets_the_tokens_of_a_plain_run(running, tiny_llama):
    loop, listener = running
    params = SamplingParams(max_tokens=10, temperature=1.0, seed=4, ignore_eos=True)
    loop.submit(Request("a", [5, 6, 7], params))
    plain = Engine.from_checkpoint(tiny_llama[0], EngineConfig(block_size=8))
    expected = [t for output in plain.generate(Request("a", [5, 6, 7], params)) for t in output.token_ids]
    assert listener.tokens("a") == expected


def test_an_abort_takes_effect_while_others_run_on(running):
    loop, listener = running
    loop.submit(Request("gone", [5], ENDLESS))
    loop.submit(Request("stays", [6], ENDLESS))
    listener.next_for("gone")
    loop.abort(["gone", "never-was"])
    assert len(listener.tokens("stays")) >= 1
    assert loop.engine.stats.num_running == 0
    assert loop.engine.scheduler.blocks.num_free == loop.engine.scheduler.blocks.num_blocks


def test_bad_input_is_refused_in_the_thread_of_the_caller(running):
    loop, _ = running
    with pytest.raises(InvalidRequest):
        loop.submit(Request("a", [10**6], ENDLESS))
    assert loop.is_alive


def test_one_failed_step_ends_its_requests_and_the_loop_goes_on(running, monkeypatch):
    loop, listener = running
    with monkeypatch.context() as patch:
        patch.setattr(loop.engine.runner, "forward", lambda batch: 1 / 0)
        loop.submit(Request("a", [5], ENDLESS))
        assert listener.next_for("a").finish_reason == "error"
    loop.submit(Request("b", [5], SamplingParams(max_tokens=3, ignore_eos=True)))
    assert len(listener.tokens("b")) == 3
    assert loop.failure is None


def test_a_lost_part_of_the_model_ends_the_loop_and_no_request(running, monkeypatch):
    """Who keeps the tokens of a request goes on with them elsewhere, unless it is told that the request failed."""
    loop, listener = running

    def lose(batch):
        raise GroupLost("gone")

    monkeypatch.setattr(loop.engine.runner, "forward", lose)
    loop.submit(Request("a", [5], ENDLESS))
    loop._thread.join(timeout=10)
    assert isinstance(loop.failure, GroupLost)
    assert listener.deliveries.empty()


def test_an_idle_loop_finds_a_lost_block_and_ends(running, monkeypatch):
    loop, listener = running
    loop.submit(Request("a", [5], SamplingParams(max_tokens=2, ignore_eos=True)))
    listener.tokens("a")
    loop.engine.scheduler.blocks.allocate(1)  # on nobody's table
    loop._thread.join(timeout=10)
    assert not loop.is_alive
    assert "reference counts disagree" in str(loop.failure)


def test_steps_that_keep_failing_end_the_loop_and_say_why(tiny_llama, monkeypatch):
    engine = Engine.from_checkpoint(tiny_llama[0], EngineConfig(max_num_seqs=1))
    monkeypatch.setattr(engine.runner, "forward", lambda batch: 1 / 0)
    listener = Listener()
    loop = EngineLoop(engine, listener)
    for i in range(MAX_FAILED_STEPS + 1):
        loop.submit(Request(str(i), [5], ENDLESS))
    loop.start()
    assert [listener.next_for(str(i)).finish_reason for i in range(MAX_FAILED_STEPS)] == ["error"] * MAX_FAILED_STEPS
    loop._thread.join(timeout=10)
    assert not loop.is_alive
    assert "in a row" in str(loop.failure)
