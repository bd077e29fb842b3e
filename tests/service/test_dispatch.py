import asyncio
import time
from collections.abc import Callable

import pytest

from model.errors import InvalidRequest
from model.sampling.params import SamplingParams
from service.channel import Accepted, Outbox, Refused, Work
from service.dispatch import MAX_FAILURES, Dispatcher
from service.errors import DeadlineExceeded, Overloaded, ServiceError, Unavailable
from service.link import SILENT_TURNS
from service.metrics import IngressMetrics
from service.streams import Generation
from tests.service.fakes import FakeFleet

PARAMS = SamplingParams(max_tokens=8, seed=1)
WORK = Work([1], PARAMS)


def dispatcher_for(fleet: FakeFleet) -> Dispatcher:
    return Dispatcher(fleet, IngressMetrics("tiny"))  # type: ignore[arg-type]


async def until(condition: Callable[[], object]) -> None:
    """Let everything else run until a condition holds."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


async def tokens(generation: Generation, count: int) -> list[int]:
    """The next `count` tokens, of whichever choice."""
    got: list[int] = []
    async with asyncio.timeout(5):
        while len(got) < count:
            for piece in await generation.next():
                assert piece.error is None, piece.error
                got += piece.token_ids
    return got


async def test_tokens_come_back_through_the_channel_of_the_replica_that_accepted() -> None:
    fleet = FakeFleet("a")
    generation = await dispatcher_for(fleet).open([Work([1, 2], PARAMS)])
    fleet.replicas["a"].say(0, 7, 8)
    assert await tokens(generation, 2) == [7, 8]


async def test_a_stream_moves_with_its_journal_when_its_replica_dies() -> None:
    fleet = FakeFleet("a", "b")
    generation = await dispatcher_for(fleet).open([Work([1, 2], PARAMS)])
    fleet.replicas["a"].say(0, 7, 8)
    await tokens(generation, 2)
    b = fleet.replicas["b"]
    fleet.kill("a")
    await until(lambda: b.submitted)
    assert b.submitted[0].work.prompt_ids == [1, 2]
    assert b.submitted[0].output_ids == [7, 8]
    assert b.submitted[0].resumed
    b.say(0, 9, finish_reason="stop")
    assert await tokens(generation, 1) == [9]


async def test_late_tokens_of_an_attempt_that_was_given_up_are_dropped() -> None:
    fleet = FakeFleet("a", "b")
    generation = await dispatcher_for(fleet).open([Work([1], PARAMS)])
    a, b = fleet.replicas["a"], fleet.replicas["b"]
    stale = a.submitted[0].request_id
    fleet.kill("a")
    await until(lambda: b.submitted)
    b.outbox.put([(stale, [66], None, 0, None)])
    b.say(0, 5)
    assert await tokens(generation, 1) == [5]


async def test_a_stream_that_loses_its_replica_too_often_ends_with_a_typed_error() -> None:
    fleet = FakeFleet("r0")
    generation = await dispatcher_for(fleet).open([Work([1], PARAMS)])
    for attempt in range(MAX_FAILURES + 1):
        await until(lambda attempt=attempt: fleet.replicas[f"r{attempt}"].submitted)
        fleet.add(f"r{attempt + 1}")
        fleet.kill(f"r{attempt}")
    (piece,) = await generation.next()
    assert isinstance(piece.error, Unavailable)


async def test_a_replica_whose_engine_is_dead_is_passed_over() -> None:
    fleet = FakeFleet("broken", "fine")
    fleet.replicas["broken"].answer = Refused("broken", "failed", "the engine stopped")
    await dispatcher_for(fleet).open([Work([1], PARAMS)])
    assert len(fleet.replicas["fine"].submitted) == 1


@pytest.mark.parametrize(
    ("kind", "error"), [("overloaded", Overloaded), ("invalid", InvalidRequest)], ids=["overloaded", "invalid"]
)
async def test_a_refusal_reaches_the_caller_with_its_type(kind: str, error: type[Exception]) -> None:
    fleet = FakeFleet("a")
    fleet.replicas["a"].answer = Refused("a", kind, "no")  # type: ignore[arg-type]
    with pytest.raises(error, match="no"):
        await dispatcher_for(fleet).open([Work([1], PARAMS)])


async def test_no_engine_within_the_time_limit_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.dispatch.SUBMIT_TIMEOUT_S", 0.01)
    with pytest.raises(Unavailable):
        await dispatcher_for(FakeFleet()).open([Work([1], PARAMS)])


async def test_aborting_reaches_the_replica_once_and_only_for_what_still_runs() -> None:
    fleet = FakeFleet("a")
    dispatcher = dispatcher_for(fleet)
    generation = await dispatcher.open([Work([1], PARAMS), Work([1], PARAMS)])
    a = fleet.replicas["a"]
    a.say(0, 5, finish_reason="stop")
    await tokens(generation, 1)
    dispatcher.abort(generation.streams)
    dispatcher.abort(generation.streams)
    await until(lambda: a.aborted)
    assert a.aborted == [a.submitted[1].request_id]


async def test_a_client_that_leaves_while_its_stream_waits_for_a_replica_leaves_nothing_running() -> None:
    fleet = FakeFleet("a")
    dispatcher = dispatcher_for(fleet)
    generation = await dispatcher.open([Work([1], PARAMS)])
    fleet.replicas["a"].say(0, 5)
    await tokens(generation, 1)
    fleet.kill("a")
    await until(lambda: generation.streams[0].resumes == 1)
    await asyncio.sleep(0)  # the second call is now waiting for a replica to come up
    dispatcher.abort(generation.streams)
    fleet.add("b")
    b = fleet.replicas["b"]
    await until(lambda: b.aborted)
    assert b.aborted == [b.submitted[0].request_id]


async def test_letting_go_ends_every_channel() -> None:
    fleet = FakeFleet("a")
    dispatcher = dispatcher_for(fleet)
    generation = await dispatcher.open([Work([1], PARAMS)])
    fleet.replicas["a"].say(0, 5)
    await tokens(generation, 1)
    dispatcher.close()
    await until(lambda: all(link.is_done for link in dispatcher._links.values()))


async def test_a_deadline_crosses_the_hop_as_the_time_that_is_left() -> None:
    fleet = FakeFleet("a", "b")
    await dispatcher_for(fleet).open([WORK], deadline=time.monotonic() + 60)
    (submission,) = fleet.replicas["a"].submitted or fleet.replicas["b"].submitted
    assert submission.seconds_left == pytest.approx(60, abs=1)


async def test_a_stream_that_the_engine_ends_at_its_deadline_ends_with_a_typed_error() -> None:
    fleet = FakeFleet("a")
    generation = await dispatcher_for(fleet).open([WORK])
    fleet.replicas["a"].say(0, finish_reason="deadline")
    (piece,) = await generation.next()
    assert isinstance(piece.error, DeadlineExceeded)


async def test_a_reader_that_falls_too_far_behind_is_given_up_and_its_engine_work_stopped() -> None:
    fleet = FakeFleet("a")
    generation = await dispatcher_for(fleet).open([WORK, WORK], max_unread_tokens=2)
    a, cut = fleet.replicas["a"], []
    generation.on_overrun.append(lambda: cut.append(True))
    a.say(0, 1, 2)
    a.say(1, 1, 2)
    assert await tokens(generation, 4)
    assert not cut, "what has been taken does not count"
    a.say(0, 3, 4, 5)
    a.say(1, 3, 4)
    await until(lambda: a.aborted)
    assert cut == [True]
    assert len(a.aborted) == 2


async def test_behind_the_tokens_that_were_not_taken_comes_an_error() -> None:
    """Also for whoever is not writing to a client, and so cannot be cut off."""
    fleet = FakeFleet("a")
    generation = await dispatcher_for(fleet).open([WORK], max_unread_tokens=2)
    fleet.replicas["a"].say(0, 1, 2, 3)
    async with asyncio.timeout(5):
        said, given_up = [*await generation.next(), *([] if generation.is_overrun else await generation.next())]
    assert said.token_ids == [1, 2, 3]
    assert isinstance(given_up.error, ServiceError)


async def test_a_stream_that_cannot_be_moved_for_a_fault_of_ours_ends_with_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fleet = FakeFleet("a", "b")
    dispatcher = dispatcher_for(fleet)
    generation = await dispatcher.open([WORK])
    (taken,) = (replica for replica in fleet.replicas.values() if replica.submitted)
    monkeypatch.setattr(dispatcher, "_accepted", lambda *args: 1 / 0)
    fleet.kill(taken.name)
    async with asyncio.timeout(5):
        (piece,) = await generation.next()
    assert isinstance(piece.error, ServiceError)
    (other,) = fleet.replicas.values()
    await until(lambda: other.aborted == [other.submitted[0].request_id])


async def test_engines_that_may_sleep_are_not_woken_to_see_whether_the_service_is_ready() -> None:
    metrics, nobody = IngressMetrics("tiny"), FakeFleet()
    await Dispatcher(nobody, metrics, engines_sleep=True).probe(0.01)  # type: ignore[arg-type]
    with pytest.raises(Unavailable):
        await Dispatcher(nobody, metrics).probe(0.01)  # type: ignore[arg-type]


async def test_a_request_waits_longer_where_the_engines_may_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.dispatch.SUBMIT_TIMEOUT_S", 0.01)
    monkeypatch.setattr("service.dispatch.NOBODY_TIMEOUT_S", 0.01)
    fleet = FakeFleet()
    dispatcher = Dispatcher(fleet, IngressMetrics("tiny"), engines_sleep=True)  # type: ignore[arg-type]
    asyncio.get_running_loop().call_later(0.1, fleet.add, "late")
    generation = await dispatcher.open([WORK])
    assert generation.streams[0].replica_id == "late"


@pytest.fixture
def quick_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns of a hundredth of a second."""
    for module in ("link", "dispatch"):
        monkeypatch.setattr(f"service.{module}.TURN_S", 0.01)


