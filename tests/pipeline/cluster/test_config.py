"""cluster.yaml and cluster.onprem.yaml: what a check finds without a network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.cluster.check import PLACEHOLDER, problems
from pipeline.cluster.config import Machines, machines
from tests.helpers.shared import PROJECT

FILES = ["cluster.yaml", "cluster.onprem.yaml"]


def filled(name: str, tmp_path: Path, **changes: Any) -> Path:
    """The project's file with something in every place that is to be filled in; changes: key__key=value."""
    text = PLACEHOLDER.sub(lambda found: re.sub(r"\W+", "-", found.group()), (PROJECT / name).read_text())
    config = yaml.safe_load(text)
    config["auth"]["ssh_private_key"] = "~/.ssh/m2f"
    for path, value in changes.items():
        *keys, last = path.split("__")
        inner = config
        for key in keys:
            inner = inner[key]
        if value is None:
            del inner[last]
        else:
            inner[last] = value
    (tmp_path / name).write_text(yaml.safe_dump(config))
    return tmp_path / name


@pytest.mark.parametrize("name", FILES)
def test_a_file_as_it_comes_has_places_to_fill_in_and_nothing_else_wrong(name: str, tmp_path: Path) -> None:
    found = problems(PROJECT / name)
    assert found and all(re.search(r": fill in <.*>$", sentence) for sentence in found)
    assert problems(filled(name, tmp_path)) == []


