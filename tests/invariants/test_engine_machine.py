"""The whole engine under any order of events: what each request says is what it says undisturbed."""

from functools import cache

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from model.config import EngineConfig
from model.engine.engine import Engine
from model.engine.request import Request
from model.engine.transfer import PinnedTransfers
from model.sampling.params import SamplingParams
from tests.late_copies import LateCopies

PROMPT = [7, 100, 33, 250, 9, 61, 180, 44, 12, 305, 77, 201, 154, 18, 290, 5, 66, 131, 240, 88] * 2
COMMON = {"block_size": 4, "deterministic": True, "max_num_seqs": 6, "speculation_max_seqs": 3}


@pytest.fixture(scope="module", autouse=True)
def use_tiny_llama(tiny_llama):
    EngineMachine.directory = tiny_llama[0]


@cache
def undisturbed(directory, length: int, params_key: tuple) -> tuple[list[int], str]:
    """Tokens and end of a request that has a roomy engine to itself."""
    engine = Engine.from_checkpoint(directory, EngineConfig(**COMMON, prefix_cache=False))
    outputs = list(engine.generate(Request("a", PROMPT[:length], make_params(params_key))))
    return [token_id for output in outputs for token_id in output.token_ids], outputs[-1].finish_reason


def make_params(key: tuple) -> SamplingParams:
    max_tokens, temperature, seed, frequency_penalty = key
    return SamplingParams(
        max_tokens=max_tokens, temperature=temperature, seed=seed, frequency_penalty=frequency_penalty
    )


class EngineMachine(RuleBasedStateMachine):
    """Add, abort, preempt (the cache is small), let a deadline pass, move to another engine; compare at each end."""

    requests = Bundle("requests")
    directory = None
    options = {"speculative_tokens": 2}  # noqa: RUF012

    @initialize()
    def start(self):
        config = EngineConfig(**COMMON, kv_cache_tokens=96, max_num_batched_tokens=12, **self.options)
        self.engine = self.prepare(Engine.from_checkpoint(self.directory, config))
        self.count = 0
        self.live: dict[str, tuple[Request, list[int], tuple]] = {}

    def prepare(self, engine: Engine) -> Engine:
        return engine

    @rule(
        target=requests,
        length=st.integers(1, 40),
        max_tokens=st.integers(1, 16),
        temperature=st.sampled_from([0.0, 0.1, 1.0]),
        seed=st.integers(0, 1),
        penalty=st.sampled_from([0.0, 0.5]),
        salt=st.sampled_from(["", "a"]),
        priority=st.integers(0, 1),
        late=st.booleans(),
    )
    def add(self, length, max_tokens, temperature, seed, penalty, salt, priority, late):
        self.count += 1
        key = (max_tokens, temperature, seed, penalty)
        request = Request(
            str(self.count),
            PROMPT[:length],
            make_params(key),
            cache_salt=salt,
            priority=priority,
            deadline=0.0 if late and self.count % 5 == 0 else None,
        )
        self.engine.add(request)
        self.live[request.request_id] = (request, [], (length, key))
        return request.request_id

    @rule(name=consumes(requests))
    def abort(self, name):
        assert self.engine.abort(name) == (self.live.pop(name, None) is not None)

    @rule(name=consumes(requests), target=requests)
    def move(self, name):
        """The replica died: prompt and journal come to another one."""
        if name not in self.live:
            return name
        request, journal, expected = self.live.pop(name)
        self.engine.abort(name)
        self.count += 1
        moved = Request(str(self.count), PROMPT[: expected[0]], request.params, output_ids=journal)
        self.engine.add(moved)
        self.live[moved.request_id] = (moved, journal, expected)
        return moved.request_id

    @rule(steps=st.integers(1, 8))
    def advance(self, steps):
        for _ in range(steps):
            for output in self.engine.step():
                request, journal, (length, key) = self.live[output.request_id]
                journal += output.token_ids
                if output.finish_reason == "deadline":
                    assert request.deadline == 0.0
                elif output.finish_reason:
                    assert (journal, output.finish_reason) == undisturbed(self.directory, length, key)
                if output.finish_reason:
                    del self.live[output.request_id]

    @invariant()
    def nothing_is_lost(self):
        self.engine.check_integrity()

    def teardown(self):
        for _ in range(2000):
            if not self.engine.has_work:
                break
            self.advance(1)
        assert not self.live
        assert self.engine.scheduler.blocks.num_free == self.engine.scheduler.blocks.num_blocks


EngineMachine.TestCase.settings = settings(
    max_examples=12, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
test_engine_invariants = pytest.mark.slow(EngineMachine.TestCase)


class OverlappingEngineMachine(EngineMachine):
    """The same while each step is launched before the one before it is read, over copies that come late."""

    options = {"overlap": True}  # noqa: RUF012

    def prepare(self, engine: Engine) -> Engine:
        engine.runner.transfers = PinnedTransfers(LateCopies())
        return engine

    @rule(target=EngineMachine.requests, leader=EngineMachine.requests, seed=st.integers(2, 3))
    def add_sibling(self, leader, seed):
        """Another completion of a prompt, whose blocks it shares."""
        if leader not in self.live:
            return leader
        request, _, (length, key) = self.live[leader]
        self.count += 1
        key = (key[0], key[1], seed, key[3])
        sibling = Request(str(self.count), PROMPT[:length], make_params(key), leader=request)
        self.engine.add(sibling)
        self.live[sibling.request_id] = (sibling, [], (length, key))
        return sibling.request_id


OverlappingEngineMachine.TestCase.settings = EngineMachine.TestCase.settings
test_overlapping_engine_invariants = pytest.mark.slow(OverlappingEngineMachine.TestCase)
