"""The compose file: a valid one, whose ports, files and images are there."""

import copy
import json
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

from tests.deploy.dockerfile import DOCKERFILE, stages
from tests.deploy.manifests import DEPLOY, put

pytestmark = pytest.mark.fast

FILE = DEPLOY / "docker-compose.yml"


@pytest.fixture
def compose() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


def check(compose: dict[str, Any]) -> None:
    """Raises `ValueError` for what the specification does not allow."""
    PyCompose.from_yaml(yaml.safe_dump(compose)).validate()


def test_the_specification_allows_it(compose: dict[str, Any]):
    check(compose)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("services/attendant/port", ["8000:8000"]),
        ("services/attendant/restart", "sometimes"),
        ("services/attendant/read_only", 7),
        ("services/attendant/networks", ["nowhere"]),
        ("services/attendant/stop_grace_period", "a minute"),
        ("services/prometheus/depends_on/attendant/condition", "service_well"),
        ("volumes/grafana", "here"),
    ],
)
def test_a_slip_in_it_is_refused(compose: dict[str, Any], path: str, value: object):
    slipped = copy.deepcopy(compose)
    put(slipped, path, value)
    with pytest.raises(ValueError, match=r"services|volumes|network"):
        check(slipped)


def test_the_image_is_a_target_of_the_dockerfile(compose: dict[str, Any]):
    build = compose["services"]["attendant"]["build"]
    assert (DEPLOY / build["context"]).resolve() == DEPLOY.parent
    assert (DEPLOY.parent / build["dockerfile"]) == DOCKERFILE
    assert build["target"] in stages(DOCKERFILE.read_text())


def test_all_ports_are_this_machines_alone(compose: dict[str, Any]):
    ports = {name: port for name, service in compose["services"].items() for port in service["ports"]}
    assert ports == {
        "attendant": "127.0.0.1:8000:8000",
        "prometheus": "127.0.0.1:9090:9090",
        "grafana": "127.0.0.1:3000:3000",
    }


def test_no_container_keeps_a_capability_or_gains_a_privilege(compose: dict[str, Any]):
    for service in compose["services"].values():
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_every_file_that_is_mounted_is_there(compose: dict[str, Any]):
    mounts = [volume.split(":")[0] for service in compose["services"].values() for volume in service.get("volumes", [])]
    files = [mount for mount in mounts if mount.startswith(".")]
    assert len(files) == 5
    assert [file for file in files if not (DEPLOY / file).exists()] == []
    assert {mount for mount in mounts if not mount.startswith(".")} == compose["volumes"].keys()


def test_prometheus_asks_the_service_where_it_listens(compose: dict[str, Any]):
    mounts = dict(volume.split(":")[:2] for volume in compose["services"]["prometheus"]["volumes"])
    inside = {target: source for source, target in mounts.items()}
    [targets] = json.loads((DEPLOY / inside["/etc/prometheus/targets.json"]).read_text())
    [(host, port)] = [target.split(":") for target in targets["targets"]]
    assert compose["services"][host]["ports"] == [f"127.0.0.1:{port}:{port}"]
    jobs = yaml.safe_load((DEPLOY / inside["/etc/prometheus/prometheus.yml"]).read_text())["scrape_configs"]
    assert [job["file_sd_configs"] for job in jobs] == [[{"files": ["targets.json"]}]]


def test_grafana_asks_prometheus_where_it_listens(compose: dict[str, Any]):
    sources = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert [source["url"] for source in sources] == ["http://prometheus:9090"]
    assert compose["services"]["prometheus"]["ports"] == ["127.0.0.1:9090:9090"]


def test_grafana_finds_the_dashboards_where_they_are_mounted(compose: dict[str, Any]):
    mounts = dict(volume.split(":")[:2] for volume in compose["services"]["grafana"]["volumes"])
    providers = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/attendant.yml").read_text())["providers"]
    assert [provider["options"]["path"] for provider in providers] == [mounts["./grafana/dashboards"]]
