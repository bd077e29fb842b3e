"""Scheduling, without a model: budgets, order, preemption, prefix hits."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from model.config import EngineConfig
from model.engine.request import Request
from model.engine.scheduler import Scheduler
from model.sampling.params import SamplingParams

EOS = 2


def make(num_blocks: int = 64, **config) -> Scheduler:
    settings = {"block_size": 4, "max_num_batched_tokens": 16, "max_num_seqs": 8} | config
    return Scheduler(EngineConfig(**settings), num_blocks, [EOS])


def request(name: str, length: int, max_tokens: int = 8, first: int = 10) -> Request:
    return Request(name, range(first, first + length), SamplingParams(max_tokens=max_tokens))


def step(scheduler: Scheduler, token_id: int = 7) -> list[tuple[str, int, int]]:
    """Take a step in which everyone who samples gets `token_id`: (request, start, tokens) of each."""
    scheduled = scheduler.schedule()
    scheduler.commit(scheduled, [token_id for item in scheduled.requests if item.samples])
    scheduler.check_integrity()
    return [(item.request.request_id, item.start, item.num_tokens) for item in scheduled.requests]


def test_a_long_prompt_is_computed_in_chunks_beside_running_decodes():
    scheduler = make(prefix_cache=False)
    scheduler.add(request("short", 3))
    assert step(scheduler) == [("short", 0, 3)]
    scheduler.add(request("long", 40))
    assert step(scheduler) == [("short", 3, 1), ("long", 0, 15)]
    assert step(scheduler) == [("short", 4, 1), ("long", 15, 15)]
    assert step(scheduler) == [("short", 5, 1), ("long", 30, 10)]
    assert step(scheduler) == [("short", 6, 1), ("long", 40, 1)]


def test_no_step_exceeds_its_budget_or_the_number_of_sequences():
    scheduler = make(max_num_seqs=4)
    for i in range(10):
        scheduler.add(request(str(i), 5 + i))
    while scheduler.has_work:
        taken = step(scheduler)
        assert sum(num_tokens for *_, num_tokens in taken) <= 16
        assert len(taken) <= 4


def test_requests_are_admitted_in_the_order_of_their_arrival():
    scheduler = make(max_num_seqs=1, max_num_batched_tokens=64)
    for name in "abc":
        scheduler.add(request(name, 5, max_tokens=1))
    assert [step(scheduler)[0][0] for _ in range(3)] == ["a", "b", "c"]


def test_a_small_request_does_not_overtake_one_that_waits_for_blocks():
    scheduler = make(num_blocks=8, max_num_batched_tokens=64)
    scheduler.add(request("running", 20))
    step(scheduler)
    scheduler.add(request("large", 20, first=100))
    scheduler.add(request("small", 2, first=200))
    assert [name for name, *_ in step(scheduler)] == ["running"]


def test_the_newest_request_is_preempted_and_goes_to_the_head_of_the_queue():
    scheduler = make(num_blocks=4, max_num_batched_tokens=64, prefix_cache=False)
    scheduler.add(request("old", 7, max_tokens=9))
    scheduler.add(request("new", 7, max_tokens=9, first=50))
    scheduler.add(request("waiting", 7, max_tokens=9, first=90))
    assert [name for name, *_ in step(scheduler)] == ["old", "new"]
    step(scheduler)
    assert [name for name, *_ in step(scheduler)] == ["old"]
    assert list(scheduler.waiting) == ["new", "waiting"]
    assert scheduler.num_preemptions == 1


def test_output_is_not_reserved_for():
    scheduler = make(num_blocks=4, max_num_batched_tokens=64)
    for i in range(4):
        scheduler.add(request(str(i), 3, max_tokens=12, first=20 * i))
    assert len(step(scheduler)) == 4


def test_a_prefix_is_found_by_its_tokens_and_its_past():
    scheduler = make(max_num_batched_tokens=64)
    scheduler.add(request("a", 12, max_tokens=1))
    step(scheduler)
    scheduler.add(request("same", 12, max_tokens=1))
    assert step(scheduler) == [("same", 8, 4)]
    scheduler.add(Request("shifted", [99, *range(10, 22)], SamplingParams(max_tokens=1)))
    assert step(scheduler) == [("shifted", 0, 13)]
    assert (scheduler.prefix.queried_tokens, scheduler.prefix.hit_tokens) == (37, 8)


def test_a_cached_block_is_lost_only_when_no_other_block_is_free():
    scheduler = make(num_blocks=4, max_num_batched_tokens=64)
    scheduler.add(request("a", 9, max_tokens=1))  # three blocks, two of them full
    step(scheduler)
    scheduler.add(request("b", 8, max_tokens=1, first=100))  # takes the unused one and the end of a's table
    step(scheduler)
    scheduler.add(request("again", 9, max_tokens=1))
    assert step(scheduler) == [("again", 8, 1)]


def test_the_end_of_sequence_stops_a_request_and_frees_its_blocks():
    scheduler = make()
    scheduler.add(request("a", 5))
    step(scheduler)
    assert step(scheduler, token_id=EOS) == [("a", 5, 1)]
    assert not scheduler.has_work
    assert scheduler.blocks.num_free == 64


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, run, are aborted and end in any order; after every step every block is accounted for."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = make(num_blocks=16)  # 64 tokens: a quarter of what eight requests may want
        self.count = 0
        self.live: dict[str, Request] = {}

    @rule(target=requests, length=st.integers(1, 40), family=st.integers(0, 2), max_tokens=st.integers(1, 24))
    def add(self, length, family, max_tokens):
        self.count += 1
        self.live[str(self.count)] = added = request(str(self.count), length, max_tokens, first=100 * family)
        self.scheduler.add(added)
        return str(self.count)

    @rule(name=consumes(requests))
    def abort(self, name):
        assert self.scheduler.abort(name) == (self.live.pop(name, None) is not None)

    @rule(token_id=st.sampled_from([7, 8, EOS]), steps=st.integers(1, 6))
    def advance(self, token_id, steps):
        for _ in range(steps):
            scheduled = self.scheduler.schedule()
            assert scheduled.requests or not self.scheduler.has_work, "work waits, yet nothing is scheduled"
            assert scheduled.num_tokens <= 16
            for item in scheduled.requests:
                assert item.num_tokens >= 1
                assert item.start + item.num_tokens <= item.request.num_tokens
                assert len(item.request.block_table) * 4 >= item.start + item.num_tokens
            outputs = self.scheduler.commit(scheduled, [token_id for item in scheduled.requests if item.samples])
            for output in outputs:
                if output.finish_reason:
                    self.live.pop(output.request_id)

    @invariant()
    def every_block_is_accounted_for(self):
        self.scheduler.check_integrity()

    @invariant()
    def every_live_request_is_here_exactly_once(self):
        running = [r.request_id for r in self.scheduler.running]
        assert sorted([*running, *self.scheduler.waiting]) == sorted(self.live)

    @invariant()
    def no_two_tables_share_a_block_that_is_not_a_common_prefix(self):
        owners: dict[int, list[int]] = {}
        for r in self.scheduler.running:
            for index, block in enumerate(r.block_table):
                tokens = r.token_ids[: (index + 1) * 4]
                assert owners.setdefault(block, tokens) == tokens

    def teardown(self):
        for _ in range(3000):
            if not self.scheduler.has_work:
                break
            self.advance(7, 1)
        assert not self.scheduler.has_work, "livelock"
        assert self.scheduler.blocks.num_free == 16


SchedulerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
test_scheduler_invariants = SchedulerMachine.TestCase
