"""cluster.gcp.yaml: what a check finds by Compute Engine's own description of an instance."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster.check import account_problems, problems
from pipeline.cluster.config import node_groups, read_cluster_file
from pipeline.cluster.laptop import what_starts
from tests.helpers.cluster_files import filled
from tests.helpers.shared import PROJECT

NODE = "available_node_types__a2_highgpu__node_config"


def test_project_and_bucket_are_all_that_is_to_be_filled_in() -> None:
    assert problems(PROJECT / "cluster.gcp.yaml") == [
        "provider.project_id: fill in <project>",
        "setup_commands[0]: fill in <bucket>",
    ]


def test_it_may_start_32_gpus_and_says_who_knows_the_price(tmp_path: Path) -> None:
    config = read_cluster_file(PROJECT / "cluster.gcp.yaml")
    assert [(group.node_type, group.count, group.gpus) for group in node_groups(config)] == [("a2_highgpu", 4, 8)]
    said = what_starts(str(filled("cluster.gcp.yaml", tmp_path)))
    assert said.startswith("One n2-standard-8, until: python -m pipeline.submit down ")
    assert "up to 4 a2-highgpu-8g (8 GPUs each)" in said and "Google's price list for us-central1" in said


def test_what_the_packages_for_it_are_is_said_where_they_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "googleapiclient", None)
    (found,) = problems(filled("cluster.gcp.yaml", tmp_path))
    assert found.endswith("which Ray needs too: pip install -r requirements-gcp.lock")


def test_the_lock_of_google_cloud_pins_what_the_other_lock_has_not() -> None:
    names = {}
    for lock in ("requirements.lock", "requirements-gcp.lock"):
        lines = [line for line in (PROJECT / lock).read_text().splitlines() if not line.startswith("#")]
        assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line) for line in lines)
        names[lock] = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in lines}
    assert {"google-api-python-client", "google-auth-httplib2", "gcsfs", "google-cloud-storage"} <= names[
        "requirements-gcp.lock"
    ]
    assert not names["requirements.lock"] & names["requirements-gcp.lock"]


class TestWithGooglesDescription:
    """Skipped without the packages of requirements-gcp.lock."""

    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("googleapiclient", reason="needs pip install -r requirements-gcp.lock")

    def test_nothing_else_is_wrong_with_the_file(self, tmp_path: Path) -> None:
        path = filled("cluster.gcp.yaml", tmp_path)
        assert problems(path) == []
        lacks, (known,) = account_problems(path)
        assert lacks == [] and known.startswith(
            "Google Cloud was not asked; `gcloud compute regions describe us-central1`"
        )

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"provider__project_id": None}, "provider.project_id is missing"),
            ({"provider__availability_zone": None}, "provider.availability_zone is missing"),
            ({f"{NODE}__machineTyp": "x"}, "a2_highgpu.node_config.machineTyp is unknown to Compute Engine"),
            ({f"{NODE}__scheduling__provisioningModel": "spot"}, "is 'spot'; Compute Engine knows FLEX_START, .*SPOT"),
            ({f"{NODE}__scheduling__onHostMaintenance": "MIGRATE"}, "onHostMaintenance must be TERMINATE"),
            ({f"{NODE}__scheduling__automaticRestart": True}, "automaticRestart must be false on spot"),
            ({f"{NODE}__scheduling__automaticRestart": "no"}, "is 'no'; Compute Engine wants the type boolean there"),
            ({f"{NODE}__disks": {"boot": True}}, "node_config.disks is .* wants the type array"),
            ({f"{NODE}__machineType": "a2-highgpu-4g"}, "machineType has 4 GPUs, but resources has 8"),
            ({f"{NODE}__machineType": "a3-highgpu-8g"}, "a3-highgpu-8g, which has H100 GPUs, but resources has .*A100"),
            ({f"{NODE}__machineType": "a3-ultragpu-8g"}, "which has H200 GPUs"),
            ({f"{NODE}__machineType": "n1-standard-8"}, "n1-standard-8, which has no GPUs, but resources has 8"),
            (
                {f"{NODE}__machineType": "n1-standard-8", f"{NODE}__guestAccelerators": [{"acceleratorCount": 4}]},
                "machineType has 4 GPUs, but resources has 8",
            ),
            (
                {f"{NODE}__disks": [{"boot": True, "initializeParams": {"diskSizeGb": "20"}}]},
                r"disks\[0\] has 20 GB; system and environment need 30",
            ),
            ({"provider__region": "europe-west4"}, "availability_zone is us-central1-a, which is no zone of .*-west4"),
            ({"provider__project_id": "p"}, r"disks\[1\].source lies in -project- us-c.*-a, .* in p us-c"),
            ({"provider__availability_zone": "us-central1-b"}, "source lies in .*-a, but the machines in .*-b"),
            ({f"{NODE}__serviceAccounts": [{"mail": "x"}]}, r"serviceAccounts\[0\].mail is unknown"),
            (
                {"available_node_types__head__node_config__scheduling": {"provisioningModel": "SPOT"}},
                r"head is the head and may be taken away \(scheduling\)",
            ),
            ({"provider__gcp_credentials": {"type": "service_account", "credentials": "{}"}}, "a key of Google Cloud"),
            ({"max_workers": 0}, "at most 0 GPUs"),
        ],
    )  # fmt: skip
    def test_what_is_wrong_is_said(self, changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
        found = problems(filled("cluster.gcp.yaml", tmp_path, **changes))
        assert any(re.search(sentence, each) for each in found), found
