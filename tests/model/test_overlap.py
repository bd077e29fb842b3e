"""Steps that overlap: launched before the last one is read, and what that must not change."""

from pathlib import Path

import numpy as np
import pytest
import torch

from model.config import EngineConfig
from model.engine.engine import Engine
from model.engine.request import Request
from model.engine.scheduler import Scheduler
from model.engine.transfer import BUFFERS, DirectTransfers, PinnedTransfers, packed_bytes, unpacked
from model.sampling.params import SamplingParams
from model.sampling.result import Sampled
from tests.late_copies import LateCopies

pytestmark = pytest.mark.fast

PROMPT = list(range(40, 60))
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
EOS = 2


class Recorded:
    """An engine whose launches and readings are written down, by the number of the step."""

    def __init__(self, directory: Path, **options: object) -> None:
        config = EngineConfig(block_size=4, **{"overlap": True, "kv_cache_tokens": 400} | options)
        self.engine = Engine.from_checkpoint(directory, config)
        self.engine.runner.transfers = PinnedTransfers(LateCopies())
        self.events: list[str] = []
        sample, read = self.engine.runner.sample, self.engine.runner.read
        flights = []

        def launch(*args):
            self.events.append(f"launch {len(flights)}")
            flights.append(sample(*args))
            return flights[-1]

        def take_in(flight):
            self.events.append(f"read {flights.index(flight)}")
            return read(flight)

        self.engine.runner.sample, self.engine.runner.read = launch, take_in

    def run(self, *requests: Request) -> dict[str, list[int]]:
        outputs: dict[str, list[int]] = {request.request_id: [] for request in requests}
        for request in requests:
            self.engine.add(request)
        while self.engine.has_work:
            for output in self.engine.step():
                outputs[output.request_id] += output.token_ids
        return outputs


def test_a_step_is_launched_before_the_one_before_it_is_read(tiny_llama):
    recorded = Recorded(tiny_llama[0])
    overlapped = recorded.run(Request("a", PROMPT, SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)))
    assert recorded.events == ["launch 0", "launch 1", "read 0", "launch 2", "read 1", "read 2"]
    one_by_one = Recorded(tiny_llama[0], overlap=False)
    assert (
        one_by_one.run(Request("a", PROMPT, SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)))
        == overlapped
    )
    assert one_by_one.events == ["launch 0", "read 0", "launch 1", "read 1", "launch 2", "read 2"]


@pytest.mark.parametrize("asked", ["logprobs", "prompt_logprobs"])
def test_what_the_host_must_see_is_read_before_the_next_launch(tiny_llama, asked):
    recorded = Recorded(tiny_llama[0])
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True, **{asked: 1})
    recorded.run(Request("a", PROMPT, params))
    assert recorded.events == ["launch 0", "read 0", "launch 1", "read 1"]


def test_a_plain_request_overlaps_again_once_the_other_has_gone(tiny_llama):
    recorded = Recorded(tiny_llama[0])
    shown = SamplingParams(max_tokens=1, temperature=0.0, logprobs=1)
    recorded.run(Request("a", PROMPT, GREEDY), Request("b", PROMPT[:5], shown))
    assert recorded.events[:5] == ["launch 0", "read 0", "launch 1", "launch 2", "read 1"]


def test_penalties_see_the_token_that_is_on_its_way(tiny_llama):
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, frequency_penalty=2.0)
    asked = [Request("a", PROMPT, params), Request("b", PROMPT[:9], params)]
    again = [Request("a", PROMPT, params), Request("b", PROMPT[:9], params)]
    plain = Recorded(tiny_llama[0]).run(
        Request("a", PROMPT, SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True))
    )
    overlapped = Recorded(tiny_llama[0]).run(*asked)
    assert overlapped == Recorded(tiny_llama[0], overlap=False).run(*again)
    assert overlapped["a"] != plain["a"]


def test_a_request_that_is_preempted_while_steps_overlap_says_the_same(tiny_llama):
    asked = {
        name: (PROMPT[: 9 + i], SamplingParams(max_tokens=24, seed=i, ignore_eos=True)) for i, name in enumerate("abc")
    }
    small = Recorded(tiny_llama[0], kv_cache_tokens=72, deterministic=True)
    overlapped = small.run(*(Request(name, *request) for name, request in asked.items()))
    assert small.engine.stats.num_preemptions > 0
    roomy = Recorded(tiny_llama[0], overlap=False, deterministic=True)
    assert roomy.run(*(Request(name, *request) for name, request in asked.items())) == overlapped


def test_a_step_that_fails_ends_those_of_both_steps_on_their_way_and_loses_nothing_told_before(tiny_llama):
    recorded = Recorded(tiny_llama[0])
    engine = recorded.engine
    engine.add(Request("a", PROMPT, GREEDY))
    engine.add(Request("gone", PROMPT[:9], GREEDY))
    engine.step()
    engine.abort("gone")  # its blocks go free with the step that is on its way
    engine.add(Request("late", PROMPT, GREEDY, deadline=0.0))
    engine.add(Request("b", PROMPT[:7], GREEDY))
    forward, engine.runner.forward = engine.runner.forward, None
    with pytest.raises(TypeError):
        engine.step()
    ended = {output.request_id: output.finish_reason for output in engine.fail_step()}
    assert ended == {"late": "deadline", "a": "error", "b": "error"}
    engine.check_integrity()
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks
    engine.runner.forward = forward
    assert len(recorded.run(Request("c", PROMPT, GREEDY))["c"]) == 8


