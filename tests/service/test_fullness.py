"""Under overload the ingress refuses by itself what it knows that every engine would refuse."""

import asyncio
from types import SimpleNamespace

import pytest

from model.sampling.params import SamplingParams
from service import fullness
from service.channel import Accepted, Occupancy, Refused, Work
from service.dispatch import Dispatcher
from service.errors import Overloaded
from service.metrics import IngressMetrics
from service.streams import Generation
from tests.service.fakes import FakeFleet
from tests.service.test_dispatch import tokens, until


def work(num_tokens: int) -> Work:
    """A request that may need so many tokens."""
    return Work([1], SamplingParams(max_tokens=num_tokens - 1, seed=1))


WORK = work(10)
FULL = Occupancy(num_requests=4, max_requests=4, num_tokens=40, max_tokens=1000, drain_seconds=7)
CROWDED = FULL._replace(num_requests=2, num_tokens=995)


class CountedFleet(FakeFleet):
    """Counts how often its replicas are asked."""

    def __init__(self, *names: str) -> None:
        super().__init__(*names)
        self.asked = 0
        submit = self.submit.remote

        async def counted(*args: object, **kwargs: object) -> object:
            self.asked += 1
            return await submit(*args, **kwargs)

        self.submit.remote = counted

    def say(self, occupancy: Occupancy, *, refuses: bool = False) -> None:
        """What replica a answers from now on."""
        refused = Refused("a", "overloaded", "said the replica", occupancy=occupancy, retry_after_s=7)
        self.replicas["a"].answer = refused if refuses else Accepted("a", 0, occupancy)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Stands still."""
    clock = [1000.0]
    monkeypatch.setattr(fullness, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    return clock


@pytest.fixture
def fleet() -> CountedFleet:
    return CountedFleet("a")


@pytest.fixture
def dispatcher(fleet: CountedFleet, clock: list[float]) -> Dispatcher:
    dispatcher = Dispatcher(fleet, IngressMetrics("tiny"))  # type: ignore[arg-type]
    dispatcher._fullness._probed_at = clock[0]  # too soon for the next probe
    return dispatcher


async def taken(fleet: CountedFleet, dispatcher: Dispatcher, occupancy: Occupancy) -> Generation:
    """A request is taken by a replica that says that it is so full with it."""
    fleet.say(occupancy)
    return await dispatcher.open([WORK])


async def test_an_engine_that_has_said_that_it_is_full_is_not_asked(
    fleet: CountedFleet, dispatcher: Dispatcher
) -> None:
    await taken(fleet, dispatcher, FULL)
    with pytest.raises(Overloaded, match="4 requests are running or waiting; 4 may") as refused:
        await dispatcher.open([WORK])
    assert refused.value.retry_after_s == 7
    assert fleet.asked == 1


async def test_a_refusal_says_it_as_well(fleet: CountedFleet, dispatcher: Dispatcher) -> None:
    fleet.say(FULL, refuses=True)
    with pytest.raises(Overloaded, match="said the replica"):
        await dispatcher.open([WORK])
    with pytest.raises(Overloaded, match="4 may"):
        await dispatcher.open([WORK])
    assert fleet.asked == 1


async def test_what_needs_more_tokens_than_are_left_is_refused_without_a_question(
    fleet: CountedFleet, dispatcher: Dispatcher
) -> None:
    await taken(fleet, dispatcher, CROWDED)
    with pytest.raises(Overloaded, match="may need 995 tokens, and this one 6; 1000 may be outstanding"):
        await dispatcher.open([work(6)])
    assert fleet.asked == 1
    await dispatcher.open([work(5)])
    assert fleet.asked == 2


async def test_tokens_that_come_back_make_room(fleet: CountedFleet, dispatcher: Dispatcher) -> None:
    generation = await taken(fleet, dispatcher, CROWDED)  # with its 10
    fleet.replicas["a"].say(0, 5, 6)  # its prompt of one token is computed, and two are out
    await tokens(generation, 2)
    with pytest.raises(Overloaded, match="may need 992 tokens"):
        await dispatcher.open([work(9)])
    await dispatcher.open([work(8)])


async def test_what_has_been_sent_since_takes_its_room(fleet: CountedFleet, dispatcher: Dispatcher) -> None:
    await taken(fleet, dispatcher, FULL._replace(num_requests=3))
    fleet.replicas["a"].awake.clear()
    on_its_way = asyncio.create_task(dispatcher.open([WORK]))
    await until(lambda: fleet.asked == 2)
    with pytest.raises(Overloaded, match="4 requests"):
        await dispatcher.open([WORK])
    fleet.replicas["a"].awake.set()
    await on_its_way


async def test_several_choices_need_several_places(fleet: CountedFleet, dispatcher: Dispatcher) -> None:
    await taken(fleet, dispatcher, FULL._replace(num_requests=3))
    with pytest.raises(Overloaded, match="3 requests"):
        await dispatcher.open([WORK, WORK])
    await dispatcher.open([WORK])


async def test_a_request_that_ends_leaves_its_place_to_one_other(fleet: CountedFleet, dispatcher: Dispatcher) -> None:
    """Where all that wait ask for it, asking is what the processes are busy with."""
    generation = await taken(fleet, dispatcher, FULL)
    fleet.replicas["a"].say(0, 5, finish_reason="stop")
    await tokens(generation, 1)
    answers = await asyncio.gather(*(dispatcher.open([WORK]) for _ in range(20)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [Generation] + 19 * [Overloaded]
    assert fleet.asked == 2


async def test_a_client_that_leaves_leaves_its_place(fleet: CountedFleet, dispatcher: Dispatcher) -> None:
    generation = await taken(fleet, dispatcher, FULL)
    with pytest.raises(Overloaded):
        dispatcher.check_room()
    dispatcher.abort(generation.streams)
    dispatcher.check_room()
    await dispatcher.open([WORK])


async def test_every_moment_one_request_asks_all_the_same(
    fleet: CountedFleet, dispatcher: Dispatcher, clock: list[float]
) -> None:
    """Other ingresses' requests come and go, too."""
    await taken(fleet, dispatcher, FULL)
    fleet.say(FULL, refuses=True)
    for asked in (2, 3, 4):
        clock[0] += fullness.PROBE_S
        dispatcher.check_room()  # looking is not asking
        for _ in range(3):
            with pytest.raises(Overloaded):
                await dispatcher.open([WORK])
        assert fleet.asked == asked


