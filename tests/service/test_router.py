import asyncio
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from service.balance import STREAM_TOKENS, RouteHint
from service.router import FORGET_S, NoReplica, PinnedRouter, ReplicaGone


def replica(name: str, stats: Mapping[str, float] | None = None) -> Any:
    return SimpleNamespace(replica_id=SimpleNamespace(unique_id=name), routing_stats=stats)


def call(internal_id: str = "call", **kwargs: object) -> Any:
    future = asyncio.get_running_loop().create_future()
    return SimpleNamespace(kwargs=kwargs, future=future, metadata=SimpleNamespace(internal_request_id=internal_id))


@pytest.fixture
def router() -> PinnedRouter:
    router = object.__new__(PinnedRouter)  # Serve's own constructor needs a running cluster
    router.initialize_state()
    return router


def names(groups: list[list[Any]]) -> list[list[str]]:
    return [[replica.replica_id.unique_id for replica in group] for group in groups]


async def test_a_pinned_call_has_its_replica_as_the_only_candidate(router: PinnedRouter) -> None:
    groups = await router.choose_replicas([replica("a"), replica("b")], call(pin="b"))
    assert names(groups) == [["b"]]


async def test_a_pin_on_a_replica_that_left_fails_the_call_at_once(router: PinnedRouter) -> None:
    pending = call(pin="gone")
    groups = await router.choose_replicas([replica("a")], pending)
    assert isinstance(pending.future.exception(), ReplicaGone)
    assert names(groups) == [["a"]], "an empty answer would make Serve's loop spin"


async def test_a_call_for_which_no_replica_may_be_asked_fails_at_once(router: PinnedRouter) -> None:
    pending = call(hint=RouteHint(avoid=frozenset("ab")))
    groups = await router.choose_replicas([replica("a"), replica("b")], pending)
    assert isinstance(pending.future.exception(), NoReplica)
    assert names(groups) == [["a", "b"]], "an empty answer would make Serve's loop spin"


async def test_the_order_is_that_of_the_hint_and_of_what_the_replicas_say(router: PinnedRouter) -> None:
    full = {"running": 4, "waiting": 2, "pending_tokens": 0, "kv_usage": 0.5}
    replicas = [replica("a", full), replica("b"), replica("c")]
    groups = await router.choose_replicas(replicas, call(hint=RouteHint(1000, cached={"a": 992, "c": 512})))
    assert names(groups) == [["c"], ["b"], ["a"]]


async def test_a_call_that_says_nothing_may_go_anywhere(router: PinnedRouter) -> None:
    groups = await router.choose_replicas([replica("a"), replica("b")], call())
    assert sorted(names(groups)) == [["a"], ["b"]]


async def test_a_burst_is_spread_before_the_first_answer_is_back(router: PinnedRouter) -> None:
    replicas = [replica("a"), replica("b")]
    hint = RouteHint()
    first = [names(await router.choose_replicas(replicas, call(str(i), hint=hint)))[0][0] for i in range(10)]
    assert first.count("a") == first.count("b") == 5


async def test_a_prompt_weighs_before_the_first_answer_is_back(router: PinnedRouter) -> None:
    replicas = [replica("a"), replica("b")]
    await router.choose_replicas(
        replicas, call("long", hint=RouteHint(9 * STREAM_TOKENS, open_streams={"a": 1}))
    )  # to b
    groups = await router.choose_replicas(replicas, call("short", hint=RouteHint(1, open_streams={"a": 8})))
    assert names(groups)[0] == ["a"]


async def test_an_answered_call_no_longer_weighs(router: PinnedRouter) -> None:
    replicas = [replica("a"), replica("b")]
    for i in range(4):
        await router.choose_replicas(replicas, call(str(i), hint=RouteHint(open_streams={"a": 10})))  # all go to b
        router.on_request_completed(replicas[1].replica_id, str(i))
    groups = await router.choose_replicas(replicas, call("last", hint=RouteHint(open_streams={"a": 1})))
    assert names(groups)[0] == ["b"]


async def test_a_call_that_was_given_up_before_it_was_sent_no_longer_weighs(router: PinnedRouter) -> None:
    replicas = [replica("a"), replica("b")]
    pending = call("given up", hint=RouteHint(100 * STREAM_TOKENS, open_streams={"a": 1}))
    await router.choose_replicas(replicas, pending)  # it is to go to b
    pending.future.cancel()
    await asyncio.sleep(0)
    groups = await router.choose_replicas(replicas, call("next", hint=RouteHint(1, open_streams={"a": 1})))
    assert names(groups)[0] == ["b"]


async def test_a_call_of_whose_end_nobody_tells_weighs_for_a_while_only(
    router: PinnedRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serve tells of none whose caller leaves between the choice of a replica and the sending."""
    clock, replicas = [1000.0], [replica("a"), replica("b")]
    monkeypatch.setattr("service.router.time", SimpleNamespace(monotonic=lambda: clock[0]))

    async def first_choice(call_id: str) -> str:
        groups = await router.choose_replicas(replicas, call(call_id, hint=RouteHint(1, open_streams={"a": 1})))
        router.on_request_completed(replicas[0].replica_id, call_id)
        return names(groups)[0][0]

    lost = call("lost", hint=RouteHint(100 * STREAM_TOKENS, open_streams={"a": 1}))
    await router.choose_replicas(replicas, lost)  # it is to go to b
    lost.future.set_result(None)
    clock[0] += FORGET_S - 1
    assert await first_choice("next") == "a"
    clock[0] += 1
    assert await first_choice("last") == "b"
    assert not router._in_flight


async def test_a_call_that_is_sent_again_weighs_from_then_on_and_hides_no_older_one(
    router: PinnedRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, replicas = [1000.0], [replica("a")]
    monkeypatch.setattr("service.router.time", SimpleNamespace(monotonic=lambda: clock[0]))
    for call_id, seconds in (("again", 1), ("lost", FORGET_S - 2), ("again", 2), ("last", 0)):
        await router.choose_replicas(replicas, call(call_id, hint=RouteHint(1)))
        clock[0] += seconds
    assert list(router._in_flight) == ["again", "last"]


async def test_the_caller_learns_who_was_chosen(router: PinnedRouter) -> None:
    chosen: list[str] = []
    hint = RouteHint(open_streams={"a": 1})
    await router.choose_replicas([replica("a"), replica("b")], call(hint=hint, chosen=chosen))
    assert chosen == ["b"]
