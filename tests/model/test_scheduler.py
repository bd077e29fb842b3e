"""Scheduling, without a model: budgets, order, preemption, prefix hits."""

import gc
import subprocess
import sys

import pytest

from model.attention.weights import AttentionRequest, HeadWeights
from model.config import EngineConfig
from model.engine.request import Request
from model.engine.scheduler import Scheduler
from model.sampling.params import SamplingParams
from model.sampling.result import Sampled, TokenLogprobs

pytestmark = pytest.mark.fast

EOS = 2


def make(num_blocks: int = 64, longest_sharing_prompt: int | None = None, **config) -> Scheduler:
    settings = {"block_size": 4, "max_num_batched_tokens": 16, "max_num_seqs": 8} | config
    return Scheduler(EngineConfig(**settings), num_blocks, [EOS], longest_sharing_prompt)


def request(name: str, length: int, max_tokens: int = 8, first: int = 10, **fields) -> Request:
    return Request(name, range(first, first + length), SamplingParams(max_tokens=max_tokens), **fields)


def step(scheduler: Scheduler, token_id: int = 7) -> list[tuple[str, int, int]]:
    """Take a step in which everyone who samples gets `token_id`: (request, start, tokens) of each."""
    scheduled = scheduler.schedule()
    scheduler.commit(scheduled, Sampled([token_id] * sum(item.num_samples for item in scheduled.requests)))
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
    assert set(scheduler.waiting) == {"new", "waiting"}
    assert scheduler.num_preemptions == 1
    while "old" in [name for name, *_ in step(scheduler)]:
        pass
    assert [request.request_id for request in scheduler.running] == ["new"]


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


def test_a_more_important_request_goes_first_and_is_preempted_last():
    scheduler = make(num_blocks=4, max_num_batched_tokens=64, prefix_cache=False)
    scheduler.add(request("first", 7, max_tokens=9))
    scheduler.add(request("urgent", 7, max_tokens=9, first=50, priority=-1))
    scheduler.add(request("lazy", 1, max_tokens=9, first=90, priority=5))
    assert [name for name, *_ in step(scheduler)] == ["urgent", "first"]
    step(scheduler)
    assert [name for name, *_ in step(scheduler)] == ["urgent"]  # `first` came first, and still has to go
    assert [name for name, *_ in step(scheduler)] == ["urgent"]
    assert set(scheduler.waiting) == {"first", "lazy"}


def test_a_preempted_request_returns_to_its_own_place_in_the_queue():
    scheduler = make(num_blocks=4, max_num_batched_tokens=64, prefix_cache=False, max_num_seqs=2)
    for name, first in (("a", 10), ("b", 50), ("c", 90)):
        scheduler.add(request(name, 7, max_tokens=3, first=first))
    order = [[name for name, *_ in step(scheduler)] for _ in range(7)]
    # `a` ends with its third token; then `b` computes all it has again before `c` gets its turn.
    assert order == [["a", "b"], ["a", "b"], ["a"], ["b"], ["c"], ["c"], ["c"]]


def test_a_deadline_that_passes_in_the_queue_costs_no_computation():
    scheduler = make(max_num_seqs=1)
    scheduler.add(request("running", 5))
    scheduler.add(request("late", 5, deadline=10.0))
    step(scheduler)
    assert scheduler.expire(9.9) == []
    assert [(o.request_id, o.finish_reason) for o in scheduler.expire(10.0)] == [("late", "deadline")]
    while scheduler.has_work:
        assert "late" not in [name for name, *_ in step(scheduler)]


def test_a_deadline_that_passes_while_decoding_frees_the_blocks():
    scheduler = make()
    scheduler.add(request("a", 20, deadline=10.0))
    step(scheduler)
    assert [o.finish_reason for o in scheduler.expire(11.0)] == ["deadline"]
    assert scheduler.expire(12.0) == []
    assert not scheduler.has_work
    assert scheduler.blocks.num_free == 64


def test_a_request_that_has_ended_is_not_kept_until_its_deadline():
    """A prompt may be long, and a deadline a day away."""
    scheduler = make()
    for name in ("finished", "withdrawn"):
        scheduler.add(request(name, 5, max_tokens=1, deadline=1e9))
    scheduler.abort("withdrawn")
    step(scheduler)
    scheduler.take_departed()
    assert [kept.request_id for kept in gc.get_objects() if type(kept) is Request and kept.deadline == 1e9] == []


