"""The instruments: what they count, and that each series says which process it is of."""

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from model.engine.stats import StepPhases, StepStats
from service.instruments import Distribution, Instruments
from service.metrics import IDLE, EngineMetrics, IngressMetrics
from service.receipt import Timing

STEP = StepStats(
    seconds=0.004,
    num_running=2,
    num_waiting=1,
    num_tokens=10,
    num_generated=2,
    kv_cache_usage=0.5,
    num_preemptions=3,
    num_failed_steps=0,
    prefix_queries=100,
    prefix_hits=40,
    num_drafted=20,
    num_accepted=5,
    phases=StepPhases(schedule=0.25, stage=0.0, forward=0.5, sample=0.0, commit=0.0),
)


def samples(text: str, *labels: str) -> dict[Any, float]:
    """Value by name without the prefix, or by that and the values of these labels."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.removeprefix("attendant_")
            found[(name, *(sample.labels.get(label) for label in labels)) if labels else name] = sample.value
    return found


def test_the_engines_totals_are_counted_once_however_often_they_are_told() -> None:
    metrics = EngineMetrics("tiny", "a")
    metrics.observe_step(STEP)
    metrics.observe_step(STEP._replace(prefix_hits=41))
    got = samples(metrics.expose())
    assert got["num_preemptions_total"] == 3
    assert got["prefix_cache_hits_total"] == 41
    assert got["spec_decode_num_draft_tokens_total"] == 20
    assert got["spec_decode_num_accepted_tokens_total"] == 5


def test_the_parts_of_the_steps_add_up() -> None:
    metrics = EngineMetrics("tiny", "a")
    metrics.observe_step(STEP)
    metrics.observe_step(STEP)
    got = samples(metrics.expose(), "phase")
    assert got["engine_step_phase_seconds_total", "schedule"] == 0.5
    assert got["engine_step_phase_seconds_total", "forward"] == 1.0


def test_an_idle_report_moves_the_gauges_and_not_the_histogram_of_steps() -> None:
    metrics = EngineMetrics("tiny", "a")
    metrics.observe_step(STEP)
    metrics.observe_step(STEP._replace(num_running=0, num_tokens=0, kv_cache_usage=0.0))
    got = samples(metrics.expose())
    assert got["num_requests_running"] == 0
    assert got["engine_step_seconds_count"] == 1


def test_an_engine_that_has_not_stepped_yet_shows_zeros() -> None:
    assert IDLE.num_running == 0
    assert samples(EngineMetrics("tiny", "a").expose())["kv_cache_usage_ratio"] == 0


def test_only_the_phases_that_a_request_reached_are_observed() -> None:
    metrics, timing = EngineMetrics("tiny", "a"), Timing()
    timing.started_at = timing.accepted_at + 0.5
    metrics.observe_request(timing)
    got = samples(metrics.expose())
    assert (got["request_queue_time_seconds_count"], got["request_queue_time_seconds_sum"]) == (1, pytest.approx(0.5))
    assert got["request_prefill_time_seconds_count"] == 0
    assert got["request_decode_time_seconds_count"] == 0


def test_every_series_says_which_process_it_is_of() -> None:
    for metrics, deployment in ((EngineMetrics("tiny", "a"), "Engine"), (IngressMetrics("tiny", "a"), "Ingress")):
        found = [s.labels for family in text_string_to_metric_families(metrics.expose()) for s in family.samples]
        assert len(found) > 50
        for labels in found:
            assert (labels["deployment"], labels["model"], labels["replica"]) == (deployment, "tiny", "a")


def test_what_can_be_counted_is_there_before_it_happens() -> None:
    """Prometheus does not see the first increase of a series that begins with it."""
    got = samples(IngressMetrics("tiny").expose(), "finished_reason", "type")
    assert got["request_success_total", "stop", None] == 0
    assert got["request_errors_total", None, "server_error"] == 0
    reasons = samples(EngineMetrics("tiny", "a").expose(), "reason")
    told = {key[1] for key in reasons if key[0] == "admission_rejections_total"}
    assert told == {"requests", "tokens", "deadline", "grammars"}


def test_a_value_on_a_bound_counts_below_it_and_one_beyond_all_counts_in_the_last() -> None:
    distribution = Distribution("d", "", {}, (1, 2))
    for value in (1, 1.5, 2, 2.5):
        distribution.observe(value)
    (family,) = distribution.collect()
    assert [(sample.labels["le"], sample.value) for sample in family.samples[:3]] == [
        ("1.0", 1), ("2.0", 3), ("+Inf", 4),
    ]  # fmt: skip


def test_several_values_alike_are_observed_at_once() -> None:
    own = Instruments(replica="a")
    own.distribution("gap", "Gaps.", (1, 2)).observe(1.5, 3)
    got = samples(own.expose())
    assert (got["gap_count"], got["gap_sum"]) == (3, 4.5)


def test_a_name_is_declared_once() -> None:
    own = Instruments(replica="a")
    own.tally("x", "X.")
    with pytest.raises(ValueError, match="Duplicated"):
        own.gauge("x", "X again.", lambda: 0)
