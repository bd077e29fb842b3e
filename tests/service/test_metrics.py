from types import SimpleNamespace

from prometheus_client.parser import text_string_to_metric_families

from service.metrics import EngineMetrics, IngressMetrics, merge


def step(**changes: float) -> SimpleNamespace:
    stats = {
        "seconds": 0.004,
        "num_running": 2,
        "num_waiting": 1,
        "num_tokens": 10,
        "num_generated": 2,
        "kv_cache_usage": 0.5,
        "num_preemptions": 3,
        "prefix_queries": 100,
        "prefix_hits": 40,
    }
    return SimpleNamespace(**(stats | changes))


def samples(text: str) -> dict[tuple[str, str | None], float]:
    """Value by (name, replica)."""
    families = text_string_to_metric_families(text)
    return {(s.name, s.labels.get("replica")): s.value for family in families for s in family.samples}


def test_the_engines_totals_are_counted_once_however_often_they_are_told() -> None:
    metrics = EngineMetrics("tiny", "a")
    metrics.observe_step(step())  # type: ignore[arg-type]
    metrics.observe_step(step(prefix_hits=41))  # type: ignore[arg-type]
    got = samples(metrics.expose())
    assert got["attendant_num_preemptions_total", "a"] == 3
    assert got["attendant_prefix_cache_hits_total", "a"] == 41


def test_an_idle_report_moves_the_gauges_and_not_the_histogram_of_steps() -> None:
    metrics = EngineMetrics("tiny", "a")
    metrics.observe_step(step())  # type: ignore[arg-type]
    metrics.observe_step(step(num_running=0, num_tokens=0, kv_cache_usage=0.0))  # type: ignore[arg-type]
    got = samples(metrics.expose())
    assert got["attendant_num_requests_running", "a"] == 0
    assert got["attendant_engine_step_seconds_count", "a"] == 1


def test_replicas_keep_their_own_series_under_one_header() -> None:
    a, b = EngineMetrics("tiny", "a"), EngineMetrics("tiny", "b")
    a.observe_step(step(num_running=1))  # type: ignore[arg-type]
    b.observe_step(step(num_running=5))  # type: ignore[arg-type]
    text = merge([IngressMetrics("tiny").expose(), a.expose(), b.expose()])
    got = samples(text)
    assert got["attendant_num_requests_running", "a"] == 1
    assert got["attendant_num_requests_running", "b"] == 5
    assert text.count("# TYPE attendant_num_requests_running gauge") == 1


def test_merging_one_text_changes_nothing() -> None:
    text = IngressMetrics("tiny").expose()
    assert merge([text]) == text
