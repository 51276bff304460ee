"""Everything wrong with a cluster file, one sentence each."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.cluster import gcp
from pipeline.cluster.aws import FILLED_IN, MODULE, Account, Provider, look
from pipeline.cluster.config import PLACEHOLDER, node_groups, placeholders, prices, read_cluster_file, texts
from pipeline.tracking.client import LOGIN

PROVIDERS = ("external", "aws", "gcp", "local")
"""Of the cluster files that there are here, and Ray's `aws` for one with every name in it."""

WORKER_GROUP_GPUS = 8
"""GPUs of one training of a published row: its groups."""


def problems(path: str | Path) -> list[str]:
    """Everything wrong with a cluster file that can be known offline, one sentence each."""
    config = read_cluster_file(path)
    provider = config["provider"]
    provider_type = provider.get("type")
    by_ray_up = FILLED_IN if provider_type == "external" else ()
    found = [f"{place}: fill in {text}" for place, text in placeholders(config) if text not in by_ray_up]
    if provider_type not in PROVIDERS:
        return [*found, f"provider.type is {provider_type!r}; this project knows {', '.join(PROVIDERS)}"]
    if provider_type == "external" and provider.get("module") != MODULE:
        return [*found, f"provider.module is {provider.get('module')!r}; this project has {MODULE}"]
    if wrong := list(_type_problems(config)):  # the checks below rely on them
        return [*found, *wrong]
    for key in ("cluster_name", "auth", "file_mounts"):
        if not config.get(key):
            found.append(f"{key} is missing; Ray would take a default of its own")
    found += _local_problems(config) if provider_type == "local" else _cloud_problems(config)
    found += _secrecy_problems(config)
    try:
        prices(config)
    except ValueError as error:
        found.append(str(error))
    if not found and provider_type == "gcp":
        found += gcp.node_problems(config)
    if not found:  # Ray's own check stops at its first complaint, and may be about a placeholder
        found += _rays_problems(config)
        if provider_type in ("aws", "external"):
            found += _node_problems(config)
    return found


def account_problems(path: str | Path) -> tuple[list[str], list[str]]:
    """(what the AWS account lacks, what else is known of it), one sentence each; nothing for machines of one's own."""
    config = read_cluster_file(path)
    if config["provider"]["type"] == "local":
        return [], []
    if config["provider"]["type"] == "gcp":
        region = config["provider"]["region"]
        return [], [f"Google Cloud was not asked; `gcloud compute regions describe {region}` shows your quota for GPUs"]
    try:
        return look(Account(config))
    except ValueError as error:
        return [], [f"quota and zones are not known, because AWS was not asked: {error}"]


def _type_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Values of another type than Ray's schema has there."""
    import jsonschema
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text(encoding="utf-8"))
    for error in jsonschema.Draft7Validator(schema).iter_errors(config):
        if error.validator == "type":
            expected = error.validator_value
            yield f"{error.json_path.removeprefix('$.')} is {error.instance!r:.60}; Ray wants the type {expected} there"


_NAMED = {"gcp": (("region", "availability_zone", "project_id"), ("machineType", "disks"))}
"""Provider -> what it must name, and what each of its node_configs must; of AWS, where it is not said here."""
_NAMED_AWS = (("region",), ("InstanceType", "ImageId", "IamInstanceProfile"))


def _may_be_taken_away(node: Mapping[str, Any]) -> str:
    """The key of a node_config that makes its machines spot machines; empty: they are not."""
    if "InstanceMarketOptions" in node:
        return "InstanceMarketOptions"
    scheduling = node.get("scheduling") or {}
    return "scheduling" if scheduling.get("provisioningModel") == "SPOT" or scheduling.get("preemptible") else ""


def _cloud_problems(config: Mapping[str, Any]) -> Iterator[str]:
    of_provider, of_node = _NAMED.get(config["provider"]["type"], _NAMED_AWS)
    for key in of_provider:
        if not config["provider"].get(key):
            yield f"provider.{key} is missing" + (
                "; name the region of your subnet" if of_node is _NAMED_AWS[1] else ""
            )
    types = config.get("available_node_types") or {}
    if not types:
        yield "available_node_types is missing; Ray would start a default machine that cannot train"
        return
    if "max_workers" not in config:
        yield "max_workers is missing; Ray's default of 2 machines is not this project's"
    head = config.get("head_node_type")
    if head not in types:
        yield f"head_node_type is {head!r}, which is none of available_node_types"
        return
    for name, entry in types.items():
        node = entry.get("node_config") or {}
        for key in of_node:
            if key not in node:
                yield f"available_node_types.{name}.node_config.{key} is missing"
        if name == head:
            if entry.get("resources", {}).get("GPU"):
                yield f"{name} is the head and has GPUs, which idle while data are made; use a machine without"
            if why := _may_be_taken_away(node):
                yield f"{name} is the head and may be taken away ({why}); use an on-demand machine"
        elif "GPU" not in (entry.get("resources") or {}):
            yield f"available_node_types.{name}.resources has no GPU; the autoscaler starts machines by it"
        elif entry.get("min_workers", 0) > 0:
            yield f"available_node_types.{name}.min_workers keeps GPUs running without work; set it to 0"
    with_gpus = [m for m in node_groups(config) if m.gpus]
    gpus = sum(m.count * m.gpus for m in with_gpus)
    if gpus < WORKER_GROUP_GPUS:
        yield (
            f"the cluster may have at most {gpus} GPUs, and a published row trains on {WORKER_GROUP_GPUS}; "
            "raise max_workers"
        )


