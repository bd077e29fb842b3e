"""The dispatcher's part in routing: what it tells the router, and what it learns from what comes back."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from model.sampling.params import SamplingParams
from service import replica as replica_module
from service.affinity import BLOCK_TOKENS as B
from service.affinity import Prefix
from service.channel import Refused, Work
from service.replica import EngineReplica, Queue
from service.streams import Generation
from tests.service.fakes import FakeFleet, LocalFleet
from tests.service.test_dispatch import dispatcher_for, tokens, until

pytestmark = pytest.mark.fast

PARAMS = SamplingParams(max_tokens=8, seed=1)


def work(first: int, blocks: int = 4, salt: str = "", session: str = "") -> Work:
    return Work([first] * (blocks * B) + [0], PARAMS, cache_salt=salt, session=session)


@pytest.fixture
def local(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalFleet]:
    """One real engine, whose cache holds half of what the test below asks for."""
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="r1"))
    monkeypatch.setattr(replica_module.serve, "get_replica_context", lambda: context)
    options = {"dtype": "fp32", "device": "cpu", "kv_cache_tokens": 1024, "num_threads": 1}
    replica = EngineReplica(str(tiny_model), "tiny", options, Queue(max_waiting=4))
    yield LocalFleet(replica)
    replica.__del__()


def placed(fleet: FakeFleet, prompt: Sequence[int]) -> list[str]:
    """Where requests with this prompt have gone."""
    return [
        name for name, replica in fleet.replicas.items() for sent in replica.submitted if sent.work.prompt_ids == prompt
    ]


async def finish(fleet: FakeFleet, generation: Generation, num_cached: int = 0, *token_ids: int) -> None:
    """The end of a request of one choice, as its replica tells it."""
    (stream,) = generation.streams
    outbox = fleet.replicas[stream.replica_id or ""].outbox
    outbox.put([(stream.request_id, list(token_ids) or [5], "stop", num_cached, None)])
    await tokens(generation, 1)


async def test_prompts_of_one_prefix_meet_in_one_replica() -> None:
    fleet = FakeFleet("a", "b", "c")
    dispatcher = dispatcher_for(fleet)
    for _ in range(3):
        for first in (1, 2, 3):
            await finish(fleet, await dispatcher.open([work(first)]), 0)
    homes = [set(placed(fleet, work(first).prompt_ids)) for first in (1, 2, 3)]
    assert [len(home) for home in homes] == [1, 1, 1]


async def test_a_conversation_goes_on_where_its_last_answer_was_written() -> None:
    fleet = FakeFleet("a", "b")
    dispatcher = dispatcher_for(fleet)
    await dispatcher.open([work(9)])  # now a is the busier one
    said = [7] * (B + 1)  # nobody has computed the last one
    await finish(fleet, await dispatcher.open([Work([1] * B, PARAMS)]), 0, *said)
    await dispatcher.open([Work([1] * B + said + [2] * B, PARAMS)])
    assert fleet.hints[-1].cached == {"b": 2 * B}


async def test_another_tenant_finds_nothing() -> None:
    fleet = FakeFleet("a", "b")
    dispatcher = dispatcher_for(fleet)
    await finish(fleet, await dispatcher.open([work(1, salt="one")]))
    await dispatcher.open([work(1, salt="two")])
    assert fleet.hints[-1].cached == {}


async def test_a_session_goes_with_the_hint() -> None:
    fleet = FakeFleet("a")
    await dispatcher_for(fleet).open([work(1, session="s")])
    assert fleet.hints[-1].session == "s"


async def test_a_prompt_weighs_where_it_waits_until_its_first_token_is_there() -> None:
    fleet = FakeFleet("a", "b")
    dispatcher = dispatcher_for(fleet)
    generation = await dispatcher.open([work(1)])
    await dispatcher.open([work(2)])
    assert fleet.hints[-1].pending == {"a": 4 * B + 1}
    fleet.replicas["a"].say(0, 7)
    await tokens(generation, 1)
    await dispatcher.open([work(3)])
    assert fleet.hints[-1].pending == {"a": 0, "b": 4 * B + 1}


async def test_choices_of_one_prompt_count_it_once() -> None:
    fleet = FakeFleet("a")
    dispatcher = dispatcher_for(fleet)
    await dispatcher.open([work(1)] * 3)
    assert fleet.hints[-1].num_tokens == 4 * B + 1
    await dispatcher.open([work(2)])
    assert fleet.hints[-1].pending == {"a": 4 * B + 1}
    assert fleet.hints[-1].open_streams == {"a": 3}


async def test_a_replica_that_found_less_than_was_believed_is_believed_less() -> None:
    fleet = FakeFleet("a")
    dispatcher = dispatcher_for(fleet)
    await finish(fleet, await dispatcher.open([work(1)]))
    await finish(fleet, await dispatcher.open([work(2)]))
    await finish(fleet, await dispatcher.open([work(2)]), 0)  # it was overwritten: so was what came before
    await dispatcher.open([work(1)])
    assert fleet.hints[-1].cached == {}


async def test_an_aborted_prompt_is_not_believed_to_be_cached() -> None:
    fleet = FakeFleet("a")
    dispatcher = dispatcher_for(fleet)
    dispatcher.abort((await dispatcher.open([work(1)])).streams)
    await dispatcher.open([work(1)])
    assert fleet.hints[-1].cached == {}
    assert fleet.hints[-1].pending == {}


@pytest.mark.parametrize("reason", ["deadline", "error"])
async def test_a_request_that_dies_in_the_queue_says_nothing_of_the_cache(reason: str) -> None:
    fleet = FakeFleet("a")
    dispatcher = dispatcher_for(fleet)
    await finish(fleet, await dispatcher.open([work(1)]))
    for first in (1, 2):  # what is there, and what would have come
        generation = await dispatcher.open([work(first)])
        fleet.replicas["a"].say(first, finish_reason=reason)
        (piece,) = await generation.next()
        assert piece.error is not None
    await dispatcher.open([work(1)])
    assert fleet.hints[-1].cached == {"a": 4 * B}, "no eviction"
    await dispatcher.open([work(2)])
    assert fleet.hints[-1].cached == {}, "never computed"


async def test_a_dead_replica_takes_its_cache_with_it_and_a_moved_stream_is_followed() -> None:
    fleet = FakeFleet("a", "b")
    dispatcher = dispatcher_for(fleet)
    await finish(fleet, await dispatcher.open([work(1)]))
    generation = await dispatcher.open([work(1)])
    fleet.replicas["a"].say(1, *[7] * B)
    await tokens(generation, B)
    fleet.kill("a")
    await until(lambda: generation.streams[0].replica_id == "b")
    assert fleet.hints[-1].cached == {}
    await dispatcher.open([work(1)])
    assert fleet.hints[-1].cached == {"b": 4 * B}
    assert fleet.hints[-1].pending == {"b": 5 * B + 1}


async def test_a_replica_whose_engine_is_dead_is_not_asked_again() -> None:
    fleet = FakeFleet("broken", "fine")
    fleet.replicas["broken"].answer = Refused("broken", "failed", "the engine stopped")
    dispatcher = dispatcher_for(fleet)
    await dispatcher.open([work(1)])
    await dispatcher.open([work(1)])
    assert fleet.hints[-1].avoid == {"broken"}
    assert len(fleet.replicas["fine"].submitted) == 2


async def test_beside_a_real_engine_the_belief_is_nearly_always_what_the_engine_finds(local: LocalFleet) -> None:
    dispatcher = dispatcher_for(local)  # type: ignore[arg-type]
    await dispatcher.describe()
    rng = random.Random(5)
    prefixes = [[rng.randrange(5, 200) for _ in range(8 * B)] for _ in range(8)]  # half of them fit
    believed, found = [], []
    for _ in range(80):
        ids = rng.choice(prefixes)[: rng.randrange(2, 9) * B] + [rng.randrange(5, 200) for _ in range(9)]
        believed.append(dispatcher._streams.prefixes.match(Prefix(ids, "")).get("r1", 0))
        generation = await dispatcher.open([Work(ids, PARAMS)])
        pieces = await generation.next()
        found.append(pieces[0].num_cached_tokens // B * B)
        while not any(piece.finish_reason for piece in pieces):
            pieces = await generation.next()
    dispatcher.close()
    right = sum(a == b for a, b in zip(believed, found, strict=True))
    assert right >= 60, "the last parts of prompts and answers take room in the cache, too, and are not counted"
    assert 0.8 < sum(believed) / sum(found) < 1.2
    assert sum(found) > 80 * B