@pytest.mark.usefixtures("quick_turns")
async def test_a_replica_that_falls_silent_loses_its_streams_and_its_late_tokens_are_dropped() -> None:
    fleet = FakeFleet("a", "b")
    dispatcher = dispatcher_for(fleet)
    generation = await dispatcher.open([WORK])
    silent, other = sorted(fleet.replicas.values(), key=lambda replica: not replica.submitted)
    silent.say(0, 7)
    assert await tokens(generation, 1) == [7]
    silent.awake.clear()
    await until(lambda: other.submitted)
    assert other.submitted[0].output_ids == [7]
    silent.say(0, 66)
    silent.awake.set()
    other.say(0, 8)
    assert await tokens(generation, 1) == [8]
    await until(lambda: silent.aborted == [silent.submitted[0].request_id])


@pytest.mark.usefixtures("quick_turns")
async def test_a_channel_that_beats_is_not_silent() -> None:
    fleet = FakeFleet("a", "b")
    generation = await dispatcher_for(fleet).open([WORK])
    busy, other = sorted(fleet.replicas.values(), key=lambda replica: not replica.submitted)
    for _ in range(3 * SILENT_TURNS):
        busy.outbox.turn(beat=True)
        await asyncio.sleep(0.01)
    assert not other.submitted
    busy.say(0, 5)
    assert await tokens(generation, 1) == [5]


