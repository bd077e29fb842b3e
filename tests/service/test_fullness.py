"""Under overload the ingress refuses by itself what it knows that every engine would refuse."""

import asyncio
from types import SimpleNamespace

import pytest

from model.sampling.params import SamplingParams
from service import fullness
from service.channel import Accepted, Refused, Work
from service.dispatch import Dispatcher
from service.errors import Overloaded
from service.metrics import IngressMetrics
from service.streams import Generation
from tests.service.fakes import FakeFleet
from tests.service.test_dispatch import tokens

WORK = Work([1], SamplingParams(max_tokens=8, seed=1))
FULL = Refused("a", "full", "no place", retry_after_s=7)


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> FakeFleet:
    """One replica, which counts how often it is asked; a refusal is remembered for longer than any test takes."""
    monkeypatch.setattr(fullness, "PROBE_S", 3600.0)
    monkeypatch.setattr(fullness, "FORGET_S", 3600.0)
    fleet = FakeFleet("a")
    fleet.asked = 0  # type: ignore[attr-defined]
    submit = fleet.submit.remote

    async def counted(*args: object, **kwargs: object) -> object:
        fleet.asked += 1  # type: ignore[attr-defined]
        return await submit(*args, **kwargs)

    fleet.submit.remote = counted
    return fleet


def dispatcher_for(fleet: FakeFleet) -> Dispatcher:
    return Dispatcher(fleet, IngressMetrics("tiny"))  # type: ignore[arg-type]


async def filled(fleet: FakeFleet, dispatcher: Dispatcher, refusal: Refused = FULL) -> Generation:
    """One request runs, and the next is told that there is no place."""
    generation = await dispatcher.open([WORK])
    fleet.replicas["a"].answer = refusal
    with pytest.raises(Overloaded):
        await dispatcher.open([WORK])
    return generation


async def test_an_engine_that_has_said_that_it_is_full_is_not_asked_again_at_once(fleet: FakeFleet) -> None:
    dispatcher = dispatcher_for(fleet)
    await filled(fleet, dispatcher)
    with pytest.raises(Overloaded, match="no place") as refused:
        await dispatcher.open([WORK])
    assert refused.value.retry_after_s == 7
    assert fleet.asked == 2  # type: ignore[attr-defined]


async def test_a_request_that_ends_leaves_a_place_to_ask_for(fleet: FakeFleet) -> None:
    dispatcher = dispatcher_for(fleet)
    generation = await filled(fleet, dispatcher)
    fleet.replicas["a"].say(0, 5, finish_reason="stop")
    await tokens(generation, 1)
    with pytest.raises(Overloaded):
        await dispatcher.open([WORK])
    assert fleet.asked == 3  # type: ignore[attr-defined]


async def test_what_is_too_large_says_nothing_of_what_is_small(fleet: FakeFleet) -> None:
    dispatcher = dispatcher_for(fleet)
    await filled(fleet, dispatcher, Refused("a", "overloaded", "too many tokens"))
    with pytest.raises(Overloaded):
        await dispatcher.open([WORK])
    assert fleet.asked == 3  # type: ignore[attr-defined]


async def test_of_many_that_come_at_once_one_asks_for_the_place(fleet: FakeFleet) -> None:
    """Where all of them ask, asking is what the processes are busy with."""
    dispatcher = dispatcher_for(fleet)
    generation = await filled(fleet, dispatcher)
    fleet.replicas["a"].say(0, 5, finish_reason="stop")
    await tokens(generation, 1)
    refusals = await asyncio.gather(*(dispatcher.open([WORK]) for _ in range(20)), return_exceptions=True)
    assert {type(refusal) for refusal in refusals} == {Overloaded}
    assert fleet.asked == 3  # type: ignore[attr-defined]


async def test_a_client_that_leaves_leaves_its_place(fleet: FakeFleet) -> None:
    dispatcher = dispatcher_for(fleet)
    generation = await filled(fleet, dispatcher)
    dispatcher.abort(generation.streams)
    with pytest.raises(Overloaded):
        await dispatcher.open([WORK])
    assert fleet.asked == 3  # type: ignore[attr-defined]


async def test_looking_takes_nobodys_place(fleet: FakeFleet) -> None:
    dispatcher = dispatcher_for(fleet)
    generation = await filled(fleet, dispatcher)
    with pytest.raises(Overloaded):
        dispatcher.check_room()
    dispatcher.abort(generation.streams)
    dispatcher.check_room()
    fleet.replicas["a"].answer = Accepted("a")
    await dispatcher.open([WORK])


async def test_every_moment_one_request_asks_again(fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(fullness, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    dispatcher = dispatcher_for(fleet)
    await filled(fleet, dispatcher)
    monkeypatch.setattr(fullness, "PROBE_S", 0.1)
    for asked in (2, 3, 4):
        assert fleet.asked == asked  # type: ignore[attr-defined]
        clock[0] += 0.2
        for _ in range(3):
            with pytest.raises(Overloaded):
                await dispatcher.open([WORK])


async def test_it_is_forgotten_in_time(fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    dispatcher = dispatcher_for(fleet)
    await filled(fleet, dispatcher)
    monkeypatch.setattr(fullness, "FORGET_S", 0.0)
    with pytest.raises(Overloaded):
        await dispatcher.open([WORK])
    assert fleet.asked == 3  # type: ignore[attr-defined]


async def test_one_full_engine_of_two_does_not_speak_for_the_other(fleet: FakeFleet) -> None:
    fleet.add("b")
    dispatcher = dispatcher_for(fleet)
    await dispatcher.open([WORK])
    await dispatcher.open([WORK])  # one on each
    fleet.replicas["a"].answer = FULL
    with pytest.raises(Overloaded):
        await dispatcher.open([WORK])
    asked = fleet.asked  # type: ignore[attr-defined]
    fleet.replicas.pop("a")
    await dispatcher.open([WORK])
    assert fleet.asked == asked + 1  # type: ignore[attr-defined]
