"""The dashboards: their files are what the generator writes, and the real Prometheus answers every query in them."""

import json
from typing import Any

import pytest

from deploy.grafana.generate import BOARDS, DASHBOARDS, dashboard, text
from tests.observe.conftest import DEPLOYED, Prometheus, until
from tests.observe.test_prometheus import Traffic, traffic  # noqa: F401 - the fixture is used here

QUERIES = [
    pytest.param(target["expr"], id=f"{name}: {panel['title']}, {target['refId']}")
    for name in BOARDS
    for panel in dashboard(name)["panels"]
    for target in panel["targets"]
]


@pytest.mark.fast
@pytest.mark.parametrize("name", BOARDS)
def test_a_committed_dashboard_is_what_the_generator_writes(name: str) -> None:
    assert (DASHBOARDS / f"{name}.json").read_text() == text(name), "run `python deploy/grafana/generate.py`"


@pytest.mark.fast
def test_nothing_lies_among_the_dashboards_that_the_generator_does_not_write() -> None:
    assert {file.stem for file in DASHBOARDS.iterdir()} == set(BOARDS)


@pytest.mark.fast
@pytest.mark.parametrize("name", BOARDS)
def test_panels_do_not_lie_upon_one_another(name: str) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard(name)["panels"]:
        place: dict[str, Any] = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells


@pytest.mark.fast
def test_dashboards_are_told_apart() -> None:
    boards = [json.loads(text(name)) for name in BOARDS]
    assert len({board["uid"] for board in boards}) == len({board["title"] for board in boards}) == len(BOARDS) == 4


@pytest.mark.slow
@pytest.mark.parametrize("expr", QUERIES)
def test_a_query_has_data_once_there_was_traffic(prometheus: Prometheus, traffic: Traffic, expr: str) -> None:  # noqa: F811
    """All of them: what can be counted is there before it happens. NaN is data too: no token has been guessed here."""
    asked = expr.replace("$__rate_interval", "1m").replace("$model", ".*")
    assert "$" not in asked
    assert until(lambda: prometheus.vector(asked), 20)


@pytest.mark.slow
def test_the_models_to_choose_from_are_those_that_are_served(prometheus: Prometheus, traffic: Traffic) -> None:  # noqa: F811
    assert "label_values(attendant_build_info, model)" in text("overview")
    assert prometheus.get("label/model/values", **{"match[]": "attendant_build_info"}) == ["tiny"]


@pytest.mark.fast
def test_grafana_finds_the_dashboards_and_prometheus() -> None:
    import yaml

    provisioning = DEPLOYED / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert (source["type"], source["isDefault"]) == ("prometheus", True)
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "attendant.yml").read_text())["providers"]
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"