def test_a_deadline_ends_nobody_who_has_the_same_id_later():
    scheduler = make()
    scheduler.add(request("a", 5, deadline=10.0))
    scheduler.abort("a")
    scheduler.add(request("a", 5, deadline=20.0))
    assert scheduler.expire(15.0) == []
    assert [output.request_id for output in scheduler.expire(20.0)] == ["a"]


def test_a_deadline_of_a_request_that_has_ended_is_forgotten():
    scheduler = make()
    for i in range(2000):
        scheduler.add(request(str(i), 3, max_tokens=1, deadline=1e9))
        step(scheduler)
    assert len(scheduler._deadlines) + len(scheduler._queue) < 600


def test_another_salt_shares_no_prefix():
    scheduler = make(max_num_batched_tokens=64)
    for name, salt in (("a", "tenant 1"), ("b", "tenant 2"), ("c", "tenant 1")):
        scheduler.add(request(name, 12, max_tokens=1, cache_salt=salt))
    starts = []
    for _ in range(3):
        starts += step(scheduler)
    assert starts == [("a", 0, 12), ("b", 0, 12), ("c", 0, 12)]  # all in one step: nothing was cached yet
    scheduler.add(request("d", 12, max_tokens=1, cache_salt="tenant 2"))
    scheduler.add(request("e", 12, max_tokens=1, cache_salt="tenant 3"))
    assert step(scheduler) == [("d", 8, 4), ("e", 0, 12)]


def test_prompts_whose_keys_depend_on_their_length_share_only_among_equal_lengths():
    scheduler = make(longest_sharing_prompt=9, max_num_batched_tokens=64)
    for name, length in (("a", 12), ("b", 9)):
        scheduler.add(request(name, length, max_tokens=1))
    step(scheduler)
    for name, length in (("12", 12), ("13", 13), ("9", 9), ("8", 8)):
        scheduler.add(request(name, length, max_tokens=1))
    assert step(scheduler) == [("12", 8, 4), ("13", 0, 13), ("9", 8, 1), ("8", 4, 4)]


def test_followers_wait_for_the_prompt_of_their_leader_and_share_its_blocks():
    scheduler = make(num_blocks=20)
    leader = request("leader", 33, max_tokens=4)
    scheduler.add(leader)
    for i in range(3):
        scheduler.add(request(str(i), 33, max_tokens=4, leader=leader))
    assert step(scheduler) == [("leader", 0, 16)]
    assert step(scheduler) == [("leader", 16, 16)]
    assert step(scheduler) == [("leader", 32, 1)]
    assert step(scheduler) == [("leader", 33, 1), ("0", 32, 1), ("1", 32, 1), ("2", 32, 1)]
    assert 64 >= 20 - scheduler.blocks.num_free == 8 + 4  # eight shared blocks, and one of its own for each


def test_followers_go_on_when_their_leader_is_gone():
    scheduler = make()
    leader = request("leader", 40)
    scheduler.add(leader)
    scheduler.add(request("follower", 40, leader=leader))
    step(scheduler)
    scheduler.abort("leader")
    assert [name for name, *_ in step(scheduler)] == ["follower"]


def costs_of_a_step(num_waiting: int) -> int:
    """Python-level calls in one step of a full batch, with so many requests behind it."""
    scheduler = make(num_blocks=4096, max_num_seqs=8, max_num_batched_tokens=64)
    for i in range(8 + num_waiting):
        scheduler.add(request(str(i), 4, max_tokens=1000, deadline=1e9))
    step_once(scheduler)
    calls = 0

    def count(frame, event, argument) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        scheduler.expire(1.0)
        step_once(scheduler)
    finally:
        sys.setprofile(None)
    return calls


def step_once(scheduler: Scheduler) -> None:
    scheduled = scheduler.schedule()
    scheduler.commit(scheduled, Sampled([7] * sum(item.num_samples for item in scheduled.requests)))


