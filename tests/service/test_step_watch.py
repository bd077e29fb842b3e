import pytest

from service.step_watch import LEAST_S, MOST_S, StepWatch

pytestmark = pytest.mark.fast

TURN_S = 0.5


def turns_until_stuck(watch: StepWatch, num_tokens: int) -> int:
    watch.is_stuck(1, num_tokens, is_idle=False)
    return next(turn for turn in range(1, 10_000) if watch.is_stuck(1, num_tokens, is_idle=False))


def test_a_step_of_which_nothing_is_known_may_take_long() -> None:
    assert turns_until_stuck(StepWatch(TURN_S), 512) == MOST_S / TURN_S + 1


def test_a_step_may_take_what_its_size_asks_for_and_no_more() -> None:
    watch = StepWatch(TURN_S)
    watch.observe(1, 0.01)
    assert turns_until_stuck(watch, 1) == LEAST_S / TURN_S + 1
    assert watch.allowance(512) == pytest.approx(LEAST_S + 3 * 512 * 0.01)


def test_one_slow_step_is_forgotten_in_the_end() -> None:
    watch = StepWatch(TURN_S)
    watch.observe(1, 30.0)
    assert watch.allowance(1) > 90
    for _ in range(1000):
        watch.observe(1, 0.01)
    assert watch.allowance(1) < LEAST_S + 0.1


def test_steps_that_end_are_not_stuck_however_many_there_are() -> None:
    watch = StepWatch(TURN_S)
    watch.observe(1, 0.01)
    assert not any(watch.is_stuck(rounds, 1, is_idle=False) for rounds in range(1000))


def test_an_engine_with_nothing_to_do_is_not_stuck() -> None:
    watch = StepWatch(TURN_S)
    watch.observe(1, 0.01)
    assert not any(watch.is_stuck(1, 1, is_idle=True) for _ in range(1000))
