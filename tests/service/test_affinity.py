"""The index of prefixes, beside a cache that works as an engine's does."""

from collections import OrderedDict
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.affinity import BLOCK_TOKENS as B
from service.affinity import Prefix, PrefixIndex

pytestmark = pytest.mark.fast


def prompt(*blocks: int, tail: int = 1) -> list[int]:
    """One number stands for a block of tokens; the tail is what no cache is asked for."""
    return [block for block in blocks for _ in range(B)] + [0] * tail


def serve(index: PrefixIndex, replica: str, token_ids: Sequence[int], cached: int | None = None) -> None:
    """A request from its sending to its end. `cached`: what the replica says it found, if not what was believed."""
    prefix = Prefix(token_ids, "")
    believed = index.match(prefix).get(replica, 0)
    visit = index.sent(replica, prefix)
    index.heard(visit, believed if cached is None else cached)
    index.ended(visit, [])


def match(index: PrefixIndex, token_ids: Sequence[int], salt: str = "") -> dict[str, int]:
    return index.match(Prefix(token_ids, salt))


def test_a_prefix_is_found_where_it_was_sent_as_far_as_it_goes() -> None:
    index = PrefixIndex()
    serve(index, "a", prompt(1, 2, 3))
    serve(index, "b", prompt(1, 2))
    assert match(index, prompt(1, 2, 3, 4)) == {"a": 3 * B, "b": 2 * B}
    assert match(index, prompt(2, 3)) == {}


def test_a_prompt_counts_as_sent_before_anything_has_come_back() -> None:
    index = PrefixIndex()
    index.sent("a", Prefix(prompt(1, 2), ""))
    assert match(index, prompt(1, 2)) == {"a": 2 * B}


def test_the_last_token_of_a_prompt_is_never_expected_in_a_cache() -> None:
    index = PrefixIndex()
    serve(index, "a", prompt(1, 2, tail=0))
    assert match(index, prompt(1, 2, tail=0)) == {"a": B}


def test_tenants_do_not_see_what_others_have_sent() -> None:
    index = PrefixIndex()
    serve(index, "a", prompt(1, 2))
    assert match(index, prompt(1, 2), salt="another") == {}


def test_what_a_request_said_is_part_of_what_its_replica_holds() -> None:
    index = PrefixIndex()
    visit = index.sent("a", Prefix(prompt(1, tail=0), ""))
    index.heard(visit, 0)
    index.ended(visit, prompt(2, 3))
    assert match(index, prompt(1, 2, 3, 4)) == {"a": 3 * B}


def test_the_least_recently_used_prefix_is_lost_first_and_from_its_end() -> None:
    index = PrefixIndex()
    index.capacity_tokens = 4 * B
    serve(index, "a", prompt(1, 2))
    serve(index, "a", prompt(3, 4))
    serve(index, "a", prompt(5))
    assert match(index, prompt(1, 2)) == {"a": B}
    assert match(index, prompt(3, 4)) == {"a": 2 * B}


def test_a_block_that_was_not_found_takes_with_it_all_that_was_used_before_it() -> None:
    index = PrefixIndex()
    serve(index, "a", prompt(1, 2))
    serve(index, "a", prompt(3, 4))
    serve(index, "a", prompt(5, 6))
    serve(index, "a", prompt(3, 4, 7), cached=B)  # block 4 was overwritten: so were 1 and 2, and not 5 and 6
    assert match(index, prompt(1, 2)) == {}
    assert match(index, prompt(5, 6)) == {"a": 2 * B}
    assert match(index, prompt(3, 4, 7)) == {"a": 3 * B}, "it has just been computed"


def test_a_block_that_is_still_being_computed_is_not_missed() -> None:
    index = PrefixIndex()
    serve(index, "a", prompt(8, 9))
    index.sent("a", Prefix(prompt(1, 2), ""))
    index.heard(index.sent("a", Prefix(prompt(1, 2, 3), "")), num_cached_tokens=0)
    assert match(index, prompt(8, 9)) == {"a": 2 * B}


