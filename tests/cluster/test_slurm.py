"""Rows in jobs of a real Slurm, on hosts in namespaces: to its end, preempted, out of time, two at once."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.hosts import Hosts
from tests.cluster.slurm import NODES, Slurm, why_not
from tests.cluster.small_project import ROWS
from tests.cluster.training import digest_of_tensors
from tests.helpers.waiting import until

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def slurm(lab: Hosts) -> Iterator[Slurm]:
    if reason := why_not():
        pytest.skip(reason)
    with Slurm(lab) as slurm:
        yield slurm


def left_over(slurm: Slurm) -> list[str]:
    """Processes of Ray, folders of jobs on the nodes and workspaces of jobs that are still there."""
    found = [f"{node}: {name}" for node in NODES for name in ("raylet", "gcs_server") if slurm.lab.pids(node, name)]
    found += [
        f"{node}: {line}"
        for node in NODES
        for line in slurm.ask("ls -d /tmp/m2f-[0-9]*-[0-9]*", host=node).splitlines()
    ]
    found += [path.name for path in (slurm.project / ".dvc/tmp/slurm").glob("*/")]
    return [each for each in found if "No such file" not in each]


def result(slurm: Slurm, row: str) -> Any:
    """The one seed of a row's result in the project."""
    (seed,) = json.loads((slurm.project / f"results/train/{row}.json").read_text())["seeds"]
    return seed


def run_folder(slurm: Slurm, row: str) -> Path:
    return slurm.project / "storage/runs" / result(slurm, row)["run_key"]


def steps(slurm: Slurm) -> list[int]:
    """Steps in the curve of the one training that has not ended."""
    curves = list((slurm.project / "storage/runs").glob("*/curve.jsonl"))
    going = [path for path in curves if not (path.parent / "finished.json").exists()]
    return [json.loads(line)["step"] for path in going for line in path.read_text().splitlines() if line.endswith("}")]


def reaches(slurm: Slurm, job: str, step: int) -> None:
    """Wait until the one training that goes on is at a step."""
    until(
        lambda: step in steps(slurm),
        ended=lambda: slurm.state(job) not in ("PENDING", "RUNNING"),
        said=lambda: f"{slurm.state(job)}\n{slurm.log(job)}",
    )


def check_whole(slurm: Slurm, row: str) -> None:
    """The row's training has ended, every step is in its curve once, and nothing is left over."""
    assert result(slurm, row)["status"] == "finished"
    curve = (run_folder(slurm, row) / "curve.jsonl").read_text().splitlines()
    assert [json.loads(point)["step"] for point in curve] == list(range(1, ROWS[row] + 1))
    assert not list(run_folder(slurm, row).rglob("*.part"))
    assert left_over(slurm) == []


def weights(slurm: Slurm, row: str) -> str:
    """SHA-256 of the tensors of the last checkpoint, those of the optimiser included."""
    return digest_of_tensors(run_folder(slurm, row) / result(slurm, row)["checkpoints"]["last"]["path"])


@pytest.fixture(autouse=True)
def fresh(slurm: Slurm) -> None:
    """Every test trains anew."""
    for folder in ("storage/runs", "results/train"):
        shutil.rmtree(slurm.project / folder, ignore_errors=True)


TRAIN = "train@faults M2F_WORKERS=2"


@pytest.fixture(scope="module")
def undisturbed(slurm: Slurm) -> str:
    """Weights of the row when nothing happens to its job."""
    job = slurm.submit("--nodes=2 --cpus-per-task=1", TRAIN)
    assert slurm.ends(job) == "COMPLETED", slurm.log(job)
    check_whole(slurm, "faults")
    return weights(slurm, "faults")


