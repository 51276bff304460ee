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
    path = Path(discovery_cache.__file__).parent / "documents/compute.v1.json"
    schemas = json.loads(path.read_text(encoding="utf-8"))["schemas"]
    for name, entry in config["available_node_types"].items():
        node = {key: value for key, value in entry["node_config"].items() if key not in _BESIDES}
        place = f"available_node_types.{name}.node_config"
        yield from _wrong(node, schemas["Instance"], schemas, place)
        yield from _gpu_problems(node, entry.get("resources") or {}, place)


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
    """What a machine type with GPUs needs besides."""
    scheduling = node.get("scheduling") or {}
    gpus = re.fullmatch(r"(?:.*/)?a\d-\w+-(\d+)g(?:-\w+)?", str(node.get("machineType")))
    if gpus is None:
        return
    if int(gpus[1]) != resources.get("GPU"):
        yield f"{place}.machineType has {gpus[1]} GPUs, but resources has {resources.get('GPU', 0)}"
    if scheduling.get("onHostMaintenance") != "TERMINATE":
        yield f"{place}.scheduling.onHostMaintenance must be TERMINATE: a machine with GPUs cannot move to another host"
    if scheduling.get("provisioningModel") == "SPOT" and scheduling.get("automaticRestart") is not False:
        yield f"{place}.scheduling.automaticRestart must be false on spot: Ray starts another machine"
