"""The machines of cluster.yaml, and the account that it needs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.cluster.check import PLACEHOLDER
from pipeline.cluster.config import NodeGroup, node_groups
from tests.helpers.shared import PROJECT


def test_the_autoscaler_takes_the_types_with_the_most_gpus_first() -> None:
    # At most 3 machines: 2 with 8 GPUs, then 1 of the 4 with 4.
    types = {
        "head": {"resources": {"CPU": 8}},
        "small": {"resources": {"GPU": 4, "CPU": 16}, "max_workers": 4},
        "large": {"resources": {"GPU": 8, "CPU": 96}, "max_workers": 2},
    }
    config = {"max_workers": 3, "head_node_type": "head", "available_node_types": types}
    assert node_groups(config) == [
        NodeGroup(node_type="large", count=2, gpus=8, cpus=96),
        NodeGroup(node_type="small", count=1, gpus=4, cpus=16),
    ]
    assert node_groups({"provider": {"type": "local"}}) == []


@pytest.mark.slow
def test_ray_starts_every_kind_of_machine_on_a_stand_in_for_ec2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What `ray up` and the autoscaler do with a node_config: find key, subnet, groups and profile, then RunInstances.
    moto = pytest.importorskip("moto")
    import boto3
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    with moto.mock_aws():
        ec2 = boto3.client("ec2", region_name="us-east-1")
        (tmp_path / "key").write_text(ec2.create_key_pair(KeyName="m2f")["KeyMaterial"])
        subnet = ec2.describe_subnets()["Subnets"][0]
        group = ec2.create_security_group(GroupName="m2f", Description="m2f", VpcId=subnet["VpcId"])["GroupId"]
        profile = boto3.client("iam", region_name="us-east-1").create_instance_profile(InstanceProfileName="m2f")
        values = {
            "region": "us-east-1",
            "Zone": subnet["AvailabilityZone"],
            "path": str(tmp_path / "key"),
            "id": ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"],
            "name": "m2f",
            "Subnet": subnet["SubnetId"],
            "SecurityGroup": group,
            "PlacementGroup": "m2f",
            "HeadProfile": profile["InstanceProfile"]["Arn"],
            "WorkerProfile": profile["InstanceProfile"]["Arn"],
            "Bucket": "bucket",
            "Volume": "vol-1",
        }
        lines = [line for line in (PROJECT / "cluster.yaml").read_text().splitlines() if line.lstrip()[:1] != "#"]
        text = PLACEHOLDER.sub(lambda found: values[re.split(r"\W", found.group())[1]], "\n".join(lines))
        config = bootstrap_aws(prepare_config(yaml.safe_load(text)))
        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        started = {}
        for name, entry in config["available_node_types"].items():
            (machine,) = provider.create_node(entry["node_config"], {"ray-node-type": name}, 1)
            started[name] = provider.get_node_id(provider.internal_ip(machine), use_internal_ip=True) == machine
    assert started == {"head": True, "p4d_24xlarge": True, "p4de_24xlarge": True}


# aws-account.yaml, which makes what cluster.yaml names


class _Intrinsics(yaml.SafeLoader):
    """CloudFormation's short forms: !Ref Name and !GetAtt Name.Arn become ("Name",), !Sub becomes its names."""


_Intrinsics.add_constructor("!Ref", lambda loader, node: (loader.construct_scalar(node),))
_Intrinsics.add_constructor("!GetAtt", lambda loader, node: (loader.construct_scalar(node).partition(".")[0],))
_Intrinsics.add_constructor("!Sub", lambda loader, node: tuple(re.findall(r"\$\{(\w+)", loader.construct_scalar(node))))


def _named(value: Any) -> set[str]:
    if isinstance(value, tuple):
        return set(value)
    if isinstance(value, dict):
        return set().union(*map(_named, value.values()))
    return set().union(*map(_named, value)) if isinstance(value, list) else set()


def test_the_stack_makes_what_it_names_and_what_the_cluster_file_asks_for() -> None:
    text = (PROJECT / "aws-account.yaml").read_text()
    assert not re.search(r"(?m)[:\[,] [&*]\w", text)  # CloudFormation knows no aliases
    stack = yaml.load(text, _Intrinsics)
    known = {*stack["Parameters"], *stack["Resources"], "AWS"}
    assert _named(stack["Resources"]) | _named(stack["Outputs"]) <= known
    asked = set(re.findall(r"<(\w+) of the stack", (PROJECT / "cluster.yaml").read_text()))
    assert asked == {*stack["Outputs"]}


def test_the_head_may_tag_and_end_machines_of_the_cluster_alone() -> None:
    # A head that might tag any machine of the account might end any: the tag is what its right to end them asks for.
    stack = yaml.load((PROJECT / "aws-account.yaml").read_text(), _Intrinsics)
    policies = stack["Resources"]["HeadRole"]["Properties"]["Policies"]
    statements = [statement for policy in policies for statement in policy["PolicyDocument"]["Statement"]]
    conditions = {action: [] for action in ("ec2:CreateTags", "ec2:TerminateInstances", "ec2:StopInstances")}
    for statement in statements:
        for action in conditions:
            if action in statement["Action"]:
                conditions[action].append(statement.get("Condition", {}).get("StringEquals"))
    ours = {"ec2:ResourceTag/ray-cluster-name": "m2f"}
    assert conditions == {
        "ec2:CreateTags": [{"ec2:CreateAction": "RunInstances"}, ours],
        "ec2:TerminateInstances": [ours],
        "ec2:StopInstances": [ours],
    }
