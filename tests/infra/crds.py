"""KubeRay's CRDs as JSON schemas that know no field but their own."""

import functools
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from tests.infra.rendering import ROOT

FOLDER = ROOT.parent / "shared" / "reference" / "kuberay-crds"
_FILES = {
    "RayCluster": "ray.io_rayclusters.yaml",
    "RayJob": "ray.io_rayjobs.yaml",
    "RayCronJob": "ray.io_raycronjobs.yaml",
}


def problems(an_object: dict[str, Any]) -> list[str]:
    """What the API server would refuse of a KubeRay object, and the fields that it would drop."""
    errors = _validator(an_object["kind"]).iter_errors(an_object)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:300]}" for error in errors]


def is_kuberay(an_object: dict[str, Any]) -> bool:
    """Whether there is a schema for it."""
    return an_object["apiVersion"] == "ray.io/v1"


@functools.cache
def _validator(kind: str) -> Draft202012Validator:
    path: Path = FOLDER / _FILES[kind]
    if not path.exists():
        pytest.skip(f"KubeRay's CRDs are not there to compare with: {path}")
    (crd,) = yaml.load_all(path.read_text(), yaml.CSafeLoader)
    (version,) = [version for version in crd["spec"]["versions"] if version["name"] == "v1"]
    return Draft202012Validator(_strict(version["schema"]["openAPIV3Schema"]))


def _strict(schema: dict[str, Any]) -> dict[str, Any]:
    result = dict(schema)
    if "properties" in schema:
        result["properties"] = {name: _strict(child) for name, child in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            result.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            result[key] = _strict(schema[key])
    return result
