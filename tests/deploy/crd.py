"""Makes the schemas beside it from published custom resource definitions: what fields there are, and of what type.

python -m tests.deploy.crd ray.io_rayservices.yaml 1.7.0 > tests/deploy/schemas/rayservice.json

Prose and status go; what is Kubernetes' own (a pod template, a service) becomes a reference to its schema in the
package kubernetes-validate. An object takes no field that is not named: `kubectl` would refuse it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

Schema = dict[str, Any]

KEPT = ("type", "enum", "required", "minimum", "maximum", "minLength", "minItems", "pattern")
KUBERNETES = {
    "template": "podtemplatespec-v1",
    "serveService": "service-v1",
    "valueFrom": "envvarsource-v1",
    "securityContext": "securitycontext-v1",
    "selector": "labelselector-meta-v1",
    "credentials": "secretkeyselector-v1",
}


def compact(schema: Schema) -> Schema:
    """The same schema without prose, closed to unknown fields."""
    small = {key: schema[key] for key in KEPT if key in schema}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    if "properties" in schema:
        small["additionalProperties"] = False
        small["properties"] = {
            name: {"$ref": f"{KUBERNETES[name]}.json"} if name in KUBERNETES else compact(field)
            for name, field in schema["properties"].items()
        }
    elif isinstance(schema.get("additionalProperties"), dict):
        small["additionalProperties"] = compact(schema["additionalProperties"])
    if "items" in schema:
        small["items"] = compact(schema["items"])
    return small


def main(file: Path, release: str) -> None:
    """Print the schema of the definition's stored version."""
    definition = yaml.safe_load(file.read_text())
    version = next(version for version in definition["spec"]["versions"] if version["storage"])
    schema = version["schema"]["openAPIV3Schema"]
    schema["properties"].pop("status", None)
    small = compact(schema)
    small["properties"]["metadata"] = {"$ref": "objectmeta-meta-v1.json"}
    names = definition["spec"]["names"]
    origin = f"{names['kind']} of {definition['spec']['group']}/{version['name']}, release {release}"
    print(json.dumps({"description": origin, **small}, separators=(",", ":")))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
