"""cluster.yaml as it is written, and which machines it gives or may add. Nothing here needs a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeGroup:
    """Machines of one kind that the cluster has or may add."""

    node_type: str
    """Node type of cluster.yaml, or the machine's address."""
    count: int
    gpus: int
    """Of each."""
    cpus: int


def read_cluster_file(path: str | Path) -> dict[str, Any]:
    """The file as written; ValueError when it is missing or no YAML mapping."""
    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist; the project's examples are cluster.yaml and cluster.onprem.yaml"
        ) from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no mapping; compare it with cluster.yaml")
    return content


def token_file(config: Mapping[str, Any]) -> Path | None:
    """Ray's token on this side, which file_mounts brings to the machines."""
    for target, source in (config.get("file_mounts") or {}).items():
        if str(target).endswith(".ray/auth_token"):
            return Path(str(source)).expanduser()
    return None


def node_groups(config: Mapping[str, Any]) -> list[NodeGroup]:
    """The most that the autoscaler may start, those with the most GPUs first; the head is not among them.

    Empty for machines of one's own: they are there or not.
    """
    left = config.get("max_workers", 2)
    found = []
    for name, entry in (config.get("available_node_types") or {}).items():
        resources = entry.get("resources") or {}
        if name != config.get("head_node_type") and resources:
            count = min(left, entry.get("max_workers", left))
            gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
            found.append(NodeGroup(node_type=name, count=count, gpus=gpus, cpus=cpus))
    found.sort(key=lambda group: -group.gpus)
    most = []
    for group in found:
        if count := min(group.count, left):
            most.append(replace(group, count=count))
            left -= count
    return most