@pytest.mark.usefixtures("quick_turns")
async def test_what_a_replica_has_that_is_to_go_it_finishes() -> None:
    fleet = FakeFleet("a")
    dispatcher = dispatcher_for(fleet)
    generation = await dispatcher.open([WORK])
    fleet.replicas["a"].say(0, 4)
    assert await tokens(generation, 1) == [4], "its channel is open"
    fleet.add("b")
    a, link = fleet.leave("a"), dispatcher._links["a"]
    for _ in range(3 * SILENT_TURNS):
        a.outbox.turn(beat=True)
        await asyncio.sleep(0.01)
    assert link.is_leaving
    assert not fleet.replicas["b"].submitted
    a.say(0, 5, finish_reason="stop")
    assert await tokens(generation, 1) == [5]
    await until(lambda: link.is_done)


async def test_another_call_carries_a_channel_on_before_ray_has_kept_much_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.link.ITEMS_A_CALL", 3)
    fleet = FakeFleet("a")
    dispatcher = dispatcher_for(fleet)
    generation = await dispatcher.open([WORK])
    a = fleet.replicas["a"]
    for token in range(10):
        a.say(0, token)
        assert await tokens(generation, 1) == [token], "each an item of its own"
    assert not a.outbox.is_answered_by(call=1)
    assert len(a.submitted) == 1
    a.outbox.close()
    await until(lambda: not dispatcher._links["a"].is_open)


