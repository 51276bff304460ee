"""The seeds of a row as trials of Ray Tune: what one seed meets leaves the others."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.params.schema import Row
from pipeline.provenance.run_key import run_key
from pipeline.runs.checkpoints import checkpoint_path, read_header, save_model
from pipeline.runs.owner import owned
from pipeline.storage.files import sha256
from pipeline.storage.results.data import Manifest
from pipeline.storage.root import storage_root
from pipeline.tracking.client import SAID, mlflow_client
from pipeline.tracking.mlflow_runs import track_row
from pipeline.training import loop
from pipeline.training.seeds import _worker_s, _workers, train_row
from tests.helpers.made_up import span
from tests.helpers.ray_nodes import RayNodes, times_ray_gave_up
from tests.helpers.shared import PROJECT
from tests.helpers.train_process import Job
from tests.helpers.waiting import LIMIT_S
from tests.pipeline.conftest import NO_WEIGHTS

SEEDS = (1, 2, 3)


def spoil(job: Job, seed: int) -> Path:
    """Make a seed fail: its run folder holds a checkpoint of another run. The file, to be deleted again."""
    from pipeline.runs.checkpoints import save_model

    key = run_key(job.row, seed=seed, data_digest=job.manifest.digest, weights_sha256=None)
    return save_model(job.storage / "runs" / key, step=2, run_key="another", tensors={"a": torch.zeros(1)})


def digests(folder: Path) -> dict[str, tuple[str, int]]:
    """Content and time of every file of a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (sha256(path), path.stat().st_mtime_ns) for path in files}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.full
def test_of_three_seeds_one_fails_and_the_next_run_trains_it_alone(make_job: Callable[..., Job]) -> None:
    job = make_job("job", workers=1, seeds=SEEDS)
    foreign = spoil(job, 2)
    job.start()
    first, second, third = job.wait().seeds
    assert [first.status, second.status, third.status] == ["finished", "failed", "finished"]
    assert "belongs to run another, not to" in second.reason
    lines = job.log().splitlines()
    assert f"small: 3 seeds to train on {worker_groups()} worker groups of 1 worker with 1 core" in lines
    assert any(line.startswith("small seed 2: failed: checkpoint ") for line in lines)
    for seed in (1, 3):
        assert any(line.startswith(f"small seed {seed}: step 24: validation PQ") for line in lines)
    # of Tune's table, to which every trial that finished has reported its figures
    pqs = [100 * (seed.metrics["pq"] or 0.0) for seed in (first, third)]
    said = f"PQ {statistics.median(pqs):.2f} ({min(pqs):.2f} to {max(pqs):.2f})"
    assert any(f"last validations of 2 seeds, medians: {said}" in line for line in lines), job.log()
    # nothing but our own lines: no boxes, no words of Ray's
    assert [line for line in lines if not line.startswith(("small: ", "small seed "))] == []

    folders = [job.run_dir(1), job.run_dir(3)]
    before = [digests(folder) for folder in folders if folder]
    foreign.unlink()
    job.start()
    seeds = job.wait().seeds
    assert [seed.status for seed in seeds] == ["finished"] * 3 and (seeds[0], seeds[2]) == (first, third)
    assert [digests(folder) for folder in folders if folder] == before
    assert "small: 1 seed to train on one worker group of 1 worker with 1 core" in job.log()
    assert list(job.storage.glob("runs/*/ray")) == []


def worker_groups() -> int:
    return min(3, len(os.sched_getaffinity(0)))


@pytest.mark.ray
@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.long),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.full),
    ],
    ids=["SIGTERM", "SIGINT"],
)
def test_an_interrupted_driver_leaves_nothing_running_and_the_next_one_goes_on_with_all_seeds(
    make_job: Callable[..., Job], number: signal.Signals, code: int
) -> None:
    job = make_job("interrupted", workers=1, seeds=(1, 2))
    job.start()
    for seed in (1, 2):
        job.wait_for_step(9, seed=seed)
    started = job.tree()
    assert job.process is not None
    job.process.send_signal(number)
    assert job.ended() == code, job.log()[-3000:]
    _, alive = psutil.wait_procs(started, timeout=LIMIT_S)
    assert alive == []
    finished = len(list(job.storage.glob("runs/*/finished.json")))
    assert finished < 2  # one may have begun much earlier than the other
    if number == signal.SIGINT:
        return  # both end the same way
    job.workers_wanted = 0  # in one process, which costs less: what goes on is the same
    job.start()
    assert [seed.status for seed in job.wait().seeds] == ["finished", "finished"]
    assert job.log().count(": going on from step") == 2 - finished
    for seed in (1, 2):
        assert [point["step"] for point in job.curve(seed)] == list(range(1, 25))
    assert list(job.storage.glob("runs/*/ray")) == []


@pytest.fixture
def cluster() -> Iterator[dict[str, str]]:
    """A Ray cluster of two cores that several drivers join: the variables they need."""
    with RayNodes(head_cpus=2) as nodes:
        yield nodes.settings


