"""The sums that are kept as streams come, move and go are those that counting all of them would give."""

import random
import uuid

import pytest

from model.sampling.params import SamplingParams
from service.affinity import BLOCK_TOKENS
from service.channel import Accepted, Share, Work
from service.open_streams import OpenStreams, leaders_of
from service.streams import Stream
from service.telemetry import NO_TRAIL


def stream(num_prompt_tokens: int, max_tokens: int) -> Stream:
    work = Work(list(range(num_prompt_tokens)), SamplingParams(max_tokens=max_tokens, seed=1))
    one = Stream(uuid.uuid4().hex, 0, work, None, False, NO_TRAIL, lambda piece: None)
    one.new_attempt()
    return one


def counted(streams: list[Stream]) -> dict[str | None, Share]:
    shares: dict[str | None, Share] = {}
    for one in streams:
        before = shares.get(one.replica_id, Share())
        shares[one.replica_id] = Share(before.num_requests + 1, before.num_tokens + one.outstanding_tokens)
    return shares


@pytest.mark.parametrize("seed", range(5))
def test_the_sums_stay_those_of_the_streams_whatever_happens(seed: int) -> None:
    draw, book = random.Random(seed), OpenStreams()
    alive: list[Stream] = []
    for _ in range(400):
        unanswered = [one for one in alive if one.replica_id is None]
        act = draw.choice(("add", "accept", "say", "say", "say", "end", "remove"))
        if act == "add":
            alive.append(stream(draw.randrange(1, 4 * BLOCK_TOKENS), 1000))
            book.add(alive[-1:])
        elif act == "accept" and unanswered:
            taken = draw.sample(unanswered, draw.randrange(1, len(unanswered) + 1))
            book.accepted(taken, leaders_of(taken), Accepted(draw.choice("ab")))
        elif act in ("say", "end") and alive:
            one = draw.choice(alive)
            reason = draw.choice(("stop", "deadline", "error")) if act == "end" else None
            num_tokens = draw.randrange(1, 4) if act == "say" else draw.randrange(2)
            book.receive((one.request_id, [7] * num_tokens, reason, 0, None))
            alive = [other for other in alive if other is not one or act == "say"]
        elif act == "remove" and alive:
            one = alive.pop(draw.randrange(len(alive)))
            assert book.remove([one]) == {one.replica_id: [one.request_id]}
        assert book.shares() == counted(alive)
        hint = book.hint([], frozenset())
        assert set(hint.pending) == set(hint.open_streams) == {one.replica_id for one in alive} - {None}
        for replica_id, num_uncached in hint.pending.items():
            here = [one for one in alive if one.replica_id == replica_id]
            assert hint.open_streams[replica_id] == len(here)
            assert num_uncached == sum(one.visit.uncached for one in here if one.visit is not None)
    book.remove(alive)
    assert book.shares() == {}


def test_a_stream_that_ended_before_it_was_answered_for_counts_nowhere() -> None:
    book, one = OpenStreams(), stream(3, 5)
    book.add([one])
    book.receive((one.request_id, [7], "stop", 0, None))
    book.accepted([one], leaders_of([one]), Accepted("a"))
    assert book.shares() == {}
    assert one.replica_id == "a", "its receipt is there"
    assert not book.may_be_at("a")


def test_what_nobody_has_answered_for_may_be_at_any_replica() -> None:
    book, one, other = OpenStreams(), stream(3, 5), stream(3, 5)
    book.add([one])
    assert book.may_be_at("a")
    book.accepted([one], leaders_of([one]), Accepted("b"))
    assert not book.may_be_at("a")
    book.add([other])
    assert book.may_be_at("a")
