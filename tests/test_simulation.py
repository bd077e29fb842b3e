"""The model in deploy/, run on scenarios of a few seconds; the policy that it asks is the service's own."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from deploy.simulate_autoscaling import SCENARIOS, Replica, Result, Scenario, Simulation, burst, draw, wave
from service.autoscaling import Autoscaling

pytestmark = pytest.mark.fast

# A place is held for about a second, and ten to a replica: 7 requests a second are a load of 0.7.
QUICK = Replica(places=10, prefill_rate=10_000, token_seconds=0.01, token_seconds_each=0.0, start_seconds=10)


def scenario(**changes: Any) -> Scenario:
    given: dict[str, Any] = {
        "name": "test",
        "title": "test",
        "seconds": 300,
        "rate": lambda now: 20.0,
        "peak_rate": 20.0,
        "scaling": Autoscaling(max_replicas=20, down_delay_s=30),
        "replica": QUICK,
        "prompt_tokens": 100,
        "output_tokens": 100,
    }
    return Scenario(**given | changes)


def run(seed: int = 0, **changes: Any) -> Result:
    return Simulation(scenario(**changes), seed).run()


def test_one_seed_is_one_course_of_events_and_another_is_another() -> None:
    assert run(seed=1) == run(seed=1)
    assert run(seed=1).waits != run(seed=2).waits


def test_every_request_gets_a_place_in_the_order_of_arrival_and_none_beyond_what_there_is() -> None:
    result = run(rate=burst(5, 60, 60, 120), peak_rate=60)
    starts = [arrival + wait for arrival, wait in result.waits]
    assert all(a <= b + 1e-9 for a, b in pairwise(starts))
    assert all(sample.running <= QUICK.places * 20 for sample in result.samples)
    assert result.samples[-1].waiting == 0
    assert abs(len(result.waits) - (5 * 240 + 60 * 60)) < 300


def test_a_steady_demand_settles_where_it_is_met_and_never_swings_far() -> None:
    result = run(seconds=600)
    settled = {sample.target for sample in result.samples[200:]}
    assert settled <= {4, 5, 6}, "20 requests/s are a load of 2.0 on average, and of 3.5 now and then"
    assert result.turns <= 4


@pytest.mark.parametrize("seed", range(5))
def test_a_wave_turns_the_number_round_once_and_noise_a_little_more(seed: int) -> None:
    result = run(seed=seed, rate=wave(5, 100, 600), peak_rate=100, seconds=600)
    assert max(sample.target for sample in result.samples) >= 13
    assert result.turns <= 3


def test_a_burst_is_followed_up_and_down() -> None:
    result = run(rate=burst(5, 60, 60, 150), peak_rate=60)
    assert max(sample.serving for sample in result.samples) >= 8
    assert result.samples[-1].target <= 2
    assert result.wait(50) < 1


def test_a_sleeping_service_is_woken_and_waits_for_no_longer_than_a_start() -> None:
    sleepy = Autoscaling(min_replicas=0, max_replicas=4, idle_s=20)
    result = run(scaling=sleepy, rate=burst(0, 2, 100, 150), peak_rate=2)
    targets = [sample.target for sample in result.samples]
    assert targets[:20] == [1] * 20
    assert targets[50:100] == [0] * 50
    assert targets[-1] == 0
    assert 9 < max(wait for _, wait in result.waits) <= QUICK.start_seconds + 1
    assert len(result.waits) > 50


def test_a_thousand_replicas_are_reached_where_the_load_asks_for_them() -> None:
    big = replace(
        SCENARIOS[0], rate=lambda now: 1200.0, peak_rate=1200.0, seconds=240, replica=Replica(start_seconds=20)
    )
    result = Simulation(big).run()
    assert 700 < max(sample.serving for sample in result.samples) <= 1000


def test_the_picture_shows_every_scenario(tmp_path: Any) -> None:
    short = {each.name: Simulation(replace(each, seconds=30)).run() for each in SCENARIOS}
    draw(short, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
