import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from service.router import PinnedRouter, ReplicaGone


def replica(name: str) -> Any:
    return SimpleNamespace(replica_id=SimpleNamespace(unique_id=name))


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


async def test_an_unpinned_call_prefers_the_replica_with_the_fewest_open_streams(router: PinnedRouter) -> None:
    replicas = [replica("a"), replica("b"), replica("c")]
    groups = await router.choose_replicas(replicas, call(open_streams={"a": 3, "b": 1, "c": 2}))
    assert names(groups) == [["b"], ["c"], ["a"]]


async def test_a_burst_is_spread_before_the_first_answer_is_back(router: PinnedRouter) -> None:
    replicas = [replica("a"), replica("b")]
    first = [names(await router.choose_replicas(replicas, call(str(i), open_streams={})))[0][0] for i in range(10)]
    assert first.count("a") == first.count("b") == 5


async def test_an_answered_call_no_longer_weighs(router: PinnedRouter) -> None:
    replicas = [replica("a"), replica("b")]
    for i in range(4):
        await router.choose_replicas(replicas, call(str(i), open_streams={"a": 10}))  # all go to b
        router.on_request_completed(replicas[1].replica_id, str(i))
    groups = await router.choose_replicas(replicas, call("last", open_streams={"a": 1}))
    assert names(groups)[0] == ["b"]