@pytest.mark.timeout(900)
def test_a_row_trains_on_two_nodes_to_its_end_and_its_results_are_in_the_project(slurm: Slurm) -> None:
    job = slurm.submit("--nodes=2 --cpus-per-task=1", "train@brief M2F_WORKERS=2")
    folder = slurm.project / f".dvc/tmp/slurm/lab-{job}"
    until(lambda: (folder / "ray/worker2.log").exists(), said=lambda: slurm.log(job))  # so Ray runs on the first node
    token = (folder / "auth_token").read_text()
    assert len(token) == 64 and (folder / "auth_token").stat().st_mode & 0o777 == 0o600
    address = re.search(r"--address='([\d.]+:\d+)'", (folder / "ray/worker1.log").read_text())
    assert address, (folder / "ray/worker1.log").read_text()
    stranger = f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN=other ray status --address {address[1]}"
    assert "nvalid" in slurm.lab.on("laptop", stranger, check=False).stdout
    assert slurm.ends(job) == "COMPLETED", slurm.log(job)
    log = slurm.log(job)
    assert f"job {job} on worker1 worker2: train@brief\n" in log
    assert re.search(r"^brief \| brief seed 0: 20 steps in \d+ s", log, re.MULTILINE), log
    assert re.search(r"^  brief: done after \d+ s", log, re.MULTILINE), log
    assert result(slurm, "brief")["workers"] == 2
    assert [span["nodes"] for span in result(slurm, "brief")["worker_groups"]] == [2]
    assert "train@brief:" in (slurm.project / "dvc.lock").read_text()
    check_whole(slurm, "brief")
    assert token not in log


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_a_preempted_job_and_one_whose_time_ends_go_on_and_end_with_the_same_bits(
    slurm: Slurm, undisturbed: str
) -> None:
    job = slurm.submit("--nodes=2 --cpus-per-task=1", TRAIN)
    reaches(slurm, job, 15)
    urgent = slurm.ask("sbatch --parsable --partition=urgent --nodes=2 --exclusive --output=/dev/null --wrap 'sleep 1'")
    until(lambda: slurm.state(urgent.strip()) == "COMPLETED", said=slurm.logs)
    until(lambda: slurm.state(job) == "RUNNING", said=slurm.logs)
    reaches(slurm, job, 25)
    slurm.ask(f"scancel --batch --signal=USR1 {job}")  # what --signal makes Slurm do, when it looks
    until(lambda: "its time is over soon" in slurm.log(job), said=lambda: slurm.log(job))
    assert slurm.ends(job) == "COMPLETED", slurm.log(job)
    log = slurm.log(job)
    assert f"start 2 of job {job}: going on in " in log and f"start 3 of job {job}: " in log
    assert "the job is in the queue again, and goes on from its last checkpoints" in log
    assert len(re.findall(r"going on from step [1-9]0", log)) == 2, log
    check_whole(slurm, "faults")
    assert weights(slurm, "faults") == undisturbed


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_a_job_that_loses_a_node_is_started_again_on_both_and_goes_on(slurm: Slurm) -> None:
    job = slurm.submit("--nodes=2 --cpus-per-task=1", TRAIN)
    reaches(slurm, job, 15)
    slurm.lose("worker2")
    until(lambda: slurm.state(job) == "PENDING", said=slurm.logs)
    slurm.start_node("worker2")
    assert slurm.ends(job) == "COMPLETED", slurm.log(job)
    assert f"start 2 of job {job}: going on in " in slurm.log(job)
    check_whole(slurm, "faults")


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_two_tasks_of_an_array_share_the_nodes_and_make_shared_stages_once(slurm: Slurm) -> None:
    for folder in ("results", "storage"):
        shutil.rmtree(slurm.project / folder, ignore_errors=True)
    (slurm.project / "dvc.lock").unlink(missing_ok=True)
    array = slurm.submit("--array=0-1 --nodes=2 --cpus-per-task=1", "evaluate@brief evaluate@other M2F_WORKERS=2")

    def tasks() -> list[str]:
        """The tasks' own numbers, which they have once they run."""
        shown = slurm.ask(f"scontrol show --oneliner job {array}")
        return sorted(re.findall(r"^JobId=(\d+) .*? ArrayTaskId=\d+ ", shown, re.MULTILINE))

    until(lambda: len(tasks()) == 2, said=slurm.logs)
    jobs = tasks()
    assert [slurm.ends(job) for job in jobs] == ["COMPLETED"] * 2, [slurm.log(job) for job in jobs]
    logs = [slurm.log(job) for job in jobs]
    assert sum("shard@shapes | Running stage" in log for log in logs) == 1, logs
    assert {re.findall(r"^  (\w+): done", log, re.MULTILINE)[-1] for log in logs} == {"brief", "other"}
    lock = (slurm.project / "dvc.lock").read_text()
    for row in ("brief", "other"):
        assert json.loads((slurm.project / f"results/evaluate/{row}.json").read_text())["median"]["pq"] is not None
        assert f"evaluate@{row}:" in lock
        check_whole(slurm, row)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_cancelled_job_leaves_nothing_and_the_same_again_continues(slurm: Slurm) -> None:
    job = slurm.submit("--nodes=2 --cpus-per-task=1", TRAIN)
    reaches(slurm, job, 12)
    slurm.ask(f"scancel {job}")
    until(lambda: left_over(slurm) == [], said=lambda: f"{left_over(slurm)}\n{slurm.log(job)}\n{slurm.logs()}")
    assert slurm.ends(job) == "CANCELLED"
    assert "cancelled; the same again goes on from the last checkpoints" in slurm.log(job)
    job = slurm.submit("--nodes=2 --cpus-per-task=1", TRAIN)  # while Ray starts
    ray = slurm.project / f".dvc/tmp/slurm/lab-{job}/ray/worker1.log"
    until(ray.exists, said=lambda: slurm.log(job))
    slurm.ask(f"scancel {job}")
    until(lambda: left_over(slurm) == [], said=lambda: f"{left_over(slurm)}\n{slurm.log(job)}\n{slurm.logs()}")
    assert "cancelled; " in slurm.log(job) and "error: Ray" not in slurm.log(job), slurm.log(job)
    job = slurm.submit("--nodes=2 --cpus-per-task=1", TRAIN)
    assert slurm.ends(job) == "COMPLETED", slurm.log(job)
    assert "going on from step 10" in slurm.log(job)
    check_whole(slurm, "faults")


