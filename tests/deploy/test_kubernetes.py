"""What `kubectl apply --kustomize` sends to a cluster: fields that exist, and parts that find one another."""

import copy
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import yaml
from ray import __version__ as ray_version

from service.app import AppArgs
from tests.deploy.manifests import DEPLOY, Manifest, at, put, render, validate

pytestmark = pytest.mark.fast

OVERLAYS = ("cpu", "gpu")
Manifests = dict[tuple[str, str], Manifest]

HEAD = "spec/rayClusterConfig/headGroupSpec"
WORKERS = "spec/rayClusterConfig/workerGroupSpecs/0"
CONTAINER = "template/spec/containers/0"
# Made by whoever runs the cluster (docs/deploy.md), never by us: no secret is in the repository.
SECRETS = {("attendant-api-keys", "keys.json"), ("attendant-metrics-key", "key"), ("attendant-redis", "password")}


@pytest.fixture(params=OVERLAYS)
def manifests(request: pytest.FixtureRequest) -> Manifests:
    return copy.deepcopy(render(request.param))


@pytest.fixture
def rayservice(manifests: Manifests) -> Manifest:
    return manifests["RayService", "attendant"]


def pods(manifests: Manifests) -> dict[str, Manifest]:
    """The template of each kind of pod, by its component."""
    rayservice = manifests["RayService", "attendant"]
    templates = [
        at(rayservice, f"{HEAD}/template"),
        at(rayservice, f"{WORKERS}/template"),
        at(manifests["StatefulSet", "redis"], "spec/template"),
    ]
    return {template["metadata"]["labels"]["app.kubernetes.io/component"]: template for template in templates}


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a label selector finds these labels."""
    wanted = selector.get("matchLabels", {}).items() <= labels.items()
    return wanted and all(
        expression["operator"] == "In" and labels.get(expression["key"]) in expression["values"]
        for expression in selector.get("matchExpressions", [])
    )


def selected(manifests: Manifests, selector: dict[str, Any]) -> set[str]:
    return {name for name, pod in pods(manifests).items() if selects(selector, pod["metadata"]["labels"])}


def ports(pod: Manifest) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in at(pod, "spec/containers/0/ports")}


def references(tree: Any) -> Iterator[tuple[str, str]]:
    """(secret, key) of everything that refers to one."""
    if isinstance(tree, list):
        for item in tree:
            yield from references(item)
    elif isinstance(tree, dict):
        for key, value in tree.items():
            if key in ("secretKeyRef", "credentials"):
                yield value["name"], value["key"]
            yield from references(value)


def rules(manifests: Manifests, pod: str, direction: str) -> list[dict[str, Any]]:
    """Every rule of every policy that holds for a pod."""
    policies = [manifest["spec"] for (kind, _), manifest in manifests.items() if kind == "NetworkPolicy"]
    return [
        rule
        for policy in policies
        if direction.capitalize() in policy["policyTypes"] and pod in selected(manifests, policy["podSelector"])
        for rule in policy.get(direction, [])
    ]


def may_talk(manifests: Manifests, source: str, target: str, port: int) -> bool:
    """Whether policies let one of our pods open a connection to another."""

    def passes(rule: dict[str, Any], side: str, other: str) -> bool:
        peers = rule.get(side)
        found = peers is None or any(
            "namespaceSelector" not in peer and other in selected(manifests, peer["podSelector"]) for peer in peers
        )
        return found and ("ports" not in rule or any(entry["port"] == port for entry in rule["ports"]))

    return any(passes(rule, "to", target) for rule in rules(manifests, source, "egress")) and any(
        passes(rule, "from", source) for rule in rules(manifests, target, "ingress")
    )


def test_a_cluster_knows_every_field(manifests: Manifests):
    for manifest in manifests.values():
        validate(manifest)


@pytest.mark.parametrize(
    ("kind", "name", "path", "value"),
    [
        ("RayService", "attendant", "spec/serveConfig", "applications: []"),
        ("RayService", "attendant", "spec/rayClusterConfig/enableInTreeAutoscaling", "yes"),
        ("RayService", "attendant", "spec/rayClusterConfig/authOptions/mode", "tokens"),
        ("RayService", "attendant", "spec/rayClusterConfig/gcsFaultToleranceOptions/redisAdress", "redis:6379"),
        ("RayService", "attendant", f"{HEAD}/rayStartParams/num-cpus", 0),
        ("RayService", "attendant", f"{HEAD}/{CONTAINER}/livenessProbe/httpGet/ports", 1),
        ("RayService", "attendant", f"{WORKERS}/groupName", None),
        ("RayService", "attendant", f"{WORKERS}/maxReplica", 3),
        ("RayService", "attendant", f"{WORKERS}/{CONTAINER}/securityContext/privilegeEscalation", False),
        ("RayService", "attendant", "spec/serveService/spec/ports/0/portt", 1),
        ("StatefulSet", "redis", "spec/template/spec/containers/0/ressources", {}),
        ("Service", "redis", "spec/ports/0/port", "redis"),
        ("NetworkPolicy", "ray", "spec/ingres", []),
        ("PodDisruptionBudget", "workers", "spec/minAvailabel", 1),
        ("PodMonitor", "attendant", "spec/podMetricsEndpoints/0/paths", "/metrics"),
        ("PodMonitor", "attendant", "spec/podMetricsEndpoints/0/interval", "often"),
        ("PodMonitor", "attendant", "spec/selector", None),
    ],
)
def test_a_slip_in_a_manifest_is_refused(manifests: Manifests, kind: str, name: str, path: str, value: object):
    manifest = manifests[kind, name]
    put(manifest, path, value)
    with pytest.raises(jsonschema.ValidationError):
        validate(manifest)


def test_everything_is_in_one_namespace(manifests: Manifests):
    namespaces = {manifest["metadata"].get("namespace") for manifest in manifests.values()}
    assert namespaces == {"attendant", None}
    assert [kind for (kind, _), m in manifests.items() if "namespace" not in m["metadata"]] == ["Namespace"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_application_is_the_one_of_the_overlays_file(overlay: str):
    written = (DEPLOY / "kubernetes" / overlay / "serve.yaml").read_text()
    manifests = render(overlay)
    assert manifests["RayService", "attendant"]["spec"]["serveConfigV2"] == written
    assert not [name for kind, name in manifests if kind == "ConfigMap" and name.startswith("serve")]


def test_the_version_of_ray_is_the_one_that_the_image_holds(rayservice: Manifest):
    assert at(rayservice, "spec/rayClusterConfig/rayVersion") == ray_version


def test_head_and_workers_run_one_image(manifests: Manifests):
    images = {at(pods(manifests)[name], "spec/containers/0/image") for name in ("head", "worker")}
    assert len(images) == 1
    assert images <= {"registry.example.com/attendant:cpu", "registry.example.com/attendant:cuda"}


def application(rayservice: Manifest) -> dict[str, Any]:
    return yaml.safe_load(rayservice["spec"]["serveConfigV2"])["applications"][0]


def needs(rayservice: Manifest) -> dict[str, dict[str, float]]:
    """What Ray sets aside for one replica of each deployment."""
    config = application(rayservice)
    options = {deployment["name"]: deployment["ray_actor_options"] for deployment in config["deployments"]}
    return {"Engine": AppArgs.model_validate(config["args"]).room["ray_actor_options"]} | options


def test_nothing_is_computed_on_the_head(rayservice: Manifest):
    assert at(rayservice, f"{HEAD}/rayStartParams")["num-cpus"] == "0"
    found = needs(rayservice)
    assert all(found[name]["num_cpus"] > 0 for name in ("Engine", "Ingress"))  # with none Ray might place them there


def test_a_worker_holds_an_engine_and_an_ingress(rayservice: Manifest):
    room = at(rayservice, f"{WORKERS}/{CONTAINER}/resources/requests")
    needed = needs(rayservice).values()
    assert sum(need["num_cpus"] for need in needed) <= int(room["cpu"])
    assert sum(need.get("num_gpus", 0) for need in needed) == int(room.get("nvidia.com/gpu", 0))


def test_there_are_workers_for_as_many_replicas_as_there_may_be(rayservice: Manifest):
    autoscaling = application(rayservice)["args"]["autoscaling"]
    workers = at(rayservice, WORKERS)
    assert at(rayservice, "spec/rayClusterConfig/enableInTreeAutoscaling") is True
    assert workers["minReplicas"] <= autoscaling["min_replicas"] <= workers["replicas"]
    assert workers["maxReplicas"] >= autoscaling["max_replicas"]


def test_a_pod_is_given_the_time_that_its_replicas_may_take_to_drain(rayservice: Manifest):
    drain_seconds = AppArgs.model_validate(application(rayservice)["args"]).drain_seconds
    assert at(rayservice, f"{WORKERS}/template/spec/terminationGracePeriodSeconds") > drain_seconds
    assert at(rayservice, "spec/rayClusterDeletionDelaySeconds") > drain_seconds


def test_the_ports_of_the_service_are_those_that_listen(rayservice: Manifest, manifests: Manifests):
    config = yaml.safe_load(rayservice["spec"]["serveConfigV2"])
    [port] = at(rayservice, "spec/serveService/spec/ports")
    assert port["targetPort"] == config["http_options"]["port"] == ports(pods(manifests)["worker"])["serve"]
    assert config["http_options"]["host"] == "0.0.0.0"


def test_redis_is_found_where_the_head_looks_for_it(rayservice: Manifest, manifests: Manifests):
    host, _, port = at(rayservice, "spec/rayClusterConfig/gcsFaultToleranceOptions/redisAddress").partition(":")
    service = manifests["Service", host]["spec"]
    assert [entry["port"] for entry in service["ports"]] == [int(port)]
    assert selected(manifests, {"matchLabels": service["selector"]}) == {"redis"}
    assert ports(pods(manifests)["redis"])[service["ports"][0]["targetPort"]] == int(port)
    stateful = manifests["StatefulSet", "redis"]["spec"]
    assert selected(manifests, stateful["selector"]) == {"redis"}
    assert stateful["serviceName"] == host


def test_prometheus_asks_the_head_alone_at_a_port_that_it_has(manifests: Manifests):
    spec = manifests["PodMonitor", "attendant"]["spec"]
    assert selected(manifests, spec["selector"]) == {"head"}
    [endpoint] = spec["podMetricsEndpoints"]
    assert ports(pods(manifests)["head"])[endpoint["port"]] == 8000
    monitoring = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    allowed = [rule["ports"] for rule in rules(manifests, "head", "ingress") if monitoring in rule["from"]]
    assert allowed == [[{"port": 8000, "protocol": "TCP"}]]


def test_the_budget_protects_workers(manifests: Manifests):
    assert selected(manifests, manifests["PodDisruptionBudget", "workers"]["spec"]["selector"]) == {"worker"}


@pytest.mark.parametrize(
    ("source", "target", "port", "allowed"),
    [
        ("worker", "head", 6379, True),
        ("head", "worker", 10_002, True),
        ("worker", "worker", 30_000, True),
        ("head", "redis", 6379, True),
        ("worker", "redis", 6379, False),
        ("redis", "head", 8265, False),
        ("redis", "worker", 8000, False),
        ("head", "redis", 22, False),
    ],
)
def test_pods_reach_those_whom_they_need_and_no_others(
    manifests: Manifests, source: str, target: str, port: int, allowed: bool
):
    assert may_talk(manifests, source, target, port) == allowed


def test_what_no_rule_allows_is_denied(manifests: Manifests):
    spec = manifests["NetworkPolicy", "deny-all"]["spec"]
    assert spec == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def test_secrets_are_referred_to_and_not_held(manifests: Manifests):
    assert not [kind for kind, _ in manifests if kind == "Secret"]
    template = pods(manifests)["worker"]["spec"]
    volumes = {volume["secret"]["secretName"] for volume in template["volumes"] if "secret" in volume}
    assert {(name, "keys.json") for name in volumes} | set(references(list(manifests.values()))) == SECRETS


def test_every_secret_is_explained_in_the_docs():
    page = (DEPLOY.parent / "docs" / "deploy.md").read_text()
    assert all(f"kubectl create secret generic {name} " in page for name, _ in SECRETS)


@pytest.mark.parametrize("pod", ["head", "worker"])
def test_the_keys_are_mounted_where_the_application_reads_them(manifests: Manifests, rayservice: Manifest, pod: str):
    spec = pods(manifests)[pod]["spec"]
    [mount] = [mount for mount in spec["containers"][0]["volumeMounts"] if mount["name"] == "api-keys"]
    assert application(rayservice)["args"]["api_keys_file"] == f"{mount['mountPath']}/keys.json"
    assert {"name": "api-keys", "secret": {"secretName": "attendant-api-keys"}} in spec["volumes"]


@pytest.mark.parametrize("pod", ["head", "worker", "redis"])
def test_pods_keep_to_the_namespaces_restricted_standard(manifests: Manifests, pod: str):
    spec = pods(manifests)[pod]["spec"]
    container = spec["containers"][0]["securityContext"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["allowPrivilegeEscalation"] is False
    assert container["capabilities"] == {"drop": ["ALL"]}
    labels = manifests["Namespace", "attendant"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize("pod", ["head", "worker", "redis"])
def test_every_pod_is_asked_whether_it_lives_and_is_ready(manifests: Manifests, pod: str):
    container = pods(manifests)[pod]["spec"]["containers"][0]
    assert {"livenessProbe", "readinessProbe"} <= container.keys()
    for probe in (container["livenessProbe"], container["readinessProbe"]):
        port = probe.get("httpGet", {}).get("port")
        assert port in (None, 52365, *ports(pods(manifests)[pod]))