def make_scheduler(num_blocks: int = 20) -> Scheduler:
    return Scheduler(EngineConfig(block_size=4), num_blocks, [EOS])


def make_request(name: str, length: int, max_tokens: int = 10) -> Request:
    return Request(name, range(10, 10 + length), SamplingParams(max_tokens=max_tokens))


def test_a_decode_is_scheduled_behind_a_token_that_is_still_unread():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 5))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert [(item.start, item.num_tokens, item.is_unread) for item in second.requests] == [(5, 1, True)]
    assert [output.token_ids for output in scheduler.commit(first, Sampled([7]))] == [[7]]
    assert [output.token_ids for output in scheduler.commit(second, Sampled([8]))] == [[8]]
    assert scheduler.running[0].token_ids[5:] == [7, 8]


def test_nothing_is_launched_behind_the_last_token_a_request_may_have():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 5, max_tokens=1))
    scheduler.add(make_request("b", 5, max_tokens=2))
    scheduler.schedule()
    assert [item.request.request_id for item in scheduler.schedule().requests] == ["b"]


def test_blocks_of_a_request_that_left_go_free_only_when_its_last_step_has_come_in():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 9))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert scheduler.abort("a")
    for step, free in ((first, 17), (second, 20)):
        scheduler.check_integrity()
        assert scheduler.blocks.num_free == 17
        assert scheduler.commit(step, Sampled([7])) == []
        assert scheduler.blocks.num_free == free
    assert not scheduler.has_work


def test_a_token_behind_the_end_of_a_request_is_dropped():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 5))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert scheduler.commit(first, Sampled([EOS]))[0].finish_reason == "stop"
    assert scheduler.commit(second, Sampled([9])) == []
    assert scheduler.blocks.num_free == 20


def test_what_was_launched_before_a_preemption_is_dropped_though_the_request_runs_again():
    scheduler = make_scheduler(num_blocks=4)
    scheduler.add(make_request("a", 8))
    scheduler.add(make_request("b", 7))
    first = scheduler.schedule()
    victim = scheduler.running[1]
    # "a" begins a third block: "b" has to go, and as its blocks are not free yet, so has "a" (an engine waits instead).
    second = scheduler.schedule()
    assert [item.request.request_id for item in second.requests] == []
    assert scheduler.num_preemptions == 2
    assert scheduler.commit(first, Sampled([7, 8])) == []
    assert victim.num_output_tokens == 0
    again = scheduler.schedule()
    assert [item.start for item in again.requests] == [0, 0]
    assert [output.token_ids for output in scheduler.commit(again, Sampled([7, 8]))] == [[7], [8]]


def test_where_blocks_are_short_it_is_better_to_wait_for_what_is_on_its_way():
    scheduler = make_scheduler(num_blocks=4)
    scheduler.add(make_request("a", 8))
    scheduler.add(make_request("b", 8))
    assert not scheduler.is_short  # nothing is on its way
    first = scheduler.schedule()
    assert scheduler.is_short
    scheduler.commit(first, Sampled([EOS, 8]))
    assert not scheduler.is_short
    assert [item.request.request_id for item in scheduler.schedule().requests] == ["b"]
    assert scheduler.num_preemptions == 0


def test_arrays_of_all_kinds_and_sizes_come_through_one_packed_copy():
    arrays = [np.arange(5), np.zeros((0, 2), np.int32), np.arange(6, dtype=np.int32).reshape(2, 3), np.array([0.5])]
    for transfers in (PinnedTransfers(LateCopies()), DirectTransfers(torch.device("cpu"))):
        for found, array in zip(transfers.send(arrays), arrays, strict=True):
            assert torch.equal(found, torch.from_numpy(array))
    many = np.arange(100_000)
    assert torch.equal(PinnedTransfers(LateCopies()).send([many])[0], torch.from_numpy(many))


def test_arrays_fill_a_given_buffer_as_they_are_read_there_and_no_byte_more():
    arrays = [np.arange(5, dtype=np.int32), np.array([0.5, 2.0]), np.arange(6, dtype=np.int32).reshape(2, 3)]
    for transfers in (PinnedTransfers(LateCopies()), DirectTransfers(torch.device("cpu"))):
        target = torch.full((packed_bytes(arrays),), 3, dtype=torch.uint8)
        there = unpacked(target, arrays)
        transfers.fill(target, [*arrays[:2], arrays[2][:1]])
        for found, array in zip(there[:2], arrays, strict=False):
            assert torch.equal(found, torch.from_numpy(array))
        assert there[2][0].tolist() == [0, 1, 2]
        transfers.fill(target, [7 * arrays[0]])
        assert (there[0].tolist(), there[1].tolist()) == ([0, 7, 14, 21, 28], [0.5, 2.0])


def test_a_staging_buffer_is_not_written_again_before_its_copy_has_completed():
    copies = LateCopies()
    transfers = PinnedTransfers(copies)
    for turn in range(BUFFERS):
        transfers.send([np.full(9, turn)])
    assert copies.num_waits == 0  # each has a buffer of its own
    transfers.send([np.full(9, 77)])
    assert copies.num_waits == 1


def test_what_is_fetched_is_there_once_it_was_waited_for_whatever_was_begun_since():
    transfers = PinnedTransfers(LateCopies())
    waiting = [transfers.fetch(torch.tensor([turn, turn + 1])) for turn in range(BUFFERS)]
    fetched = [wait() for wait in waiting]
    for _ in range(BUFFERS):
        transfers.fetch(torch.tensor([77, 78]))()
    assert [ids.tolist() for ids in fetched] == [[turn, turn + 1] for turn in range(BUFFERS)]