def test_ten_thousand_waiting_requests_cost_a_step_no_more_than_a_hundred():
    assert costs_of_a_step(10_000) == costs_of_a_step(100) > 0


def test_guesses_that_come_true_are_kept_and_the_others_dropped():
    scheduler = make(speculative_tokens=3, prefix_cache=False, max_num_batched_tokens=64)
    scheduler.add(Request("a", [1, 5, 6, 7, 8, 9, 3, 5, 6], SamplingParams(max_tokens=20)))
    step(scheduler, token_id=7)  # ... 5 6 -> 7, as it went before: so 8, 9, 3 are guessed
    scheduled = scheduler.schedule()
    assert scheduled.requests[0].draft_ids == (8, 9, 3)
    assert scheduled.requests[0].num_samples == 4
    outputs = scheduler.commit(scheduled, Sampled([8, 9, 4, 77]))
    assert outputs[0].token_ids == [8, 9, 4]
    request = scheduler.running[0]
    assert request.token_ids[-4:] == [7, 8, 9, 4]
    assert request.num_computed_tokens == request.num_tokens - 1
    assert (scheduler.num_drafted, scheduler.num_accepted) == (3, 2)
    scheduler.check_integrity()


def test_a_request_that_ends_within_its_guesses_gives_nothing_behind_its_end():
    scheduler = make(speculative_tokens=3, max_num_batched_tokens=64)
    scheduler.add(Request("a", [1, 5, 6, 7, EOS, 9, 3, 5, 6], SamplingParams(max_tokens=20)))
    step(scheduler, token_id=7)
    scheduled = scheduler.schedule()
    assert scheduled.requests[0].draft_ids == (EOS, 9, 3)
    outputs = scheduler.commit(scheduled, Sampled([EOS, 9, 3, 5]))
    assert (outputs[0].token_ids, outputs[0].finish_reason) == ([EOS], "stop")
    assert scheduler.blocks.num_free == 64
    assert len(scheduler.prefix._block_by_hash) == 2  # eleven tokens fill two blocks of four


