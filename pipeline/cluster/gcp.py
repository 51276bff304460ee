"""What Google Compute Engine would refuse in a node_config, by its own description of an instance. Asks nobody."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PACKAGES = "pip install -r requirements-gcp.lock"
_BESIDES = {"sourceInstanceTemplate"}
"""Keys of a node_config that Ray takes out before it asks for an instance."""
_GPU_TYPES = {"a2": "A100", "a3": "H100", "a3-ultragpu": "H200", "a4": "B200", "a4x": "GB200", "g2": "L4"}
"""Ray's names of the GPUs that a family of machine types has, of which the longest name counts."""
_LEAST_DISK_GB = 30
"""Of a boot disk: the system, the environment of 7 GB, and copies of shards where there is no other disk."""
_PYTHON: Mapping[str, Any] = {
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "object": Mapping,
    "array": list,
}


def node_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Unknown keys, values of another type and words that an enumeration does not have, one sentence each."""
    try:
        from googleapiclient import discovery_cache
    except ImportError:
        yield f"Google's API description is not installed, which Ray needs too: {PACKAGES}"
        return
    provider = config["provider"]
    zone, region = provider["availability_zone"], provider["region"]
    if not str(zone).startswith(f"{region}-"):
        yield f"provider.availability_zone is {zone}, which is no zone of provider.region, {region}"
    path = Path(discovery_cache.__file__).parent / "documents/compute.v1.json"
    schemas = json.loads(path.read_text(encoding="utf-8"))["schemas"]
    for name, entry in config["available_node_types"].items():
        node = {key: value for key, value in entry["node_config"].items() if key not in _BESIDES}
        place = f"available_node_types.{name}.node_config"
        if wrong := list(_wrong(node, schemas["Instance"], schemas, place)):
            yield from wrong
            continue
        yield from _gpu_problems(node, entry.get("resources") or {}, place)
        yield from _disk_problems(node, provider, place)


def _wrong(value: Any, schema: Mapping[str, Any], schemas: Mapping[str, Any], place: str) -> Iterator[str]:
    schema = schemas[schema["$ref"]] if "$ref" in schema else schema
    wanted = schema.get("type", "any")
    # 64-bit numbers travel as text; either is taken
    as_text = isinstance(value, int) and schema.get("format") in ("int64", "uint64")
    if wanted != "any" and not as_text:
        right = isinstance(value, _PYTHON[wanted])
        if not right or (isinstance(value, bool) and wanted != "boolean"):
            yield f"{place} is {value!r:.60}; Compute Engine wants the type {wanted} there"
            return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{place} is {value!r}; Compute Engine knows {', '.join(schema['enum'])}"
    if isinstance(value, list):
        for i, each in enumerate(value):
            yield from _wrong(each, schema["items"], schemas, f"{place}[{i}]")
    if isinstance(value, Mapping):
        known = schema.get("properties", {})
        for key, each in value.items():
            if key in known:
                yield from _wrong(each, known[key], schemas, f"{place}.{key}")
            elif "additionalProperties" in schema:
                yield from _wrong(each, schema["additionalProperties"], schemas, f"{place}.{key}")
            else:
                yield f"{place}.{key} is unknown to Compute Engine"


def _gpu_problems(node: Mapping[str, Any], resources: Mapping[str, Any], place: str) -> Iterator[str]:
    """Other GPUs than the autoscaler counts with, and what a machine with GPUs needs besides."""
    scheduling = node.get("scheduling") or {}
    machine = str(node.get("machineType")).rpartition("/")[2]
    promised = resources.get("GPU", 0)
    types = [gpu_type for family, gpu_type in _GPU_TYPES.items() if machine.startswith(f"{family}-")]
    added = node.get("guestAccelerators") or []  # to a machine type without GPUs of its own
    if not types and not added:
        if promised:
            yield f"{place}.machineType is {machine}, which has no GPUs, but resources has {promised}"
        return
    in_name = re.search(r"-(\d+)g(?:-\w+)?$", machine)
    gpus = int(in_name[1]) if in_name else sum(int(each.get("acceleratorCount", 0)) for each in added)
    if gpus and gpus != promised:
        yield f"{place}.machineType has {gpus} GPUs, but resources has {promised}"
    for name in resources if types else ():
        if name.startswith("accelerator_type:") and name != f"accelerator_type:{types[-1]}":
            yield f"{place}.machineType is {machine}, which has {types[-1]} GPUs, but resources has {name}"
    if scheduling.get("onHostMaintenance") != "TERMINATE":
        yield f"{place}.scheduling.onHostMaintenance must be TERMINATE: a machine with GPUs cannot move to another host"
    if scheduling.get("provisioningModel") == "SPOT" and scheduling.get("automaticRestart") is not False:
        yield f"{place}.scheduling.automaticRestart must be false on spot: Ray starts another machine"


def _disk_problems(node: Mapping[str, Any], provider: Mapping[str, Any], place: str) -> Iterator[str]:
    """Disks that are too small, or that lie elsewhere than the machines."""
    for i, disk in enumerate(node["disks"]):
        size = (disk.get("initializeParams") or {}).get("diskSizeGb")
        if disk.get("boot") and size is not None and int(size) < _LEAST_DISK_GB:
            yield f"{place}.disks[{i}] has {size} GB; system and environment need {_LEAST_DISK_GB}"
        source = re.search(r"projects/([^/]+)/zones/([^/]+)/", str(disk.get("source")))
        here = (str(provider["project_id"]), str(provider["availability_zone"]))
        if source and source.groups() != here:
            yield f"{place}.disks[{i}].source lies in {' '.join(source.groups())}, but the machines in {' '.join(here)}"
