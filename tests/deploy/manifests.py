"""The shipped manifests as `kubectl` renders them, and what an API server would say of one."""

import json
import subprocess
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT7

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
SCHEMAS = Path(__file__).parent / "schemas"
KUBERNETES = "1.34"
KUBERNETES_SCHEMAS = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema" / "v1.34.0-local-strict"
CUSTOM = {"RayService": "rayservice.json", "PodMonitor": "podmonitor.json"}

Manifest = dict[str, Any]


@cache
def _rendered(overlay: str) -> str:
    command = [Path(sysconfig.get_path("scripts")) / "kubectl", "kustomize", DEPLOY / "kubernetes" / overlay]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def render(overlay: str) -> dict[tuple[str, str], Manifest]:
    """What `kubectl apply --kustomize` would send, by kind and name."""
    manifests = list(yaml.safe_load_all(_rendered(overlay)))
    found = {(manifest["kind"], manifest["metadata"]["name"]): manifest for manifest in manifests}
    assert len(found) == len(manifests)
    return found


@cache
def _kubernetes_schema(uri: str) -> Resource[Any]:
    return Resource.from_contents(json.loads((KUBERNETES_SCHEMAS / Path(uri).name).read_text()), DRAFT7)


def validate(manifest: Manifest) -> None:
    """Raises `jsonschema.ValidationError` for a field that is unknown, missing or of another type."""
    if (custom := CUSTOM.get(manifest["kind"])) is None:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        return
    schema = json.loads((SCHEMAS / custom).read_text())
    registry: Registry[Any] = Registry(retrieve=_kubernetes_schema)  # type: ignore[call-arg]
    jsonschema.Draft7Validator(schema, registry=registry).validate(manifest)


def at(tree: Any, path: str) -> Any:
    """The value at a path of keys and indices: `spec/ports/0/port`."""
    for step in path.split("/"):
        tree = tree[int(step)] if isinstance(tree, list) else tree[step]
    return tree


def put(tree: Any, path: str, value: Any) -> None:
    """Set the value at a path; None takes the key out."""
    parent, _, last = path.rpartition("/")
    place = at(tree, parent) if parent else tree
    key = int(last) if isinstance(place, list) else last
    if value is None:
        del place[key]
    else:
        place[key] = value