async def test_a_channel_that_no_other_call_can_carry_on_goes_on_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.link.ITEMS_A_CALL", 2)
    fleet = FakeFleet("a")
    generation = await dispatcher_for(fleet).open([WORK])
    fleet.replicas["a"].say(0, 0)
    assert await tokens(generation, 1) == [0], "its channel is open"
    a = fleet.leave("a")
    for token in range(1, 6):
        a.say(0, token)
        assert await tokens(generation, 1) == [token]
    assert a.outbox.is_answered_by(call=1)


@pytest.mark.usefixtures("quick_turns")
async def test_a_replica_that_was_to_go_and_is_stopped_before_it_is_through_has_not_failed() -> None:
    fleet = FakeFleet("r0")
    dispatcher = dispatcher_for(fleet)
    generation = await dispatcher.open([WORK])
    for number in range(MAX_FAILURES + 1):
        await until(lambda number=number: fleet.replicas[f"r{number}"].submitted)
        fleet.replicas[f"r{number}"].say(0, number)
        assert await tokens(generation, 1) == [number], "its channel is open"
        link = dispatcher._links[f"r{number}"]
        fleet.add(f"r{number + 1}")
        leaving = fleet.leave(f"r{number}")
        await until(lambda link=link: link.is_leaving)
        leaving.outbox.close()
    last = fleet.replicas[f"r{MAX_FAILURES + 1}"]
    await until(lambda: last.submitted)
    assert last.submitted[0].resumed
    last.say(0, 5)
    assert await tokens(generation, 1) == [5]


@pytest.mark.usefixtures("quick_turns")
async def test_a_silent_replica_gets_no_work_until_it_answers_again() -> None:
    fleet = FakeFleet("a", "b")
    dispatcher = dispatcher_for(fleet)
    await dispatcher.open([WORK])
    silent, other = sorted(fleet.replicas.values(), key=lambda replica: not replica.submitted)
    silent.awake.clear()
    await until(lambda: other.submitted)
    for _ in range(3):
        await dispatcher.open([WORK])
    assert len(other.submitted) == 4
    silent.new_session()
    silent.awake.set()
    await until(lambda: silent.name not in dispatcher._quarantined())
    await dispatcher.open([WORK])
    assert len(silent.submitted) == 2


@pytest.mark.usefixtures("quick_turns")
async def test_a_call_to_a_replica_that_never_said_a_word_is_made_elsewhere_in_the_end() -> None:
    fleet = FakeFleet("a", "b")
    fleet.replicas["a"].awake.clear()
    dispatcher = dispatcher_for(fleet)
    generation = await dispatcher.open([WORK])
    b = fleet.replicas["b"]
    b.say(len(b.submitted) - 1, 5)
    assert await tokens(generation, 1) == [5]


@pytest.mark.usefixtures("quick_turns")
async def test_streams_of_a_session_that_the_replica_gave_up_move_even_if_its_end_was_never_seen() -> None:
    fleet = FakeFleet("a")
    dispatcher = dispatcher_for(fleet)
    first = await dispatcher.open([WORK])
    a = fleet.replicas["a"]
    a.say(0, 4)
    assert await tokens(first, 1) == [4], "its channel is open"
    a.outbox = Outbox(session=1)  # without a word about the old one
    a.answer = Accepted("a", 1)
    await dispatcher.open([WORK])
    await until(lambda: len(a.submitted) == 3)
    assert a.submitted[2].resumed
    a.say(2, 5)
    assert await tokens(first, 1) == [5]


@pytest.mark.usefixtures("quick_turns")
async def test_a_ping_tells_how_much_has_come() -> None:
    fleet = FakeFleet("a")
    generation = await dispatcher_for(fleet).open([WORK])
    a = fleet.replicas["a"]
    a.say(0, 5)
    a.say(0, 6)
    await tokens(generation, 2)
    await until(lambda: (0, 2) in a.pings)


async def test_requests_move_each_for_itself_and_the_choices_of_one_together() -> None:
    fleet = FakeFleet("a")
    dispatcher = dispatcher_for(fleet)
    await dispatcher.open([WORK, WORK])
    await dispatcher.open([WORK])
    for name in ("b", "c"):
        fleet.add(name)
    fleet.kill("a")
    await until(lambda: sum(len(replica.submitted) for replica in fleet.replicas.values()) == 3)
    calls = [{one.request_id[:32] for one in replica.submitted} for replica in fleet.replicas.values()]
    assert sum(map(len, calls)) == 2, "nobody's choices are parted"
