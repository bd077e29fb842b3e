"""Requests without a limit count with what such requests need in the mean, not with a whole context."""

import pytest

from model.engine.request import Request
from model.sampling.params import SamplingParams
from service.admission import Admission, Refusal, needed_tokens
from service.api.schemas.chat import ChatRequest
from service.api.schemas.strict import parse
from service.call import Call
from service.channel import Submission, Work
from service.completion import Completion, Service, _works
from service.dispatch import Dispatcher
from service.limits import Limits
from service.metrics import IngressMetrics
from service.usual import UsualLength
from tests.service.fakes import FakeFleet

pytestmark = pytest.mark.fast

CONTEXT = 1024  # the storyteller's
CHAT = parse(ChatRequest, {"messages": [{"role": "user", "content": "hi"}]})


def places(max_tokens: int | None) -> tuple[int, Refusal]:
    """How many chats with a prompt of 100 tokens a default queue takes, and why not the next."""
    admission, unfinished = Admission.sized(64, CONTEXT, 256), []
    while True:
        usual = UsualLength().tokens(CONTEXT)
        (work,) = _works([[5] * 100], CHAT, Call("x"), max_tokens, None, CONTEXT, usual)
        occupancy = admission.occupancy(unfinished, 0)
        if refusal := admission.refusal(occupancy, unfinished, [Submission("x", work, [], resumed=False)]):
            return len(unfinished), refusal
        unfinished.append(Request(str(len(unfinished)), work.prompt_ids, work.params))


def test_chats_without_a_limit_fill_all_places_of_the_default_queue() -> None:
    count, refusal = places(None)
    assert (count, refusal.reason) == (320, "requests")


def test_a_newcomer_without_a_limit_needs_the_usual_length() -> None:
    (work,) = _works([[5] * 100], CHAT, Call("x"), None, None, CONTEXT, 128)
    assert (work.params.max_tokens, needed_tokens(work)) == (924, 228)


def test_a_limit_that_was_set_is_believed() -> None:
    count, refusal = places(924)
    assert (count, refusal.reason) == (80, "tokens")


def test_what_is_left_of_an_unlimited_text_is_the_usual_length_until_its_context_ends() -> None:
    params = SamplingParams(max_tokens=1000, usual_tokens=100)
    assert [params.tokens_left(count) for count in (0, 500, 950, 1000, 1001)] == [100, 100, 50, 0, 0]
    assert SamplingParams(max_tokens=1000).tokens_left(300) == 700


def test_the_usual_length_is_the_mean_of_the_last_answers_and_at_first_an_eighth_of_the_context() -> None:
    usual = UsualLength()
    assert usual.tokens(CONTEXT) == 128
    usual.observe(28)
    assert usual.tokens(CONTEXT) == 78, "what it began with counts as one answer"
    for _ in range(500):
        usual.observe(400)
    assert 390 < usual.tokens(CONTEXT) < 400
    for _ in range(50):
        usual.observe(0)
    assert 100 < usual.tokens(CONTEXT) < 200


def test_the_usual_length_is_never_nothing() -> None:
    assert UsualLength().tokens(3) == 1


class Scene:
    """A completion over an engine that says what the test says."""

    def __init__(self, tokenizer) -> None:
        self.fleet, metrics = FakeFleet("a"), IngressMetrics("tiny")
        dispatcher = Dispatcher(self.fleet, metrics)  # type: ignore[arg-type]
        self.service = Service("tiny", 0, tokenizer, None, dispatcher, metrics, Limits())

    async def answer(self, *token_ids: int, max_tokens: int | None = None) -> Work:
        """One chat from its start to its end, with these tokens."""
        submitted = self.fleet.replicas["a"].submitted
        submit = self.fleet.submit.remote

        async def and_say(*args, **kwargs):
            accepted = await submit(*args, **kwargs)
            self.fleet.replicas["a"].say(len(submitted) - 1, *token_ids, finish_reason="stop")
            return accepted

        self.fleet.submit.remote = and_say
        completion = await Completion.start(self.service, Call("x"), [[1, 2]], CHAT, max_tokens)
        await completion.whole()
        completion.close()
        self.fleet.submit.remote = submit
        return submitted[-1].work


@pytest.fixture
async def scene(tokenizer) -> Scene:
    return Scene(tokenizer)


async def test_each_answer_without_a_limit_changes_what_the_next_one_counts_with(scene: Scene) -> None:
    first, second = await scene.answer(5, 6), await scene.answer(5, 6)
    assert first.params.max_tokens == 62, "the text may fill the context all the same"
    assert (first.params.usual_tokens, second.params.usual_tokens) == (8, 5)


async def test_answers_with_a_limit_tell_nothing_of_those_without(scene: Scene) -> None:
    assert (await scene.answer(5, 6, max_tokens=30)).params.usual_tokens is None
    assert (await scene.answer(5, 6)).params.usual_tokens == 8


async def test_a_key_reserves_the_usual_length_for_a_request_without_a_limit(scene: Scene, monkeypatch) -> None:
    reserved = []
    monkeypatch.setattr(Call, "reserve", lambda call, num_tokens: reserved.append(num_tokens))
    await scene.answer(5)
    await scene.answer(5, max_tokens=30)
    assert reserved == [2 + 8, 2 + 30]