def test_a_place_to_fill_in_is_named_with_where_it_is() -> None:
    found = problems(PROJECT / "cluster.yaml")
    assert "provider.region: fill in <region, such as us-east-1>" in found
    assert len(found) == len({sentence.partition("fill in")[2] for sentence in found})  # each once


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"provider__region": None, "provider__regoin": "us-east-1"}, "provider.regoin .* did you mean region?"),
        ({"provider__region": None}, "provider.region is missing"),
        ({"provider__type": "gcp"}, "this project knows aws and local"),
        ({"auht": {}}, "Ray: .*auht"),
        ({"max_workers": None}, "max_workers is missing"),
        ({"max_workers": 0}, "at most 0 GPUs, and a published row trains on 8; raise max_workers"),
        ({"available_node_types__head__resources": {"CPU": 8, "GPU": 1}}, "head is the head and has GPUs"),
        ({"available_node_types__p4d_24xlarge__resources": {"CPU": 96}}, "p4d_24xlarge.resources has no GPU"),
        ({"available_node_types__p4d_24xlarge__min_workers": 1}, "keeps GPUs running without work"),
        ({"available_node_types__head__node_config__ImageId": None}, "node_config.ImageId is missing"),
        ({"available_node_types__head__node_config__KeyNmae": "me"}, 'Unknown parameter in input: "KeyNmae"'),
        (
            {"available_node_types__p4d_24xlarge__node_config__SubnetIds": ["x"]},
            "has NetworkInterfaces, which name SubnetIds too",
        ),
        ({"head_node_type": "haed"}, "head_node_type is 'haed', which is none of available_node_types"),
        ({"setup_commands": []}, "RAY_AUTH_MODE=token; without it whoever reaches the head may run code"),
        ({"file_mounts": {"~/m2f-upload": "."}}, "no ~/.ray/auth_token"),
        ({"initialization_commands": ["export AWS_SECRET_ACCESS_KEY=x"]}, "an AWS key stands in the file"),
        ({"head_start_ray_commands": ["ray start --head --dashboard-host=0.0.0.0"]}, "shows the dashboard"),
        ({"head_start_ray_commands": ["bash tracking_server.sh 0.0.0.0"]}, "shows MLflow to every network of the head"),
        ({"auth__ssh_private_key": "./keys/id"}, "ssh_private_key lies in ., which goes to every machine"),
        (
            {"head_setup_commands": ["export MLFLOW_TRACKING_URI=https://me:secret@host"]},
            "a password stands in an addr",
        ),
    ],
)
def test_what_is_wrong_with_the_cloud_file_is_said(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    found = problems(filled("cluster.yaml", tmp_path, **changes))
    assert any(re.search(sentence, each) for each in found), found


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"provider__worker_ips": ["10.0.0.2", "10.0.0.3", "10.0.0.2"]}, "worker_ips names 10.0.0.2 twice"),
        ({"provider__worker_ips": ["10.0.0.1"], "provider__head_ip": "10.0.0.1"}, "holds head_ip too"),
        ({"min_workers": 3}, "min_workers is 3, but provider.worker_ips has 2 machines"),
        ({"provider__head_ip": None}, "provider.head_ip is missing"),
        ({"available_node_types": {"a": {}}}, "Ray: .*not supported for on-premise"),
    ],
)
def test_what_is_wrong_with_the_rack_file_is_said(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    found = problems(filled("cluster.onprem.yaml", tmp_path, **changes))
    assert any(re.search(sentence, each) for each in found), found


def test_what_is_said_of_a_password_does_not_hold_it(tmp_path: Path) -> None:
    path = filled("cluster.onprem.yaml", tmp_path, setup_commands=["echo https://me:secret@host"])
    assert not any("secret@" in sentence for sentence in problems(path))


def test_up_hides_the_token_from_other_users_of_the_laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As `ray get-auth-token --generate` leaves it; the machines' copies get its permissions.
    from pipeline import submit

    token = tmp_path / "auth_token"
    token.write_text("a token")
    token.chmod(0o644)
    path = filled("cluster.onprem.yaml", tmp_path, file_mounts={"~/m2f-upload": ".", "~/.ray/auth_token": str(token)})
    calls: list[str] = []
    monkeypatch.setattr(submit, "_ray", lambda command, *words, **_: calls.append(command) or 0)
    assert submit.main(["up", str(path)]) == 0 and calls == ["up"]
    assert token.stat().st_mode & 0o777 == 0o600
    token.chmod(0o644)
    assert submit.main(["run", str(path), "repro", "train@shapes_tiny"]) == 0 and "rsync-up" in calls
    assert token.stat().st_mode & 0o777 == 0o600


def test_a_job_is_told_the_commit_of_the_laptops_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import submit
    from pipeline.provenance import environment

    path = str(filled("cluster.onprem.yaml", tmp_path, file_mounts={"~/m2f-upload": "."}))
    submitted: list[tuple[str, ...]] = []
    monkeypatch.setattr(submit, "_ray", lambda command, *words, **_: submitted.append((command, *words)) or 0)
    monkeypatch.setattr(submit, "results", lambda words: 0)

    def settings(*words: str) -> list[str]:
        submitted.clear()
        assert submit.main(["run", path, *words]) == 0
        (job,) = [rest for command, *rest in submitted if command == "submit"]
        return [word for word in job[job.index("--") + 1 :] if word.startswith("M2F_")]

    for word, told in (("1f3c-changed", ["M2F_GIT_COMMIT=1f3c-changed"]), (None, [])):
        monkeypatch.setattr(environment, "commit_word", lambda word=word: word)
        assert settings("repro", "train@shapes_tiny") == told
    monkeypatch.setattr(environment, "commit_word", lambda: "1f3c")
    assert settings("repro", "train@shapes_tiny", "M2F_GIT_COMMIT=mine") == ["M2F_GIT_COMMIT=mine"]
    assert settings("attach") == []


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none.yaml does not exist; the project's examples are cluster.yaml"):
        problems(tmp_path / "none.yaml")


def test_the_autoscaler_takes_the_types_with_the_most_gpus_first() -> None:
    # At most 3 machines: 2 with 8 GPUs, then 1 of the 4 with 4.
    types = {
        "head": {"resources": {"CPU": 8}},
        "small": {"resources": {"GPU": 4, "CPU": 16}, "max_workers": 4},
        "large": {"resources": {"GPU": 8, "CPU": 96}, "max_workers": 2},
    }
    config = {"max_workers": 3, "head_node_type": "head", "available_node_types": types}
    assert machines(config) == [
        Machines(kind="large", count=2, gpus=8, cpus=96),
        Machines(kind="small", count=1, gpus=4, cpus=16),
    ]
    assert machines({"provider": {"type": "local"}}) == []


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
