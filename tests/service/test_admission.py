"""A bounded queue that says how long it is."""

import pytest

from model.engine.request import Request
from model.sampling.params import SamplingParams
from service.admission import MAX_RETRY_AFTER_S, Admission, Refusal, backlog
from service.channel import Submission, Work


def waiting(prompt: int, max_tokens: int, *, priority: int = 0, leader: Request | None = None) -> Request:
    params = SamplingParams(max_tokens=max_tokens)
    return Request(f"{prompt}-{max_tokens}", [5] * prompt, params, priority=priority, leader=leader)


def running(prompt: int, max_tokens: int, *, output: int = 0) -> Request:
    request = Request("r", [5] * prompt, SamplingParams(max_tokens=max_tokens), output_ids=[5] * output)
    request.num_computed_tokens = prompt + output
    return request


def new(
    prompt: int = 10,
    max_tokens: int = 10,
    *,
    resumed: bool = False,
    seconds_left: float | None = None,
    priority: int = 0,
) -> list[Submission]:
    work = Work([5] * prompt, SamplingParams(max_tokens=max_tokens), priority=priority)
    return [Submission("new", work, [], resumed, seconds_left)]


def measured(
    tokens_per_second: int, *, max_running: int = 2, max_requests: int = 4, max_tokens: int = 1000
) -> Admission:
    admission = Admission(max_running, max_requests, max_tokens)
    admission.observe(tokens_per_second, 1.0)
    return admission


def refusal_of(
    admission: Admission, unfinished: list[Request], num_compiling: int, submissions: list[Submission]
) -> Refusal | None:
    return admission.refusal(admission.occupancy(unfinished, num_compiling), unfinished, submissions)


def reason(refusal: Refusal | None) -> str:
    assert refusal is not None
    return refusal.reason


def test_the_backlog_is_what_is_left_of_each_prompt_and_output() -> None:
    assert backlog([waiting(100, 20), running(100, 20, output=5)]) == 120 + 15


def test_siblings_share_one_prompt() -> None:
    leader = waiting(100, 20)
    assert backlog([leader, waiting(100, 20, leader=leader)]) == 120 + 20


def test_a_queue_that_is_full_of_requests_takes_no_more() -> None:
    admission = measured(100)
    assert refusal_of(admission, [waiting(1, 1)] * 3, 0, new()) is None
    assert reason(refusal_of(admission, [waiting(1, 1)] * 4, 0, new())) == "requests"


def test_requests_whose_grammars_are_being_compiled_have_their_place() -> None:
    assert reason(refusal_of(measured(100), [waiting(1, 1)] * 3, 1, new())) == "requests"


def test_a_queue_that_is_full_of_tokens_takes_no_more() -> None:
    admission = measured(100)
    assert refusal_of(admission, [waiting(480, 500)], 0, new(10, 10)) is None
    assert reason(refusal_of(admission, [waiting(480, 500)], 0, new(10, 11))) == "tokens"


def test_a_replica_without_work_takes_a_request_of_any_size() -> None:
    assert refusal_of(measured(100), [], 0, new(5000, 5000)) is None


@pytest.mark.parametrize(("tokens_per_second", "seconds"), [(100, 10), (300, 4), (100_000, 1), (1, MAX_RETRY_AFTER_S)])
def test_a_refusal_says_when_the_backlog_will_be_done_at_the_measured_speed(
    tokens_per_second: int, seconds: int
) -> None:
    refusal = refusal_of(measured(tokens_per_second), [waiting(500, 500)], 0, new())
    assert refusal is not None
    assert refusal.retry_after_s == seconds


def test_before_anything_is_measured_a_second_is_the_guess() -> None:
    refusal = refusal_of(Admission(1, 1, 10), [waiting(500, 500)], 0, new())
    assert refusal is not None
    assert refusal.retry_after_s == 1


def test_the_speed_is_that_of_the_last_steps() -> None:
    admission = measured(10)
    for _ in range(1000):
        admission.observe(100, 1.0)
    refusal = refusal_of(admission, [waiting(500, 500)], 0, new())
    assert refusal is not None
    assert refusal.retry_after_s in (10, 11)


def test_a_stream_that_lost_its_replica_is_taken_however_much_waits() -> None:
    assert refusal_of(measured(100), [waiting(500, 500)] * 4, 0, new(resumed=True)) is None


def test_a_deadline_that_would_pass_in_the_queue_is_refused_at_once() -> None:
    queue = [running(1, 1), running(1, 1), waiting(200, 200)]
    assert refusal_of(measured(100), queue, 0, new(seconds_left=5)) is None
    refusal = refusal_of(measured(100), queue, 0, new(seconds_left=1.5))
    assert reason(refusal) == "deadline"
    assert refusal is not None
    assert refusal.retry_after_s == 3


def test_a_deadline_is_no_matter_while_there_is_a_place_in_the_batch() -> None:
    assert refusal_of(measured(100), [waiting(400, 400)], 0, new(seconds_left=0.1)) is None


def test_who_goes_first_does_not_wait_for_those_behind() -> None:
    queue = [running(1, 1), running(1, 1), waiting(200, 200)]
    assert refusal_of(measured(100), queue, 0, new(seconds_left=1.5, priority=-1)) is None