def test_what_a_request_would_have_brought_goes_with_it_unless_another_brings_it_too() -> None:
    index = PrefixIndex()
    serve(index, "a", prompt(1))
    visit = index.sent("a", Prefix(prompt(1, 2, 3), ""))
    index.sent("a", Prefix(prompt(1, 2), ""))
    index.withdrawn(visit)
    assert match(index, prompt(1, 2, 3)) == {"a": 2 * B}


def test_a_replica_that_is_gone_holds_nothing_and_late_news_of_it_does_no_harm() -> None:
    index = PrefixIndex()
    visit = index.sent("a", Prefix(prompt(1), ""))
    index.forget("a")
    index.heard(visit, 0)
    index.ended(visit, [])
    index.withdrawn(visit)
    assert match(index, prompt(1)) == {}
    assert index.num_blocks == 0


def test_a_prefix_grows_piece_by_piece_into_the_same_blocks() -> None:
    whole, grown = Prefix(prompt(1, 2, 3), "s"), Prefix([], "s")
    for token in prompt(1, 2, 3):
        grown.extend([token])
    assert grown.keys == whole.keys
    assert len(whole.keys) == 3


class Cache:
    """Blocks in the order of last use, the oldest lost first: what an engine does, in its simplest form."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._blocks: OrderedDict[bytes, None] = OrderedDict()

    def serve(self, keys: Sequence[bytes]) -> int:
        found = next((i for i, key in enumerate(keys) if key not in self._blocks), len(keys))
        for key in reversed(keys):
            self._blocks[key] = None
            self._blocks.move_to_end(key)
        while len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)
        return found


PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=5)
REQUESTS = st.lists(st.tuples(st.integers(0, 2), PROMPTS, st.booleans()), max_size=60)


@settings(max_examples=200, deadline=None)
@given(requests=REQUESTS, capacity=st.integers(1, 12))
def test_seen_by_one_ingress_alone_the_index_knows_exactly_what_each_cache_holds(
    requests: list[tuple[int, list[int], bool]], capacity: int
) -> None:
    index, caches = PrefixIndex(), [Cache(capacity) for _ in range(3)]
    index.capacity_tokens = capacity * B
    for number, blocks, _ in requests:
        token_ids = prompt(*blocks)
        believed = match(index, token_ids).get(str(number), 0)
        found = caches[number].serve(Prefix(token_ids, "").keys) * B
        assert believed == found
        serve(index, str(number), token_ids, cached=found)


@settings(max_examples=200, deadline=None)
@given(requests=REQUESTS, capacity=st.integers(1, 12), bound=st.integers(3, 12))
def test_beside_another_ingress_it_stays_bounded_whole_and_is_right_about_what_it_has_just_heard(
    requests: list[tuple[int, list[int], bool]], capacity: int, bound: int
) -> None:
    index, caches = PrefixIndex(max_blocks=bound), [Cache(capacity) for _ in range(3)]
    for number, blocks, is_ours in requests:
        token_ids = prompt(*blocks)
        keys = Prefix(token_ids, "").keys
        found = caches[number].serve(keys) * B
        if not is_ours:
            continue
        serve(index, str(number), token_ids, cached=found)
        assert index.num_blocks <= bound
        held = match(index, token_ids).get(str(number), 0)
        assert held == min(len(keys), bound // index.num_replicas) * B


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["sent", "heard", "ended", "withdrawn"]), PROMPTS, st.integers(0, 5)), max_size=60
    ),
    capacity=st.integers(1, 12),
)
def test_a_block_is_never_held_without_those_before_it(steps: list[tuple[str, list[int], int]], capacity: int) -> None:
    index = PrefixIndex()
    index.capacity_tokens = capacity * B
    prefixes, open_visits = [], []
    for step, blocks, number in steps:
        if step == "sent" or not open_visits:
            prefixes.append(Prefix(prompt(*blocks), ""))
            open_visits.append(index.sent("a", prefixes[-1]))
        elif step == "heard":
            index.heard(open_visits[number % len(open_visits)], number * B)
        else:
            visit = open_visits.pop(number % len(open_visits))
            index.ended(visit, prompt(*blocks)) if step == "ended" else index.withdrawn(visit)
        used = index._caches["a"].used
        assert index._caches["a"].promised <= set(used)
        for prefix in prefixes:
            held = [key in used for key in prefix.keys]
            assert held == sorted(held, reverse=True)
