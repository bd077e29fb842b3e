"""How long one waits for engines: for one that is gone, for one that stands still, for any at all."""

import asyncio

import pytest

from service.dispatch import Dispatcher, WaitBudget
from service.errors import Unavailable
from service.link import SILENT_TURNS
from service.metrics import IngressMetrics
from tests.service.fakes import FakeFleet
from tests.service.test_dispatch import WORK, dispatcher_for, quick_turns, tokens, until

__all__ = ["quick_turns"]


@pytest.fixture
def short_wait(monkeypatch: pytest.MonkeyPatch, quick_turns: None) -> list[float]:
    """Five turns without anybody are too many. The turns that somebody has waited."""
    turns: list[float] = []
    wait = WaitBudget.wait

    def counted(budget: WaitBudget, seconds: float) -> None:
        turns.append(seconds)
        wait(budget, seconds)

    monkeypatch.setattr("service.dispatch.NOBODY_TIMEOUT_S", 0.045)
    monkeypatch.setattr(WaitBudget, "wait", counted)
    return turns


async def test_a_stream_ends_with_a_typed_error_soon_after_the_last_replica(short_wait: list[float]) -> None:
    fleet = FakeFleet("a")
    generation = await dispatcher_for(fleet).open([WORK])
    fleet.kill("a")
    async with asyncio.timeout(5):
        (piece,) = await generation.next()
    assert isinstance(piece.error, Unavailable)
    assert "no engine runs" in str(piece.error)
    assert len(short_wait) == 5


async def test_a_new_request_waits_no_longer_for_the_first_replica(short_wait: list[float]) -> None:
    with pytest.raises(Unavailable, match="no engine runs"):
        await dispatcher_for(FakeFleet()).open([WORK])
    assert len(short_wait) == 5


async def test_a_stream_goes_on_with_a_replica_that_comes_in_time(short_wait: list[float]) -> None:
    fleet = FakeFleet("a")
    generation = await dispatcher_for(fleet).open([WORK])
    fleet.kill("a")
    await until(lambda: len(short_wait) == 2)
    fleet.add("b")
    await until(lambda: fleet.replicas["b"].submitted)
    fleet.replicas["b"].say(0, 5)
    assert await tokens(generation, 1) == [5]


async def test_a_replica_that_stands_still_is_waited_for_longer_than_one_that_is_gone(
    short_wait: list[float],
) -> None:
    fleet = FakeFleet("a")
    dispatcher = dispatcher_for(fleet)
    generation = await dispatcher.open([WORK])
    a = fleet.replicas["a"]
    a.say(0, 5)
    assert await tokens(generation, 1) == [5]
    a.awake.clear()
    await until(lambda: dispatcher._quarantined() and dispatcher._links["a"].is_open is False)
    for _ in range(20):  # turns, in each of which nobody may be asked
        await asyncio.sleep(0.01)
    a.awake.set()
    await until(lambda: len(a.submitted) == 2)
    assert short_wait == []


async def test_what_the_engines_can_do_is_asked_no_longer_than_a_request_waits(short_wait: list[float]) -> None:
    with pytest.raises(Unavailable, match="no engine runs"):
        await dispatcher_for(FakeFleet()).describe()
    assert len(short_wait) == 5


async def test_what_the_engines_can_do_is_asked_elsewhere_when_one_stands_still(
    quick_turns: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random.sample", lambda replicas, count: replicas)
    fleet = FakeFleet("a", "b")
    fleet.replicas["a"].awake.clear()
    dispatcher = dispatcher_for(fleet)
    async with asyncio.timeout(5):
        assert (await dispatcher.describe()).capacity == 16
    assert "a" in dispatcher._quarantined()


async def test_a_replica_is_not_blamed_for_the_time_before_it_was_chosen(
    quick_turns: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[float] = []
    monkeypatch.setattr(WaitBudget, "wait", lambda budget, seconds: turns.append(seconds))
    fleet = FakeFleet()
    dispatcher = Dispatcher(fleet, IngressMetrics("tiny"), engines_sleep=True)  # type: ignore[arg-type]
    opening = asyncio.create_task(dispatcher.open([WORK]))
    await until(lambda: len(turns) > SILENT_TURNS)
    fleet.add("late")
    fleet.replicas["late"].awake.clear()  # it is about to answer
    await until(lambda: fleet.hints)
    for _ in range(3):  # turns
        await asyncio.sleep(0.01)
    assert not dispatcher._quarantined()
    fleet.replicas["late"].awake.set()
    assert (await opening).streams[0].replica_id == "late"
    assert len(fleet.hints) == 1, "it was not asked twice"