def test_guessing_stops_where_it_is_wrong_and_in_a_large_batch():
    scheduler = make(speculative_tokens=4, speculation_max_seqs=1, max_num_batched_tokens=64)
    scheduler.add(Request("a", [5, 6, 7, 8] * 3, SamplingParams(max_tokens=200, ignore_eos=True)))
    drafted = 0
    for i in range(60):
        scheduled = scheduler.schedule()
        drafted += len(scheduled.requests[0].draft_ids)
        wrong = [100 + i] if i % 2 else [5 + (i // 2) % 4]
        count = scheduled.requests[0].num_samples
        scheduler.commit(scheduled, Sampled((wrong * count)[:count]))
    assert drafted < 40
    scheduler.add(request("b", 3))
    assert all(not item.draft_ids for item in scheduler.schedule().requests)


def test_a_row_without_a_token_ends_its_request_alone():
    scheduler = make()
    scheduler.add(request("a", 5))
    scheduler.add(request("b", 5, first=50))
    scheduled = scheduler.schedule()
    outputs = scheduler.commit(scheduled, Sampled([None, 7]))
    assert [(o.request_id, o.token_ids, o.finish_reason) for o in outputs] == [("a", [], "error"), ("b", [7], None)]
    assert [r.request_id for r in scheduler.running] == ["b"]
    scheduler.check_integrity()


def test_a_step_that_failed_ends_its_requests_and_frees_their_blocks():
    scheduler = make()
    scheduler.add(request("a", 5))
    scheduler.schedule()
    scheduler.add(request("b", 5))
    assert [(o.request_id, o.finish_reason) for o in scheduler.fail()] == [("a", "error")]
    assert scheduler.blocks.num_free == 64
    assert [name for name, *_ in step(scheduler)] == ["b"]


def test_nothing_is_scheduled_behind_a_last_token_that_is_on_its_way():
    scheduler = make()
    scheduler.add(request("short", 3, max_tokens=1))
    scheduler.add(request("long", 3, max_tokens=8, first=50))
    launched = scheduler.schedule()
    behind = scheduler.schedule()
    assert [item.request.request_id for item in behind.requests] == ["long"]
    assert [output.finish_reason for output in scheduler.commit(launched, Sampled([7, 7]))] == ["length", None]
    assert [output.token_ids for output in scheduler.commit(behind, Sampled([8]))] == [[8]]
    scheduler.check_integrity()


def test_what_a_step_gives_to_a_request_that_was_aborted_meanwhile_is_dropped_and_its_blocks_go_free():
    scheduler = make(prefix_cache=False)
    scheduler.add(request("stays", 3))
    scheduler.add(request("leaves", 3, first=50))
    launched = scheduler.schedule()
    assert scheduler.abort("leaves")
    assert scheduler.blocks.num_free == 62  # the step still writes there
    assert [output.request_id for output in scheduler.commit(launched, Sampled([7, 8]))] == ["stays"]
    assert scheduler.blocks.num_free == 63
    scheduler.check_integrity()


def test_blocks_are_short_where_the_next_tokens_need_more_than_are_free_while_a_step_is_on_its_way():
    scheduler = make(num_blocks=2, max_num_batched_tokens=64, prefix_cache=False)
    scheduler.add(request("a", 4))
    scheduler.add(request("b", 4, first=50))
    launched = scheduler.schedule()
    assert scheduler.is_short
    scheduler.commit(launched, Sampled([7, 7]))
    assert not scheduler.is_short  # nothing is on its way that could give a block back

    scheduler = make(num_blocks=4, max_num_batched_tokens=64, prefix_cache=False)
    scheduler.add(request("a", 4))
    scheduler.add(request("b", 4, first=50))
    scheduler.schedule()
    assert not scheduler.is_short


def test_logprobs_go_to_those_who_asked():
    scheduler = make()
    scheduler.add(Request("asked", [5], SamplingParams(max_tokens=3, logprobs=0)))
    scheduler.add(request("silent", 5, first=50))
    item = TokenLogprobs(-0.5, [])
    outputs = scheduler.commit(scheduler.schedule(), Sampled([7, 8], [item, None]))
    assert [(o.request_id, o.logprobs) for o in outputs] == [("asked", [item]), ("silent", None)]


def test_weights_go_to_those_who_asked_one_for_each_token_that_stands():
    scheduler = make(speculative_tokens=2)
    look = AttentionRequest(layers=(0,), heads=(0,))
    scheduler.add(Request("asked", [1, 2, 3, 1, 2, 3, 1, 2], SamplingParams(max_tokens=9), attention=look))
    scheduler.add(request("silent", 5, first=50))
    first, *more = [[HeadWeights(0, 0, [i], [1.0])] for i in range(4)]
    outputs = scheduler.commit(scheduler.schedule(), Sampled([3, 8], attention=[first, None]))
    assert [(o.request_id, o.attention) for o in outputs] == [("asked", [first]), ("silent", None)]
    scheduled = scheduler.schedule()
    assert [item.draft_ids for item in scheduled.requests] == [(1, 2), ()]
    outputs = scheduler.commit(scheduled, Sampled([1, 9, 4, 8], attention=[*more, None]))
    assert [(o.token_ids, o.attention) for o in outputs] == [([1, 9], more[:2]), ([8], None)]


def test_the_runner_hears_of_every_request_that_stops_running():
    scheduler = make()
    for name in ("ends", "aborted", "runs"):
        scheduler.add(request(name, 5, max_tokens=1 if name == "ends" else 9))
    step(scheduler)
    scheduler.abort("aborted")
    assert {departed.request_id for departed in scheduler.take_departed()} == {"ends", "aborted"}
    assert scheduler.take_departed() == []


def test_a_stop_token_ends_the_request_even_when_the_end_of_sequence_is_ignored():
    scheduler = make()
    params = SamplingParams(max_tokens=8, ignore_eos=True, stop_token_ids=(7,))
    scheduler.add(Request("a", [5], params))
    step(scheduler, token_id=EOS)
    scheduled = scheduler.schedule()
    assert scheduler.commit(scheduled, Sampled([7]))[0].finish_reason == "stop"


def test_the_scheduler_runs_without_torch():
    modules = "model.engine.scheduler, model.cache.blocks, model.cache.prefix"
    subprocess.run([sys.executable, "-c", f"import {modules}, sys; assert 'torch' not in sys.modules"], check=True)
