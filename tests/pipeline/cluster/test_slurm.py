"""What a job of Slurm takes of its environment. tests/cluster/test_slurm.py has jobs of a real Slurm."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from pipeline.cluster.slurm import Allocation, settings
from pipeline.submit import main
from tests.helpers.shared import PROJECT


def allocation(project: Path, *, task: int | None = None) -> Allocation:
    return Allocation(job="1234", nodes=("a", "b"), project=project, starts=0, task=task)


def test_outside_a_job_the_command_says_how_to_start_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(ValueError, match="no job of Slurm; call: sbatch deploy/slurm/row.sbatch evaluate@<row>"):
        main(["slurm", "evaluate@shapes_tiny"])
    with pytest.raises(ValueError, match=r"is not the project \(no dvc.yaml\); call sbatch where dvc.yaml lies"):
        Allocation.of({"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "a"})


def test_a_task_of_an_array_takes_the_target_at_its_place_and_a_job_takes_all() -> None:
    named = ["evaluate@a", "evaluate@b"]
    assert allocation(Path("p")).targets(named) == named
    assert allocation(Path("p"), task=1).targets(named) == ["evaluate@b"]
    with pytest.raises(
        ValueError, match=r"task 2 of the array has no target, for 2 are named; call sbatch --array=0-1"
    ):
        allocation(Path("p"), task=2).targets(named)


def test_jobs_share_what_the_project_has_and_each_has_folders_and_a_token_of_its_own(tmp_path: Path) -> None:
    found = settings(allocation(tmp_path), {"PATH": "/bin", "M2F_GIT_COMMIT": "1f3c"})
    assert found["M2F_STORAGE"] == f"{tmp_path}/storage"
    assert found["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/mlflow.db"
    assert found["RAY_AUTH_TOKEN_PATH"] == f"{tmp_path}/.dvc/tmp/slurm/1234/auth_token"
    node = f"/tmp/m2f-{os.getuid()}-1234"
    assert (found["RAY_TMPDIR"], found["M2F_SHARD_CACHE"]) == (node, f"{node}/shards")
    assert found["RAY_AUTH_MODE"] == "token" and found["PATH"].endswith("/bin") and found["M2F_GIT_COMMIT"] == "1f3c"
    # what the user or the cluster has set counts
    given = {"M2F_STORAGE": "s3://bucket/m2f", "MLFLOW_TRACKING_URI": "http://mlflow:5000", "TMPDIR": "/scratch/1234"}
    found = settings(allocation(tmp_path), {**given, "M2F_GIT_COMMIT": "1f3c"})
    assert {name: found[name] for name in given} == given
    assert found["M2F_SHARD_CACHE"] == "/scratch/1234/m2f-shards"
    assert settings(allocation(tmp_path), {"M2F_STORAGE": "elsewhere"})["M2F_STORAGE"] == f"{tmp_path}/elsewhere"


def test_the_script_is_a_shell_script_whose_options_come_before_its_first_command() -> None:
    script = PROJECT / "deploy/slurm/row.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    lines = script.read_text().splitlines()
    options = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    commands = [i for i, line in enumerate(lines) if line and not line.startswith("#")]
    assert options and max(options) < min(commands)  # those after it Slurm does not read
    given = dict(re.findall(r"#SBATCH --([\w-]+)(?:=(\S+))?", "\n".join(lines)))
    assert {"requeue", "signal", "open-mode", "gres"} <= given.keys()
    assert lines[-1] == 'exec python -m pipeline.submit slurm "$@"'  # it is what hears Slurm's signals
