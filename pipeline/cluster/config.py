"""A cluster file as it is written, and which machines it gives or may add. Nothing here needs a network."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

LEFT_ON_HEAD = "~/ray_bootstrap_config.yaml"
"""The cluster file that `ray up` leaves on the head."""

PLACEHOLDER = re.compile(r"<[^<>\n]*[a-z][^<>\n]*>")
"""What is to be filled in stands in angle brackets: <address of the head>."""


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
    """The file as written; ValueError when it is missing, cannot be read or is no cluster file."""
    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist; the project's examples are cluster.yaml, cluster.private.yaml and "
            "cluster.onprem.yaml"
        ) from None
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); name a cluster file such as cluster.yaml"
        ) from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; name a cluster file such as cluster.yaml") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("provider"), dict):
        raise ValueError(f"{path} has no section provider, so it is no cluster file; compare it with cluster.yaml")
    return content


def prices(config: Mapping[str, Any]) -> dict[str, float]:
    """What a machine costs an hour by node type, in any currency, as far as provider.price_per_hour says it.

    ValueError where it names no node type, or a price is no number above 0.
    """
    known, types = config["provider"].get("price_per_hour") or {}, config.get("available_node_types") or {}
    if not isinstance(known, Mapping):
        raise ValueError(
            f"provider.price_per_hour is {known!r}; give each node type's, as {{{next(iter(types), 'a')}: 1.5}}"
        )
    for name, price in known.items():
        if name not in types:
            raise ValueError(f"provider.price_per_hour has {name!r}, which is none of available_node_types")
        if type(price) not in (int, float) or not 0 < price < math.inf:
            raise ValueError(f"provider.price_per_hour.{name} is {price!r}; it must be a number above 0")
    return dict(known)


def gpus_and_price(path: str | Path) -> tuple[int, float]:
    """(how many GPUs the cluster may have, what a GPU costs an hour, of the dearest node type that it may start).

    ValueError where none of these has a price.
    """
    config = read_cluster_file(path)
    known, groups = prices(config), [group for group in node_groups(config) if group.gpus]
    priced = [known[group.node_type] / group.gpus for group in groups if group.node_type in known]
    if not priced:
        names = " or ".join(group.node_type for group in groups) or "a machine with GPUs"
        raise ValueError(f"{path} has no price of {names}; write what one costs an hour into provider.price_per_hour")
    return sum(group.count * group.gpus for group in groups), max(priced)


def token_file(config: Mapping[str, Any]) -> Path | None:
    """Ray's token on this side, which file_mounts brings to the machines."""
    for target, source in (config.get("file_mounts") or {}).items():
        if str(target).endswith(".ray/auth_token"):
            return Path(str(source)).expanduser()
    return None


def make_token(config: Mapping[str, Any]) -> None:
    """See to it that there is a token, which nobody else on this machine can read.

    Ray writes it for everybody to read, and the machines' copies get the same permissions.
    """
    token = token_file(config)
    if token is None:
        return
    if not token.exists() and token == Path("~/.ray/auth_token").expanduser():
        ray = Path(sys.executable).parent / "ray"
        # with a token in the environment no file would be written
        environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN"}
        subprocess.run([ray, "get-auth-token", "--generate"], check=True, capture_output=True, env=environment)
    if token.is_file():
        token.chmod(0o600)


def placeholders(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """(where, text) of everything that is still to be filled in, each text once."""
    seen: set[str] = set()
    for where, text in texts(value, place):
        for found in PLACEHOLDER.findall(text):
            if found not in seen:
                seen.add(found)
                yield where, found


def texts(value: Any, place: str) -> Iterator[tuple[str, str]]:
    """(where, text) of every string in a value; `place`: where the value itself is."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from texts(entry, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list):
        for i, entry in enumerate(value):
            yield from texts(entry, f"{place}[{i}]")


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
