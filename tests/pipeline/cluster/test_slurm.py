"""What a job of Slurm takes of its environment. tests/cluster/test_slurm.py has jobs of a real Slurm."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from pipeline.cluster import slurm
from pipeline.cluster.slurm import Allocation, settings
from pipeline.submit import main
from tests.helpers.shared import PROJECT


def allocation(project: Path, *, task: int | None = None, starts: int = 0) -> Allocation:
    array = None if task is None else "1234"  # the last task of an array has the number of the array
    return Allocation(
        job="1234", cluster="lab", nodes=("a", "b"), project=project, starts=starts, task=task, array=array
    )


class Scontrol:
    """Stands for Slurm's command: answers by its words, and what it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **answers: str | ValueError) -> None:
        self.answers, self.asked = answers, list[str]()
        monkeypatch.setattr(slurm, "_scontrol", self)

    def __call__(self, *words: str) -> str:
        self.asked.append(" ".join(words))
        answer = self.answers.get(next(word for word in words if word not in ("show", "--oneliner")), "")
        if isinstance(answer, ValueError):
            raise answer
        return answer


def test_outside_a_job_the_command_says_how_to_start_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(ValueError, match="no job of Slurm; call: sbatch deploy/slurm/row.sbatch evaluate@<row>"):
        main(["slurm", "evaluate@shapes_tiny"])
    job = {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "n[1-2]"}
    with pytest.raises(ValueError, match=r"is not the project \(no dvc.yaml\); call sbatch where dvc.yaml lies"):
        Allocation.of(job)
    (tmp_path / "dvc.yaml").touch()
    with pytest.raises(ValueError, match=r"job 1 has other nodes than this one \(salloc\?\); call sbatch"):
        Allocation.of(job)


def test_a_job_of_another_form_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").touch()
    asked = Scontrol(monkeypatch, hostnames="n1\nn2\n", job="JobId=1 TimeLimit=00:04:00 JobState=RUNNING\n")
    job = {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "n[1-2]"}
    job |= {"SLURMD_NODENAME": "n2", "SLURM_CLUSTER_NAME": "lab"}
    found = Allocation.of(job)
    assert (found.nodes, found.workspace) == (("n2", "n1"), tmp_path / ".dvc/tmp/slurm/lab-1")
    with pytest.raises(ValueError, match="a heterogeneous job .* ask for equal nodes"):
        Allocation.of({**job, "SLURM_HET_SIZE": "2"})
    with pytest.raises(ValueError, match="--gpus=4 leaves open how many GPUs each of 2 nodes has; .*--gpus-per-node"):
        Allocation.of({**job, "SLURM_GPUS": "4"})
    with pytest.raises(ValueError, match="time limit is 00:04:00, .* call sbatch with a longer one"):
        slurm._check_time(found)
    for limit in ("00:05:00", "1-00:00:00", "UNLIMITED"):
        asked.answers["job"] = f"JobId=1 TimeLimit={limit} JobState=RUNNING\n"
        slurm._check_time(found)


