"""The scheduler, its blocks and its prefix cache under any order of events: every invariant after every event."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from model.config import EngineConfig
from model.engine.request import Request
from model.engine.scheduler import ScheduledStep, Scheduler
from model.sampling.params import SamplingParams
from model.sampling.result import Sampled

EOS = 2
BLOCK_SIZE = 4
NUM_BLOCKS = 16  # 64 tokens: a quarter of what eight requests may want
BUDGET = 16


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, run, are aborted, expire and end in any order."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        config = EngineConfig(
            block_size=BLOCK_SIZE, max_num_batched_tokens=BUDGET, max_num_seqs=8, speculative_tokens=3
        )
        self.scheduler = Scheduler(config, NUM_BLOCKS, [EOS])
        self.count = 0
        self.now = 0.0
        self.live: dict[str, Request] = {}
        self.ended: list[Request] = []

    @rule(
        target=requests,
        length=st.integers(1, 40),
        family=st.integers(0, 2),
        max_tokens=st.integers(1, 24),
        priority=st.integers(-1, 1),
        patience=st.none() | st.integers(1, 30),
        salt=st.sampled_from(["", "a"]),
        leader=st.booleans(),
    )
    def add(self, length, family, max_tokens, priority, patience, salt, leader):
        self.count += 1
        first = 10 * family
        added = Request(
            str(self.count),
            [first + i % 7 for i in range(length)],  # it repeats itself, so there is something to guess
            SamplingParams(max_tokens=max_tokens),
            priority=priority,
            deadline=None if patience is None else self.now + patience,
            cache_salt=salt,
            leader=next(iter(self.live.values()), None) if leader else None,
        )
        self.live[added.request_id] = added
        self.scheduler.add(added)
        return added.request_id

    @rule(name=consumes(requests))
    def abort(self, name):
        gone = self.live.pop(name, None)
        assert self.scheduler.abort(name) == (gone is not None)
        if gone:
            self.ended.append(gone)

    @rule(token_id=st.sampled_from([3, 13, EOS, None]), follow=st.booleans(), steps=st.integers(1, 6))
    def advance(self, token_id, follow, steps):
        """`follow`: what is sampled agrees with what was guessed."""
        for _ in range(steps):
            self.now += 1
            for output in self.scheduler.expire(self.now):
                assert output.finish_reason == "deadline"
                request = self.live.pop(output.request_id)
                assert request.deadline <= self.now
                self.ended.append(request)
            scheduled = self.scheduler.schedule()
            self.check_step(scheduled)
            sampled = [
                draft if follow else token_id
                for item in scheduled.requests
                if item.num_samples
                for draft in (*item.draft_ids, token_id)
            ]
            for output in self.scheduler.commit(scheduled, Sampled(sampled)):
                if output.finish_reason:
                    self.ended.append(self.live.pop(output.request_id))

    def check_step(self, scheduled: ScheduledStep) -> None:
        assert scheduled.requests or not self.scheduler.has_work, "work waits, yet nothing is scheduled"
        assert scheduled.num_tokens <= BUDGET
        for item in scheduled.requests:
            assert item.request in self.scheduler.running
            assert item.num_tokens >= 1
            assert item.start == item.request.num_computed_tokens
            known = item.num_tokens - len(item.draft_ids)
            assert item.start + known <= item.request.num_tokens
            assert (item.num_samples > 0) == (item.start + known == item.request.num_tokens)
            assert len(item.request.block_table) * BLOCK_SIZE >= item.start + item.num_tokens

    @invariant()
    def every_block_is_accounted_for(self):
        self.scheduler.check_integrity()

    @invariant()
    def every_live_request_is_here_exactly_once_and_no_other(self):
        running = [request.request_id for request in self.scheduler.running]
        assert sorted([*running, *self.scheduler.waiting]) == sorted(self.live)
        assert all(not request.block_table for request in self.ended)

    @invariant()
    def no_two_tables_share_a_block_but_for_a_common_prefix_of_one_salt(self):
        owners: dict[int, object] = {}
        for request in self.scheduler.running:
            for index, block in enumerate(request.block_table):
                content = (request.cache_salt, request.token_ids[: (index + 1) * BLOCK_SIZE])
                assert owners.setdefault(block, content) == content

    @invariant()
    def at_least_the_last_known_token_of_a_running_request_is_not_computed(self):
        for request in self.scheduler.running:
            assert request.num_computed_tokens < request.num_tokens

    def teardown(self):
        for _ in range(3000):
            if not self.scheduler.has_work:
                break
            self.advance(3, False, 1)
        assert not self.scheduler.has_work, "livelock"
        assert self.scheduler.blocks.num_free == NUM_BLOCKS
        self.scheduler.check_integrity()


SchedulerMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)  # 10,000 steps
test_scheduler_invariants = SchedulerMachine.TestCase
