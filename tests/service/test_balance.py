import pytest

from service.balance import STREAM_TOKENS, RouteHint, Standing, choose_home, rank

pytestmark = pytest.mark.fast

IDLE = Standing()
THREE = {"a": IDLE, "b": IDLE, "c": IDLE}


def test_the_longest_cached_prefix_wins() -> None:
    assert rank(THREE, RouteHint(1000, cached={"b": 512, "c": 768})) == ["c", "b", "a"]


def test_without_a_cached_prefix_the_fewest_open_streams_win() -> None:
    assert rank(THREE, RouteHint(10, open_streams={"a": 3, "b": 1, "c": 2})) == ["b", "c", "a"]


def test_the_work_that_waits_in_a_replica_outweighs_a_shorter_prefix_and_no_longer_one() -> None:
    def best(pending: int) -> str:
        return rank(THREE, RouteHint(1000, cached={"b": 512}, pending={"b": pending}))[0]

    assert best(pending=500) == "b"
    assert best(pending=513) == "a"


def test_each_open_stream_weighs_against_a_prefix() -> None:
    def best(streams: int) -> str:
        return rank(THREE, RouteHint(1000, cached={"b": 10 * STREAM_TOKENS}, open_streams={"b": streams}))[0]

    assert best(streams=9) == "b"
    assert best(streams=11) == "a"


@pytest.mark.parametrize(
    "full", [Standing(running=4, waiting=1), Standing(running=4, kv_usage=0.95)], ids=["queue", "blocks"]
)
def test_a_hot_prefix_spills_from_a_replica_that_has_no_room(full: Standing) -> None:
    order = rank(
        {"a": full, "b": Standing(running=4), "c": Standing(running=5)}, RouteHint(10_000, cached={"a": 9_984})
    )
    assert order == ["b", "c", "a"]


def test_where_none_has_room_the_prefix_decides_again() -> None:
    full = Standing(waiting=1)
    assert rank({"a": full, "b": full}, RouteHint(1000, cached={"b": 512}))[0] == "b"


def test_what_a_replica_says_of_itself_counts_where_an_ingress_sees_less() -> None:
    busy = {"a": Standing(running=9), "b": Standing(pending_tokens=4000), "c": Standing(running=2)}
    assert rank(busy, RouteHint(10, open_streams={"c": 1})) == ["c", "a", "b"]


def test_a_replica_to_avoid_is_not_among_those_that_may_be_asked() -> None:
    assert rank(THREE, RouteHint(1000, cached={"a": 992}, avoid=frozenset("ab"))) == ["c"]
    assert rank(THREE, RouteHint(avoid=frozenset("abc"), session="s")) == []


def test_a_session_stays_where_it_is_whatever_is_cached_elsewhere() -> None:
    home = choose_home(THREE, "s")
    others = {name: 992 for name in THREE if name != home}
    assert rank(THREE, RouteHint(1000, cached=others, open_streams={home: 12}, session="s"))[0] == home


def test_a_session_leaves_a_home_that_has_no_room() -> None:
    home = choose_home(THREE, "s")
    assert rank(THREE | {home: Standing(waiting=1)}, RouteHint(10, session="s"))[0] != home


def test_when_a_replica_goes_only_its_own_sessions_move_and_all_are_spread() -> None:
    sessions = [f"session {i}" for i in range(300)]
    before = {session: choose_home("abc", session) for session in sessions}
    after = {session: choose_home("ab", session) for session in sessions}
    assert all(after[session] == home for session, home in before.items() if home != "c")
    assert all(60 < list(before.values()).count(name) < 140 for name in "abc")


def test_a_session_whose_home_is_to_be_avoided_has_one_other_home() -> None:
    home = choose_home(THREE, "s")
    hint = RouteHint(10, avoid=frozenset([home]), session="s")
    rest = [name for name in THREE if name != home]
    assert rank(THREE, hint)[0] == choose_home(rest, "s")