def _node_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """What EC2 would refuse in a node_config by its form: misspelt keys, values of another kind."""
    from botocore.loaders import Loader
    from botocore.model import ServiceModel
    from botocore.validate import ParamValidator

    asked = ServiceModel(Loader().load_service_model("ec2", "service-2")).operation_model("RunInstances").input_shape
    for name, entry in config["available_node_types"].items():
        node = {key: value for key, value in entry["node_config"].items() if key != "SubnetIds"}  # Ray's own
        if "NetworkInterfaces" in node and (both := {"SubnetIds", "SecurityGroupIds"} & set(entry["node_config"])):
            which = " and ".join(sorted(both))
            yield f"available_node_types.{name}.node_config has NetworkInterfaces, which name {which} too"
        report = ParamValidator().validate({"MinCount": 1, "MaxCount": 1, **node}, asked)
        if report.has_errors():
            yield f"available_node_types.{name}.node_config: {' '.join(report.generate_report().split())}"


def _local_problems(config: Mapping[str, Any]) -> Iterator[str]:
    provider = config["provider"]
    if not provider.get("head_ip"):
        yield "provider.head_ip is missing"
    workers = provider.get("worker_ips") or []
    for address in [address for i, address in enumerate(workers) if address in workers[:i]]:
        yield f"provider.worker_ips names {address} twice"
    if provider.get("head_ip") in workers:
        yield "provider.worker_ips holds head_ip too; the head needs no second entry to run work"
    if config.get("min_workers", 0) > len(workers):
        yield f"min_workers is {config['min_workers']}, but provider.worker_ips has {len(workers)} machines"


def _secrecy_problems(config: Mapping[str, Any]) -> Iterator[str]:
    commands = " ".join(text for key in config if key.endswith("_commands") for _, text in texts(config[key], key))
    if "RAY_AUTH_MODE=token" not in commands:
        yield "no command sets RAY_AUTH_MODE=token; without it whoever reaches the head may run code there"
    if not any(str(target).endswith(".ray/auth_token") for target in config.get("file_mounts") or {}):
        yield "file_mounts brings no ~/.ray/auth_token to the machines; they could not join"
    if "--dashboard-host=0.0.0.0" in commands:
        yield "--dashboard-host=0.0.0.0 shows the dashboard to the network; use 127.0.0.1 and an ssh tunnel"
    if re.search(r"tracking_server\.sh (0\.0\.0\.0|::)", commands):
        yield "tracking_server.sh shows MLflow to every network of the head; name the address that the workers reach"
    key = (config.get("auth") or {}).get("ssh_private_key") or ""
    for source in (config.get("file_mounts") or {}).values() if key and not PLACEHOLDER.search(key) else ():
        if Path(key).expanduser().resolve().is_relative_to(Path(str(source)).expanduser().resolve()):
            yield f"auth.ssh_private_key lies in {source}, which goes to every machine; keep it in ~/.ssh"
    if any(login[2] for _, text in texts(config, "") for login in LOGIN.finditer(text)):
        yield "a password stands in an address; the file goes to every machine and into logs: see docs/security.md"
    if re.search(r"AWS_SECRET_ACCESS_KEY|AKIA[0-9A-Z]{16}", str(dict(config))):
        yield "an AWS key stands in the file; give the machines an instance profile (IamInstanceProfile) instead"
    if (config["provider"].get("gcp_credentials") or {}) or "BEGIN PRIVATE KEY" in str(dict(config)):
        yield (
            "a key of Google Cloud stands in the file; log in instead (gcloud auth application-default login), and "
            "give the machines service accounts"
        )


def _rays_problems(config: dict[str, Any]) -> Iterator[str]:
    import copy
    import logging

    import click
    from ray.autoscaler._private.util import prepare_config, validate_config

    logging.getLogger("ray.autoscaler._private.util").setLevel("ERROR")  # it warns of fields that Ray itself adds
    try:
        prepared = prepare_config(copy.deepcopy(config))
        if config["provider"]["type"] == "external":
            prepared = Provider.fillout_available_node_types_resources(prepared)
        validate_config(prepared)
    except click.ClickException as error:
        yield f"Ray: {error.message}"
    except Exception as error:  # jsonschema's and Ray's own, of many classes
        yield f"Ray: {str(error).strip().splitlines()[0]}"