@pytest.mark.parametrize(
    ("shown", "starts", "goes_on", "said"),
    [
        # what Slurm puts into the queue again is counted before its processes end, what is cancelled is not
        ("JobState=COMPLETING Restarts=1", 1, False, "cancelled; the same again goes on"),
        ("JobState=COMPLETING Restarts=2", 1, True, ""),
        ("JobState=CANCELLED Restarts=0", 0, False, "cancelled; "),
        ("JobState=RUNNING Restarts=0", 0, True, "the job is in the queue again"),
        ("JobState=RUNNING Restarts=20", 20, False, "stopped after 21 starts"),
    ],
)
def test_after_a_signal_a_job_that_was_not_cancelled_goes_on(
    shown: str,
    starts: int,
    goes_on: bool,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = "JobId=1233 JobState=FAILED Restarts=0"  # another task of the array
    asked = Scontrol(monkeypatch, job=f"{other}\nJobId=1234 {shown}\n")
    assert slurm._goes_on(allocation(Path("p"), task=1, starts=starts), signal.SIGUSR1) is goes_on
    assert said in capsys.readouterr().out
    # by its number alone all tasks of the array would go back
    assert ("requeue 1234_1" in asked.asked) == ("RUNNING" in shown and goes_on)


def test_jobs_go_on_or_stop_tidily_while_slurm_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Scontrol(monkeypatch, job=ValueError("scontrol show job: Unable to contact slurm controller (connect failure)"))
    assert slurm._goes_on(allocation(tmp_path), signal.SIGTERM) is False
    assert re.search("^stopped, .* submit the same again.*Unable to contact", capsys.readouterr().out)
    jobs = tmp_path / ".dvc/tmp/slurm"
    for name in ("lab-1", "lab-1234", "other-1"):
        (jobs / name).mkdir(parents=True)
    slurm._remove_ended(allocation(tmp_path))
    assert len(list(jobs.glob("*/"))) == 3  # the job may be running
    Scontrol(monkeypatch, job=ValueError("scontrol show job: Invalid job id specified"))
    slurm._remove_ended(allocation(tmp_path))
    assert sorted(path.name for path in jobs.glob("*/")) == ["lab-1234", "other-1"]


def test_the_storage_root_is_one_folder_that_all_nodes_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    srun = tmp_path / "srun"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def node(sees: str) -> None:
        srun.write_text(f'#!/bin/sh\ncase "$*" in *--nodelist=b*) {sees};; esac\n')
        srun.chmod(0o755)

    storage = tmp_path / "new/storage"
    node('test -e "${*##* -e }"')
    slurm._check_storage(allocation(tmp_path), str(storage))
    node("exit 1")
    with pytest.raises(
        ValueError, match=r"the storage root .*/new/storage of a is another folder on b, or none; set M2F"
    ):
        slurm._check_storage(allocation(tmp_path), str(storage))
    assert list(storage.iterdir()) == []
    slurm._check_storage(allocation(tmp_path), "s3://bucket/m2f")
    with pytest.raises(ValueError, match="the storage root cannot be written .*; set M2F_STORAGE"):
        slurm._check_storage(allocation(tmp_path), str(srun))


@pytest.mark.parametrize(
    ("counted", "given", "told"),
    [("gpu:8", "4", "--num-gpus=4"), ("gpu:8", None, "--num-gpus=0"), ("(null)", None, "")],
)
def test_ray_has_the_gpus_of_the_job_and_counts_them_itself_where_slurm_does_not(
    counted: str, given: str | None, told: str, tmp_path: Path
) -> None:
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho 'NodeName=a Gres={counted}'\n")
    (tmp_path / "scontrol").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RAY_TMPDIR": str(tmp_path / "ray")}
    environment |= {"SLURM_CPUS_ON_NODE": "6", "SLURMD_NODENAME": "a"} | (
        {"SLURM_GPUS_ON_NODE": given} if given else {}
    )
    answer = subprocess.run(
        ["bash", "-c", slurm._NODE, "node", "echo", "ray"], env=environment, capture_output=True, text=True, check=True
    )
    assert answer.stdout.split() == ["ray", "--num-cpus=6", *([told] if told else [])]
    assert not (tmp_path / "ray").exists()


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
    assert found["RAY_AUTH_TOKEN_PATH"] == f"{tmp_path}/.dvc/tmp/slurm/lab-1234/auth_token"
    assert found["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == "0"  # else Ray ends later than a cancelled job
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


def test_a_step_that_is_ended_before_ray_starts_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "scontrol").write_text("#!/bin/sh\nkill -TERM $PPID\n")  # just after the folder has been made
    (tmp_path / "scontrol").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RAY_TMPDIR": str(tmp_path / "ray")}
    call = ["bash", "-c", slurm._NODE, "node", "touch", str(tmp_path / "started")]
    assert subprocess.run(call, env=environment).returncode == 143
    assert not (tmp_path / "ray").exists() and not (tmp_path / "started").exists()


def test_where_the_project_or_its_environment_is_missing_the_script_says_so(tmp_path: Path) -> None:
    def said(**environment: str) -> str:
        call = ["/bin/bash", str(PROJECT / "deploy/slurm/row.sbatch"), "evaluate@a"]
        answer = subprocess.run(call, env={"HOSTNAME": "n1", **environment}, capture_output=True, text=True)
        assert answer.returncode in (1, 127)
        return answer.stderr

    assert "this is for sbatch, not for bash" in said()
    assert said(SLURM_SUBMIT_DIR=str(tmp_path)) == (
        f"error: {tmp_path} is not the project (no dvc.yaml); call sbatch where dvc.yaml lies\n"
    )
    (tmp_path / "dvc.yaml").touch()
    assert re.match(
        f"error: n1 has no environment: {tmp_path}/.venv is missing .*make install$",
        said(SLURM_SUBMIT_DIR=str(tmp_path), PATH=str(tmp_path)),
    )
