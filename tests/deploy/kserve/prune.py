"""Makes the schemas beside it of KServe's own: what they say of the fields that we use.

KServe's CRDs (github.com/kserve/kserve, config/crd/full, Apache-2.0) have 2 MB. Kept are the names
of all fields wherever we use one, what is said of those that we use, and no descriptions. So a
field that KServe does not know is found, and so is a wrong value in one that we use. One that we
begin to use is allowed to be anything, until the schemas are made anew:

    python -m tests.deploy.kserve.prune KSERVE_FOLDER COMMIT
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
MANIFESTS = HERE.parents[2] / "deploy" / "kserve"
# The kind of each manifest, with KServe's file of its schema.
KINDS = {
    "ServingRuntime": ("serving-runtime.yaml", "serving.kserve.io_servingruntimes.yaml"),
    "InferenceService": ("inference-service.yaml", "serving.kserve.io_inferenceservices.yaml"),
}
_WORDS = ("description", "x-kubernetes-list-type", "x-kubernetes-list-map-keys", "default")


def schema_file(kind: str) -> Path:
    """Where the schema of a kind is kept."""
    return HERE / f"{kind.lower()}.schema.json"


def prune(schema: dict[str, Any], used: list[Any]) -> dict[str, Any]:
    """A strict schema of what is used.

    Args:
        schema: as KServe has it.
        used: values that it is of.
    """
    kept = {key: value for key, value in schema.items() if key not in (*_WORDS, "properties")}
    if schema.get("x-kubernetes-int-or-string"):
        kept.pop("type", None)
    if "properties" in schema:
        kept["properties"] = {
            name: _field(name, field, used) for name, field in schema["properties"].items()
        }
        kept["additionalProperties"] = False
    elif isinstance(values := schema.get("additionalProperties"), dict):
        every = [value for one in used for value in one.values()]
        kept["additionalProperties"] = prune(values, every)
    if "items" in schema:
        kept["items"] = prune(schema["items"], [item for one in used for item in one])
    return kept


def _field(name: str, field: dict[str, Any], used: list[Any]) -> dict[str, Any]:
    values = [one[name] for one in used if name in one]
    return prune(field, values) if values else {}


def main() -> None:
    """Make the schemas of all kinds."""
    folder, commit = Path(sys.argv[1]), sys.argv[2]
    for kind, (manifest, crd) in KINDS.items():
        used = yaml.safe_load((MANIFESTS / manifest).read_text())
        text = (folder / "config" / "crd" / "full" / crd).read_text()
        (version,) = [
            version
            for version in yaml.load(text, yaml.CSafeLoader)["spec"]["versions"]
            if used["apiVersion"] == f"serving.kserve.io/{version['name']}"
        ]
        schema = prune(version["schema"]["openAPIV3Schema"], [used])
        origin = (
            f"Made by tests/deploy/kserve/prune.py of config/crd/full/{crd} of "
            f"github.com/kserve/kserve at {commit}, Copyright The KServe Authors, "
            "licensed under the Apache License 2.0"
        )
        content = {"$comment": origin, **schema}
        schema_file(kind).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