@pytest.mark.ray
@pytest.mark.full
def test_seeds_take_turns_on_one_worker_group_and_wait_for_it_while_another_row_has_it_saying_for_what(
    make_job: Callable[..., Job], cluster: dict[str, str]
) -> None:
    job = make_job("job", seeds=(1, 2))
    with other_row(cluster):
        job.start(**cluster)
        job.until(lambda: "waits for a worker group" in job.log())
        job.until(lambda: times_ray_gave_up(cluster["RAY_TMPDIR"]) >= 2)
        waiting = (
            "small seed 1: waits for a worker group of 2 workers with 1 core each; 0 of the cluster's 2 cores are free"
        )
        assert job.log().splitlines()[-1] == waiting
    assert [seed.status for seed in job.wait().seeds] == ["finished", "finished"]
    said = job.log()  # the second seed queued: its first line comes after the first one's last
    assert "small: 2 seeds to train on one worker group of 2 workers with 1 core each" in said
    assert said.index("small seed 1: step 24: validation") < said.index("small seed 2: ")
    assert said.count("waits for a worker group") == 1


@contextlib.contextmanager
def other_row(cluster: dict[str, str]) -> Iterator[None]:
    """A driver that holds both cores of the cluster, as another row's training would."""
    code = (
        "import ray, sys\n"
        "from ray.util import placement_group\n"
        "ray.init(log_to_driver=False)\n"
        "ray.get(placement_group([{'CPU': 1}] * 2).ready())\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **cluster},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert driver.stdout is not None and driver.stdout.readline() == "held\n"
        yield
    finally:
        driver.communicate(timeout=LIMIT_S)


def test_finished_seeds_need_neither_ray_nor_torch(
    two_steps: Row, small_data: tuple[Path, Manifest], tmp_path: Path
) -> None:
    train_row(two_steps, manifest=small_data[1], weights=NO_WEIGHTS)
    import pickle

    (tmp_path / "row.pickle").write_bytes(pickle.dumps((two_steps, small_data[1], NO_WEIGHTS)))
    code = (
        "import pickle, sys\n"
        "from pipeline.training.seeds import train_row\n"
        "row, manifest, weights = pickle.loads(open('row.pickle', 'rb').read())\n"
        "result = train_row(row, manifest=manifest, weights=weights)\n"
        "print(result.seeds[0].status, [n for n in ('ray', 'torch') if n in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout == "finished []\n"


def test_a_finished_seed_whose_driver_was_lost_is_shown_as_finished_when_it_is_found_again(
    two_steps: Row, small_data: tuple[Path, Manifest]
) -> None:
    (seed,) = train_row(two_steps, manifest=small_data[1], weights=NO_WEIGHTS).seeds
    mlflow_client().update_run(seed.mlflow_run_id, status="RUNNING")
    train_row(two_steps, manifest=small_data[1], weights=NO_WEIGHTS)
    assert mlflow_client().get_run(seed.mlflow_run_id).info.status == "FINISHED"


def test_a_checkpoint_of_another_run_in_the_folder_is_refused_in_a_sentence(
    two_steps: Row, small_data: tuple[Path, Manifest]
) -> None:
    (seed,) = train_row(two_steps, manifest=small_data[1], weights=NO_WEIGHTS).seeds
    run_dir = storage_root() / seed.run_dir
    (run_dir / "finished.json").unlink()
    save_model(run_dir, step=3, run_key="another", tensors={"a": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"no seed .* finished \(seed 1: checkpoint .* belongs to run another, not to"):
        train_row(two_steps, manifest=small_data[1], weights=NO_WEIGHTS)


def test_a_seed_whose_best_checkpoint_is_gone_is_trained_again(
    two_steps: Row, small_data: tuple[Path, Manifest]
) -> None:
    row = dataclasses.replace(two_steps, train=dataclasses.replace(two_steps.train, val_interval=1))
    (seed,) = train_row(row, manifest=small_data[1], weights=NO_WEIGHTS).seeds
    run_dir = storage_root() / seed.run_dir
    last = run_dir / "checkpoints" / "step-00000002.safetensors"
    header = read_header(last)
    header["state"]["best"] = {"step": 1, "value": 1.0}  # as if the first validation had been better
    save_file(load_file(last), last, {"run_key": seed.run_key, "step": "2", "state": json.dumps(header["state"])})
    checkpoint_path(run_dir, 1).unlink(missing_ok=True)
    (run_dir / "finished.json").unlink()
    (again,) = train_row(row, manifest=small_data[1], weights=NO_WEIGHTS).seeds
    assert (again.status, again.metrics) == ("finished", seed.metrics)


def test_one_seed_alone_has_the_key_that_it_has_among_the_others(
    two_steps: Row, small_data: tuple[Path, Manifest]
) -> None:
    row = dataclasses.replace(two_steps, seeds=(1, 2))
    (alone,) = train_row(row, manifest=small_data[1], weights=NO_WEIGHTS, only=2).seeds
    both = train_row(row, manifest=small_data[1], weights=NO_WEIGHTS).seeds
    assert both[1] == alone and both[0].run_key != alone.run_key


def test_the_workers_of_a_result_are_those_that_made_the_most_of_its_steps() -> None:
    def of(*worker_groups: tuple[int, int]) -> int | None:
        return _workers([span(from_step=step, workers=workers) for step, workers in worker_groups], 100)

    assert of((0, 8)) == 8
    assert of((0, 8), (30, 4)) == 4  # 30 and 70 steps
    assert of((0, 8), (30, 4), (60, 8)) == 8  # 30 + 40 and 30
    assert of((0, 4), (50, 8)) == 8  # 50 and 50: the larger
    assert of() is None


def test_the_time_of_a_training_is_counted_for_the_workers_of_each_of_its_worker_groups() -> None:
    # 60 s on 8 workers, 30 s on 4 and 10 s on 8 again: 480 + 120 + 80
    worker_groups = [span(train_s=train_s, workers=workers) for train_s, workers in ((0.0, 8), (60.0, 4), (90.0, 8))]
    assert _worker_s(worker_groups, 100.0) == 680.0


def test_a_training_in_this_process_says_so_in_its_result(two_steps: Row, small_data: tuple[Path, Manifest]) -> None:
    (seed,) = train_row(two_steps, manifest=small_data[1], weights=NO_WEIGHTS).seeds
    (only,) = seed.worker_groups
    assert (seed.workers, only.from_step, only.workers, only.nodes) == (1, 0, 1, 1)
    assert only.devices == (seed.environment.device,) and seed.worker_s == seed.train_s > 0


def test_finished_seeds_are_not_trained_again_and_a_new_seed_is(
    two_steps: Row, small_data: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train_row(two_steps, manifest=small_data[1], weights=NO_WEIGHTS)
    trained: list[int] = []
    original = loop.train
    monkeypatch.setattr(loop, "train", lambda run: trained.append(run.seed) or original(run))
    more = dataclasses.replace(two_steps, seeds=(1, 2))
    second = train_row(more, manifest=small_data[1], weights=NO_WEIGHTS)
    assert trained == [2]
    assert second.seeds[0] == first.seeds[0]
    assert [entry.status for entry in second.seeds] == ["finished", "finished"]


def test_a_seed_that_diverges_leaves_the_others_and_is_not_tried_again(
    two_steps: Row, small_data: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop.build

    def poisoned(*arguments: Any, **keywords: Any) -> Any:
        training = original(*arguments, **keywords)
        if keywords["seed"] == 1:
            training.model.query_decoder.class_head.bias.data[0] = float("nan")
        return training

    monkeypatch.setattr(loop, "build", poisoned)
    row = dataclasses.replace(two_steps, seeds=(1, 2))
    seeds = train_row(row, manifest=small_data[1], weights=NO_WEIGHTS).seeds
    assert [entry.status for entry in seeds] == ["diverged", "finished"]
    assert "seed 1 diverged in step 0" in seeds[0].reason
    monkeypatch.setattr(loop, "build", original)
    with pytest.raises(ValueError, match="no seed of row small finished .*diverged in step 0"):
        train_row(two_steps, manifest=small_data[1], weights=NO_WEIGHTS)


def test_a_row_trains_on_beside_a_database_that_cannot_be_used_and_is_tracked_once_it_is_away(
    two_steps: Row,
    small_data: tuple[Path, Manifest],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(SAID, raising=False)
    database = tmp_path / "mlflow.db"
    database.write_text("no database")
    result = train_row(two_steps, manifest=small_data[1], weights=NO_WEIGHTS)
    (seed,) = result.seeds
    assert (seed.status, seed.mlflow_run_id) == ("finished", None)
    (warning,) = (line for line in capfd.readouterr().err.splitlines() if "warning" in line)
    assert warning.startswith("warning: row small is not tracked for now; later, python -m stages.track sends it (sql")
    database.rename(tmp_path / "away.db")
    ids = track_row(two_steps, result.seeds)
    run = mlflow_client().get_run(ids[seed.run_key])
    assert run.info.status == "FINISHED" and "train/loss" in run.data.metrics


def test_a_row_with_a_seed_that_another_process_trains_ends_before_it_trains_any(
    two_steps: Row, small_data: tuple[Path, Manifest], tmp_path: Path
) -> None:
    key = run_key(two_steps, seed=1, data_digest=small_data[1].digest, weights_sha256=None)
    row = dataclasses.replace(two_steps, seeds=(2, 1))
    with (
        owned([tmp_path / "storage/runs" / key]),
        pytest.raises(ValueError, match=f"^run {key} is being trained by process {os.getpid()} on host "),
    ):
        train_row(row, manifest=small_data[1], weights=NO_WEIGHTS)
    assert list((tmp_path / "storage/runs").iterdir()) == []
