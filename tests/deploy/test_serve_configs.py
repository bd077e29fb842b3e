"""The Serve configurations, read by Ray's own schema and by ours."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from model.errors import ConfigError
from service.app import AppArgs
from tests.deploy.manifests import DEPLOY, put

pytestmark = pytest.mark.fast

CONFIGS = [*sorted(DEPLOY.glob("serve*.yaml")), *sorted(DEPLOY.glob("kubernetes/*/serve.yaml"))]
DEPLOYMENTS = {"Engine", "Ingress"}  # as service.app:build names them


def name_of(file: Path) -> str:
    return str(file.relative_to(DEPLOY))


def strangers_in(written: Any, understood: Any) -> list[str]:
    """Keys that are written and were not understood: Ray passes over those without a word."""
    if isinstance(written, dict):
        known = understood if isinstance(understood, dict) else {}
        return [
            stranger
            for key, value in written.items()
            for stranger in ([key] if key not in known else strangers_in(value, known[key]))
        ]
    if isinstance(written, list):
        return [stranger for pair in zip(written, understood, strict=True) for stranger in strangers_in(*pair)]
    return []


def read(config: dict[str, Any]) -> tuple[ServeDeploySchema, AppArgs]:
    """Raises `ValidationError`, or `KeyError` for a key or a deployment that nobody knows."""
    schema = ServeDeploySchema.model_validate(config)
    if strangers := strangers_in(config, schema.model_dump(exclude_unset=True)):
        raise KeyError(strangers)
    [application] = schema.applications
    if others := {deployment.name for deployment in application.deployments} - DEPLOYMENTS:
        raise KeyError(others)
    return schema, AppArgs.model_validate(application.args)


@pytest.fixture(params=CONFIGS, ids=name_of)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return yaml.safe_load(request.param.read_text())


def test_there_is_one_for_each_way_to_deploy():
    assert [name_of(file) for file in CONFIGS] == [
        "serve-cluster.yaml",
        "serve-gpu.yaml",
        "serve.yaml",
        "kubernetes/cpu/serve.yaml",
        "kubernetes/gpu/serve.yaml",
    ]


def test_ray_and_the_application_take_it_as_it_is(config: dict[str, Any]):
    schema, _ = read(config)
    assert schema.applications[0].import_path == "service.app:build"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("http_option", {"port": 1}),
        ("proxy_location", "Everywhere"),
        ("http_options/port", "eight thousand"),
        ("applications/0/import_path", "service"),
        ("applications/0/replicas", 2),
        ("applications/0/args/replica", 2),
        ("applications/0/args/replicas", 0),
        ("applications/0/args/dtype", "bf17"),
        ("applications/0/args/kv_cache_dtype", "fp7"),
        ("applications/0/args/gpu_memory_utilization", 1.2),
        ("applications/0/args/overlap", "perhaps"),
        ("applications/0/args/cuda_graph", True),
        ("applications/0/args/limits", {"max_bodies": 1}),
        ("applications/0/deployments", [{"name": "Engines", "num_replicas": 2}]),
        ("applications/0/deployments", [{"name": "Engine", "num_replica": 2}]),
        ("applications/0/deployments", [{"name": "Engine", "ray_actor_options": {"num_gpu": 1}}]),
    ],
)
def test_a_slip_in_it_is_refused(config: dict[str, Any], path: str, value: object):
    slipped = copy.deepcopy(config)
    put(slipped, path, value)
    with pytest.raises((ValidationError, KeyError, ValueError, ConfigError)):
        read(slipped)


def test_what_other_machines_can_reach_wants_a_key(config: dict[str, Any]):
    schema, args = read(config)
    assert (args.api_keys_file is None) == (schema.http_options.host == "127.0.0.1")


def test_what_an_engine_is_given_follows_from_the_arguments_alone(config: dict[str, Any]):
    """Said a second time for its deployment, GPUs and processors could differ from what the engine was told."""
    schema, args = read(config)
    assert [deployment.name for deployment in schema.applications[0].deployments if deployment.name != "Ingress"] == []
    assert args.room["ray_actor_options"]["num_gpus"] == (1 if args.device == "cuda" else 0)


def test_an_ingress_is_told_how_many_there_are(config: dict[str, Any]):
    """It divides limits by that number: `num_replicas` of the deployment would change it behind its back."""
    schema, args = read(config)
    assert "num_replicas" not in schema.model_dump_json(exclude_unset=True)
    assert (args.ingresses > 1) == (schema.proxy_location == "EveryNode")


def test_ray_sets_aside_what_an_engine_computes_with(config: dict[str, Any]):
    """A cluster's nodes are many sizes; on one machine an engine's threads are decided from its cores."""
    schema, args = read(config)
    assert (args.replica_cpus > 0) == (schema.proxy_location == "EveryNode")
    if args.replica_cpus:
        assert args.engine_options["num_threads"] == args.replica_cpus


def test_no_address_of_one_machine_is_a_clusters(config: dict[str, Any]):
    schema, _ = read(config)
    assert (schema.http_options.host == "0.0.0.0") == (schema.proxy_location == "EveryNode")
