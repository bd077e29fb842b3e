from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from model.errors import ConfigError
from service.app import AppArgs
from service.autoscaling import Autoscaling, Load, TokenPolicy
from service.cli import _autoscaling

pytestmark = pytest.mark.fast

OPTIONS: dict[str, Any] = {"max_replicas": 10, "up_delay_s": 2, "down_delay_s": 10, "idle_s": 30}
TARGET, SLACK = 0.7, 0.3  # the defaults


def load(of_one: float = 0.0, **changes: float) -> Load:
    """Of a replica with ten places and some of them taken."""
    given = {"running": 10 * of_one, "waiting": 0, "max_running": 10, "kv_usage": 0, "pending_kv": 0}
    return Load(**{**given, "pending_tokens": 0, "tokens_per_second": 1000, **changes})


def spread(demand: float, replicas: int) -> list[Load]:
    return [load(demand / replicas)] * replicas


def decisions(policy: TokenPolicy, target: int, steps: Sequence[tuple[float, float]]) -> list[int]:
    """What is decided for a demand at each of these times, new replicas being there at once."""
    found = []
    for now, demand in steps:
        target = policy.decide(spread(demand, target) if target else [], target, now)
        found.append(target)
    return found


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (load(running=5), 0.5),
        (load(running=10, waiting=5), 1.5),
        (load(running=1, kv_usage=0.6, pending_kv=0.3), 0.9),
        (load(running=1, pending_tokens=3000), 1.5),
        (load(running=1, pending_tokens=3000, tokens_per_second=0), 0.1),
    ],
    ids=["places", "queue", "blocks", "seconds", "unmeasured"],
)
def test_a_load_is_that_of_what_is_scarcest(one: Load, expected: float) -> None:
    assert one.of_one(max_wait_s=2) == pytest.approx(expected)


def test_as_many_replicas_are_added_as_the_demand_needs() -> None:
    assert decisions(TokenPolicy(**OPTIONS), 1, [(0, 3.5), (2, 3.5)]) == [1, 5]


def test_a_short_peak_adds_nothing() -> None:
    assert decisions(TokenPolicy(**OPTIONS), 1, [(0, 3.5), (1, 0.5), (2, 3.5), (3, 3.5)]) == [1, 1, 1, 1]


def test_nothing_is_added_while_replicas_are_starting() -> None:
    policy = TokenPolicy(**OPTIONS)
    assert [policy.decide(spread(9, 2), 5, now) for now in (0, 2, 4)] == [5, 5, 5]
    assert [policy.decide(spread(9, 5), 5, now) for now in (6, 8)] == [5, 10]


def test_too_many_replicas_go_after_a_while_and_not_beyond_the_most_that_was_needed_meanwhile() -> None:
    steps = [(0, 0.4), (4, 1.4), (8, 0.4), (10, 0.4)]
    assert decisions(TokenPolicy(**OPTIONS), 6, steps) == [6, 6, 6, 3]


def test_a_demand_inside_the_band_changes_nothing() -> None:
    policy = TokenPolicy(**OPTIONS)
    inside = [2.8, 2.0, 2.79, 1.97] * 20  # of four replicas: 0.7 each at most, over 0.49 on three
    assert set(decisions(policy, 4, [(3 * i, demand) for i, demand in enumerate(inside)])) == {4}


def test_the_bounds_hold() -> None:
    assert decisions(TokenPolicy(**OPTIONS), 9, [(0, 99), (2, 99)]) == [9, 10]
    assert decisions(TokenPolicy(**OPTIONS | {"min_replicas": 2}), 3, [(0, 0), (10, 0), (60, 0)]) == [3, 2, 2]


def test_the_last_replica_goes_only_where_it_may_and_after_a_time_without_any_request() -> None:
    sleepy = OPTIONS | {"min_replicas": 0}
    assert decisions(TokenPolicy(**sleepy), 2, [(0, 0), (10, 0), (20, 0), (39, 0), (50, 0)]) == [2, 1, 1, 1, 0]
    assert decisions(TokenPolicy(**sleepy), 1, [(0, 0), (29, 0.1), (31, 0), (60, 0), (61, 0)]) == [1, 1, 1, 1, 0]
    assert decisions(TokenPolicy(**OPTIONS), 1, [(0, 0), (100, 0)]) == [1, 1]


