"""The manifests of deploy/kuberay as kubectl would apply them, and the rules that KubeRay's definition has for them.

Of kustomize only what the project's overlays use: resources, images, and JSON patches (RFC 6902) that add or replace.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.shared import PROJECT

FOLDER = PROJECT / "deploy/kuberay"
OVERLAYS = ("data", "one-row", "several-rows")


def built(folder: Path) -> list[dict[str, Any]]:
    """The objects that a folder's kustomization.yaml makes."""
    rules = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert set(rules) <= {"apiVersion", "kind", "resources", "images", "patches"}, rules
    objects: list[dict[str, Any]] = []
    for name in rules["resources"]:
        path = folder / name
        objects += built(path) if path.is_dir() else list(yaml.safe_load_all(path.read_text()))
    for patch in rules.get("patches", ()):
        target = patch["target"]
        fitting = [
            each for each in objects if (each["kind"], each["metadata"]["name"]) == (target["kind"], target["name"])
        ]
        assert len(fitting) == 1, f"{folder.name}: {target} fits {len(fitting)} objects"
        for operation in yaml.safe_load(patch["patch"]):
            _change(fitting[0], operation)
    for image in rules.get("images", ()):
        for each in objects:
            _set_image(each, image["name"], f"{image['newName']}:{image['newTag']}")
    return objects


def _change(value: Any, operation: Mapping[str, Any]) -> None:
    *places, last = operation["path"].lstrip("/").split("/")
    for place in places:
        value = value[int(place)] if isinstance(value, list) else value[place]
    assert operation["op"] in ("add", "replace"), operation
    assert (last in value) == (operation["op"] == "replace"), f"{operation['path']}: {operation['op']}"
    value[last] = operation["value"]


def _set_image(value: Any, name: str, image: str) -> None:
    if isinstance(value, list):
        for each in value:
            _set_image(each, name, image)
    elif isinstance(value, dict):
        for key, each in value.items():
            if key == "containers":
                for container in each:
                    if container.get("image") == name:
                        container["image"] = image
            _set_image(each, name, image)


def of_kind(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The one object of a kind."""
    (found,) = (each for each in objects if each["kind"] == kind)
    return found


@cache
def schema(definition: Path, version: str = "v1") -> dict[str, Any]:
    """What a custom resource definition allows, as a JSON schema that knows no other keys than it names."""
    versions = yaml.load(definition.read_text(), Loader=yaml.CSafeLoader)["spec"]["versions"]
    (found,) = (each["schema"]["openAPIV3Schema"] for each in versions if each["name"] == version)
    closed = _closed(copy.deepcopy(found))
    closed["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    return closed


def _closed(rules: Any) -> Any:
    """kubectl validates strictly: a key that the schema does not name is an error."""
    if isinstance(rules, list):
        return [_closed(each) for each in rules]
    if not isinstance(rules, dict):
        return rules
    rules = {key: _closed(value) for key, value in rules.items()}
    if isinstance(rules.get("properties"), dict) and rules.get("type") == "object":
        rules.setdefault("additionalProperties", False)
    return rules


def environment(container: Mapping[str, Any], settings: Mapping[str, str]) -> dict[str, str]:
    """A container's variables; those of the pod itself come from `settings`, which also has the ConfigMap's."""
    found = dict(settings)
    for each in container["env"]:
        if "value" in each:
            value = each["value"]
            for name, known in found.items():
                value = value.replace(f"$({name})", known)
            found[each["name"]] = value
    return found
