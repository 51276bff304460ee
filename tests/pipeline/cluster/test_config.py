"""The machines of a cluster file, and the stack that the files for AWS need."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.cluster.config import NodeGroup, gpus_and_price, make_token, node_groups, prices, read_cluster_file
from tests.helpers.cluster_files import filled
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


def test_a_gpus_hour_costs_its_share_of_the_dearest_machine_that_may_start(tmp_path: Path) -> None:
    price = {"head": 0.5, "p4d_24xlarge": 32.0, "p4de_24xlarge": 80}  # of p4de there may be none
    path = filled("cluster.yaml", tmp_path, provider__price_per_hour=price)
    assert gpus_and_price(path) == (32, 4.0)  # 4 machines of 8 GPUs
    two = {"available_node_types__p4d_24xlarge__max_workers": 2, "available_node_types__p4de_24xlarge__max_workers": 1}
    assert gpus_and_price(filled("cluster.yaml", tmp_path, provider__price_per_hour=price, **two)) == (24, 10.0)
    with pytest.raises(
        ValueError, match=r"cluster.yaml has no price of p4d_24xlarge; write what one costs an hour into"
    ):
        gpus_and_price(PROJECT / "cluster.yaml")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"p4d": 3.0}, "provider.price_per_hour has 'p4d', which is none of available_node_types"),
        ({"head": "1 $"}, "provider.price_per_hour.head is '1 [$]'; it must be a number above 0"),
        ({"head": 0}, "provider.price_per_hour.head is 0; it must be a number above 0"),
        (3.0, r"provider.price_per_hour is 3.0; give each node type's, as \{head: 1.5\}"),
    ],
)
def test_prices_of_no_machine_or_no_number_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prices({"provider": {"price_per_hour": given}, "available_node_types": {"head": {}}})


# aws-account.yaml, which makes what the cluster files name


class _Intrinsics(yaml.SafeLoader):
    """CloudFormation's short forms: !Ref Name and !GetAtt Name.Arn become ("Name",), !Sub becomes its names."""


_Intrinsics.add_constructor("!Ref", lambda loader, node: (loader.construct_scalar(node),))
_Intrinsics.add_constructor("!GetAtt", lambda loader, node: (loader.construct_scalar(node).partition(".")[0],))
_Intrinsics.add_constructor("!Equals", lambda loader, node: loader.construct_sequence(node))
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
    known = {*stack["Parameters"], *stack["Resources"], "AWS", "AWS::StackName"}
    assert _named(stack["Resources"]) | _named(stack["Outputs"]) <= known
    asked = {
        name: set(re.findall(r"<(\w+) of the stack", (PROJECT / name).read_text()))
        for name in ("cluster.yaml", "cluster.private.yaml")
    }
    private = {name for name, output in stack["Outputs"].items() if output.get("Condition") == "Private"}
    assert asked["cluster.private.yaml"] | {"Zone"} == {*stack["Outputs"]}
    assert asked["cluster.yaml"] | {"Zone"} == {*stack["Outputs"]} - private


def test_what_is_always_made_names_nothing_of_the_private_network() -> None:
    stack = yaml.load((PROJECT / "aws-account.yaml").read_text(), _Intrinsics)
    private = {name for name, resource in stack["Resources"].items() if resource.get("Condition") == "Private"}
    always = {name: stack["Resources"][name] for name in stack["Resources"].keys() - private}
    assert {*always} == {
        "Bucket", "BucketPolicy", "Volume", "WorkerRole", "WorkerProfile", "HeadRole", "HeadProfile",
    }  # fmt: skip
    assert not _named(always) & private


def test_the_two_files_for_aws_set_up_machines_alike() -> None:
    one, other = (read_cluster_file(PROJECT / name) for name in ("cluster.yaml", "cluster.private.yaml"))
    differing = {key for key in one | other if one.get(key) != other.get(key)}
    assert differing == {"cluster_name", "provider", "auth", "available_node_types"}


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
    ours = {"ec2:ResourceTag/ray-cluster-name": ("AWS::StackName",)}  # the stack has the cluster's name
    assert conditions == {
        "ec2:CreateTags": [{"ec2:CreateAction": "RunInstances"}, ours],
        "ec2:TerminateInstances": [ours],
        "ec2:StopInstances": [ours],
    }


def test_a_token_is_made_also_where_the_environment_has_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef")
    make_token({"file_mounts": {"~/.ray/auth_token": "~/.ray/auth_token"}})
    token = tmp_path / ".ray/auth_token"
    assert token.read_text() and token.stat().st_mode & 0o777 == 0o600