@pytest.mark.full
def test_a_step_that_starts_ray_has_the_cores_and_gpus_of_its_job(slurm: Slurm) -> None:
    step = "srun --overlap --cpu-bind=none --nodes=1 --ntasks=1 --nodelist=worker2 env"  # as RayNodes calls it
    asked = "--nodes=2 --ntasks-per-node=1 --cpus-per-task=2 --gres=gpu:2"
    job = slurm.ask(f"cd {slurm.project} && sbatch --parsable {asked} --output=step.log --wrap '{step}'").strip()
    assert slurm.ends(job) == "COMPLETED"
    found = dict(line.split("=", 1) for line in (slurm.project / "step.log").read_text().splitlines() if "=" in line)
    assert (found["SLURMD_NODENAME"], found["SLURM_CPUS_ON_NODE"], found["SLURM_GPUS_ON_NODE"]) == ("worker2", "2", "2")
    assert found["CUDA_VISIBLE_DEVICES"] == "0,1"


@pytest.mark.full
def test_a_job_that_cannot_begin_ends_with_a_sentence(slurm: Slurm) -> None:
    job = slurm.submit("--nodes=2 --cpus-per-task=1", "train@ade20k_r50")
    assert slurm.ends(job) == "FAILED"
    assert re.search(r"^error: train@ade20k_r50 is no stage of dvc.yaml", slurm.log(job), re.MULTILINE), slurm.log(job)
    job = slurm.submit("--array=3 --nodes=1 --cpus-per-task=1", "train@faults")
    until(lambda: "error: " in slurm.log(job), said=slurm.logs)
    assert "error: task 3 of the array has no target, for 1 are named; call sbatch --array=0-0" in slurm.log(job)
    job = slurm.submit("--nodes=2 --cpus-per-task=1", "train@faults M2F_STORAGE=/tmp/storage")  # each host's own
    assert slurm.ends(job) == "FAILED"
    assert "error: the storage root /tmp/storage of worker1 is another folder on worker2, or none;" in slurm.log(job)
    assert left_over(slurm) == []