def test_a_service_asleep_stays_so_until_serve_wakes_it() -> None:
    policy = TokenPolicy(**OPTIONS | {"min_replicas": 0})
    assert policy.decide([], 0, 0) == 0
    assert policy.decide([], 1, 1) == 1, "the first replica is still starting"
    assert policy.decide([], 1, 1000) == 1


@settings(max_examples=200, deadline=None)
@given(
    start=st.integers(1, 50),
    middle=st.floats(0.5, 40),
    wobble=st.lists(st.floats(-1, 1), min_size=30, max_size=120),
    delays=st.tuples(st.floats(0, 5), st.floats(0, 20)),
)
def test_a_demand_that_stays_within_the_band_never_makes_the_number_swing(
    start: int, middle: float, wobble: list[float], delays: tuple[float, float]
) -> None:
    """Whatever the delays, from whatever number: it goes one way, and never back."""
    policy = TokenPolicy(max_replicas=100, up_delay_s=delays[0], down_delay_s=delays[1])
    factor = (1 / (1 - SLACK)) ** 0.5  # so the highest is 1 / (1 - slack) times the lowest
    steps = [(float(i), middle * factor**by) for i, by in enumerate(wobble)]
    found = [start, *decisions(policy, start, steps)]
    changes = [b - a for a, b in pairwise(found) if a != b]
    assert not any((a > 0) != (b > 0) for a, b in pairwise(changes))


def test_serve_asks_with_time_series_and_a_replica_that_has_said_nothing_yet_is_starting() -> None:
    def series(value: float) -> list[Any]:
        return [SimpleNamespace(timestamp=0, value=99), SimpleNamespace(timestamp=1, value=value)]

    busy = load(3.5)
    metrics = {name: {"r1": series(value)} for name, value in busy._asdict().items()}
    metrics["running_requests"] = {"r1": series(1), "r2": series(1)}
    policy = TokenPolicy(**OPTIONS)

    def decide(target: int, now: float) -> int:
        return policy(SimpleNamespace(raw_metrics=metrics, target_num_replicas=target, current_time=now))[0]

    assert [decide(1, 0), decide(1, 2)] == [1, 5]
    assert [decide(2, 4), decide(2, 9)] == [2, 2]


@pytest.mark.parametrize(
    "options",
    [{}, {"max_replicas": 0}, {"min_replicas": 3, "max_replicas": 2}, {"max_replicas": 2, "target": 1}],
    ids=["no maximum", "none", "crossed", "unknown"],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        Autoscaling(**options)


@pytest.mark.parametrize(
    ("words", "said"), [((0, None, 1), "--max-replicas"), ((1, 3, 2), "fixed"), ((4, 3, 1), "exceed")]
)
def test_the_command_line_refuses_numbers_that_contradict_one_another(words: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        _autoscaling(*words)


def test_cores_are_shared_out_for_the_most_replicas_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.machine.cores", lambda: 32)
    scaled = AppArgs(model="m", autoscaling=Autoscaling(max_replicas=4))
    assert scaled.cores == 8
    assert scaled.engine_options["num_threads"] is None, "the engine knows its kernels"
    assert AppArgs(model="m", replica_cpus=8).engine_options["num_threads"] == 8


def test_serve_gets_the_policy_its_bounds_and_reports_every_second() -> None:
    config = AppArgs(model="m", autoscaling=Autoscaling(min_replicas=0, max_replicas=4)).scaling["autoscaling_config"]
    assert (config.min_replicas, config.initial_replicas, config.max_replicas) == (0, 1, 4)
    assert (config.upscale_delay_s, config.downscale_delay_s) == (0, 0), "the policy waits by itself"
    assert config.metrics_interval_s == 1
    assert config.policy.get_policy()(**config.policy.policy_kwargs).decide(spread(0.5, 1), 1, 0) == 1


def test_only_engines_that_may_sleep_let_go_of_their_ingresses_before_they_do() -> None:
    assert AppArgs(model="m", autoscaling=Autoscaling(min_replicas=0, max_replicas=4, idle_s=60)).idle_channel_s == 30
    assert AppArgs(model="m", autoscaling=Autoscaling(max_replicas=4)).idle_channel_s is None