async def test_nobody_asks_where_all_that_is_there_is_ours(
    fleet: CountedFleet, dispatcher: Dispatcher, clock: list[float]
) -> None:
    """An overload of one ingress would else be a load on the engine: ten questions a second, each refused."""
    ours = [await taken(fleet, dispatcher, FULL._replace(num_requests=number)) for number in (1, 2, 3, 4)]
    for _ in range(3):
        clock[0] += fullness.PROBE_S
        with pytest.raises(Overloaded):
            await dispatcher.open([WORK])
    assert fleet.asked == 4
    fleet.replicas["a"].say(0, 5, finish_reason="stop")
    await tokens(ours[0], 1)
    await dispatcher.open([WORK])


async def test_it_is_forgotten_in_time(fleet: CountedFleet, dispatcher: Dispatcher, clock: list[float]) -> None:
    await taken(fleet, dispatcher, FULL)
    clock[0] += fullness.FORGET_S
    dispatcher._fullness._probed_at = clock[0]  # too soon for the next probe
    await dispatcher.open([WORK])
    assert fleet.asked == 2


async def test_one_full_engine_of_two_does_not_speak_for_the_other(fleet: CountedFleet, dispatcher: Dispatcher) -> None:
    fleet.add("b")
    await dispatcher.open([WORK])
    await dispatcher.open([WORK])  # one on each
    await taken(fleet, dispatcher, FULL)
    await dispatcher.open([WORK])
    assert [len(replica.submitted) for replica in fleet.replicas.values()] == [2, 2]


async def test_an_idle_engine_takes_what_is_larger_than_its_bound(fleet: CountedFleet, dispatcher: Dispatcher) -> None:
    generation = await taken(fleet, dispatcher, FULL._replace(num_requests=1, num_tokens=10, max_tokens=5))
    with pytest.raises(Overloaded):
        await dispatcher.open([WORK])
    fleet.replicas["a"].say(0, 5, finish_reason="stop")
    await tokens(generation, 1)
    await dispatcher.open([WORK])
