"""The project's cluster files: what a check finds without a network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster.check import account_problems, problems
from tests.helpers.cluster_files import filled
from tests.helpers.shared import PROJECT


@pytest.mark.parametrize("name", ["cluster.yaml", "cluster.private.yaml"])
def test_in_the_files_for_aws_nothing_is_to_be_filled_in(name: str) -> None:
    assert problems(PROJECT / name) == []


def test_the_file_for_a_rack_has_places_to_fill_in_and_nothing_else_wrong(tmp_path: Path) -> None:
    found = problems(PROJECT / "cluster.onprem.yaml")
    assert "provider.head_ip: fill in <address of the head>" in found
    assert all(re.search(r": fill in <.*>$", sentence) for sentence in found)
    assert len(found) == len({sentence.partition("fill in")[2] for sentence in found})  # each once
    assert problems(filled("cluster.onprem.yaml", tmp_path)) == []


def test_what_an_account_has_is_unknown_without_credentials_and_nothing_is_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    lacks, (known,) = account_problems(PROJECT / "cluster.yaml")
    assert lacks == []
    assert known == (
        "quota and zones are not known, because AWS was not asked: there are no AWS credentials here; "
        "call `aws configure` or `aws sso login`"
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"provider__region": None, "provider__regoin": "us-east-1"}, "provider.region is missing"),
        ({"provider__region": None}, "provider.region is missing"),
        ({"provider__price_per_hour": {"p4": 3.0}}, "price_per_hour has 'p4', which is none of available_node_types"),
        ({"provider__type": "azure"}, "this project knows external, aws, gcp, local"),
        ({"provider__module": "mine.Provider"}, "this project has pipeline.cluster.aws.Provider"),
        ({"initialization_commands": ["echo <your name>"]}, "initialization_commands.0.: fill in <your name>"),
        ({"auht": {}}, "Ray: .*auht"),
        ({"max_workers": None}, "max_workers is missing"),
        ({"max_workers": 0}, "at most 0 GPUs, and a published row trains on 8; raise max_workers"),
        ({"available_node_types__head__resources": {"CPU": 8, "GPU": 1}}, "head is the head and has GPUs"),
        ({"available_node_types__p4d_24xlarge__resources": {"CPU": 96}}, "p4d_24xlarge.resources has no GPU"),
        ({"available_node_types__p4d_24xlarge__min_workers": 1}, "keeps GPUs running without work"),
        ({"available_node_types__head__node_config__ImageId": None}, "node_config.ImageId is missing"),
        ({"available_node_types__head__node_config__KeyNmae": "me"}, 'Unknown parameter in input: "KeyNmae"'),
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


def test_an_interface_and_its_machine_may_not_both_name_the_subnet(tmp_path: Path) -> None:
    changes = {"available_node_types__p4d_24xlarge__node_config__SubnetIds": ["x"]}
    (found,) = problems(filled("cluster.private.yaml", tmp_path, **changes))
    assert "has NetworkInterfaces, which name SubnetIds too" in found


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


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"auth": "ubuntu"}, "auth is 'ubuntu'; Ray wants the type object there"),
        ({"file_mounts": ["here"]}, "file_mounts is ['here']; Ray wants the type object there"),
        (
            {"available_node_types": {"head": "large"}},
            "available_node_types.head is 'large'; Ray wants the type object",
        ),
        ({"max_workers": "many"}, "max_workers is 'many'; Ray wants the type integer there"),
    ],
)
def test_a_value_of_another_type_is_said(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    found = problems(filled("cluster.yaml", tmp_path, **changes))
    assert any(each.startswith(sentence) for each in found), found


def test_what_is_said_of_a_password_does_not_hold_it(tmp_path: Path) -> None:
    path = filled("cluster.onprem.yaml", tmp_path, setup_commands=["echo https://me:secret@host"])
    assert not any("secret@" in sentence for sentence in problems(path))


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none.yaml does not exist; the project's examples are cluster.yaml"):
        problems(tmp_path / "none.yaml")
