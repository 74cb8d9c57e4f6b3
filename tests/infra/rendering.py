"""What `kubectl kustomize` makes of our folders, as far as they go: resources, JSON patches, images. Anything else in a
kustomization is an error here, so that a test cannot pass over it.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
K8S = INFRA / "k8s"

Object = dict[str, Any]
_KNOWN = {"apiVersion", "kind", "resources", "images", "patches"}


class _Loader(yaml.CSafeLoader):
    """Refuses a key that stands twice, as Kubernetes does."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> Any:
    keys = [key.value for key, _ in node.value]
    if len(keys) != len(set(keys)):
        raise ValueError(f"{node.start_mark}: a key stands twice in {keys}")
    loader.flatten_mapping(node)
    return {
        loader.construct_object(key, deep=True): loader.construct_object(value, deep=True) for key, value in node.value
    }


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load(path: Path) -> list[Object]:
    """The documents of a file."""
    return list(yaml.load_all(path.read_text(), _Loader))


def folders() -> list[Path]:
    """All that can be given to `kubectl apply -k`."""
    return sorted(path.parent for path in K8S.rglob("kustomization.yaml"))


def render(folder: Path) -> list[Object]:
    """The objects of a folder."""
    (kustomization,) = load(folder / "kustomization.yaml")
    unknown = set(kustomization) - _KNOWN
    assert not unknown, f"{folder}: {unknown} is not rendered here"
    objects: list[Object] = []
    for name in kustomization["resources"]:
        path = folder / name
        objects += render(path.resolve()) if path.is_dir() else load(path)
    for patch in kustomization.get("patches", []):
        assert set(patch) == {"target", "patch"}, f"{folder}: a patch is inline here, with its target"
        assert set(patch["target"]) == {"kind", "name"}
        targets = [o for o in objects if (o["kind"], o["metadata"]["name"]) == tuple(patch["target"].values())]
        assert targets, f"{folder}: there is no {patch['target']} to patch"
        for target in targets:
            for operation in yaml.load(patch["patch"], _Loader):
                _apply(target, copy.deepcopy(operation))
    for image in kustomization.get("images", []):
        assert set(image) == {"name", "newName"}
        for container in (c for o in objects for c in containers(o)):
            name, colon, tag = container["image"].partition(":")
            if name == image["name"]:
                container["image"] = image["newName"] + colon + tag
    names = [(o["kind"], o["metadata"]["name"]) for o in objects]
    assert len(names) == len(set(names)), f"{folder}: one name twice in {names}"
    return objects


def _apply(target: Any, operation: Object) -> None:
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    for part in parents:
        target = target[int(part)] if isinstance(target, list) else target[part]
    kind, at = operation["op"], int(last) if isinstance(target, list) and last != "-" else last
    if kind == "add" and isinstance(target, list):
        target.insert(len(target) if at == "-" else at, operation["value"])
    elif kind == "add":
        target[at] = operation["value"]
    elif kind == "replace":
        target[at]  # must be there
        target[at] = operation["value"]
    else:
        assert kind == "remove"
        del target[at]


def mappings(node: Any) -> Iterator[Object]:
    """Every mapping below, itself included."""
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from mappings(child)


def containers(node: Any) -> Iterator[Object]:
    """Every container below."""
    for mapping in mappings(node):
        for key in ("containers", "initContainers"):
            yield from mapping.get(key, [])


def pods(node: Any) -> Iterator[Object]:
    """The spec of every pod below."""
    return (mapping for mapping in mappings(node) if "containers" in mapping)


def clusters(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """Every spec of a Ray cluster, with the name of what it belongs to."""
    for an_object in objects:
        name, spec = an_object["metadata"]["name"], an_object.get("spec", {})
        if an_object["kind"] == "RayCluster":
            yield name, spec
        elif an_object["kind"] in ("RayJob", "RayCronJob"):
            yield name, spec.get("jobTemplate", spec)["rayClusterSpec"]
