"""Training under Ray Train: a killed worker and a killed job end with the weights of an undisturbed run."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from pipeline import tracking, train_loop
from pipeline.params import Row
from pipeline.tracking import read_curve
from pipeline.train_job import train_row
from tests.pipeline.conftest import NO_WEIGHTS

PROJECT = Path(__file__).resolve().parents[2]
STEPS = 24

DRIVER = """
import json, pickle, sys
from pathlib import Path
from pipeline.train_job import train_row
from tests.pipeline.conftest import NO_WEIGHTS

if __name__ == "__main__":
    row, manifest = pickle.loads(Path("job.pickle").read_bytes())
    weights = {"name": "none", "path": None, "sha256": None}
    Path("result.json").write_text(json.dumps(train_row(row, manifest=manifest, weights=weights)))
"""


class Job:
    """`train_row` in a process of its own, with its own workspace, storage root and Ray."""

    def __init__(self, folder: Path, shards: Path, row: Row, manifest: dict[str, Any]) -> None:
        folder.mkdir()
        self.folder, self.storage = folder, folder / "storage"
        shutil.copytree(shards, self.storage)
        (folder / "job.pickle").write_bytes(pickle.dumps((row, manifest)))
        (folder / "driver.py").write_text(DRIVER)
        self.ray = tempfile.mkdtemp(prefix="m2f-ray-", dir="/tmp")  # Ray's socket paths must be short
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(PROJECT),
            "M2F_STORAGE": str(self.storage),
            "M2F_WORKERS": "2",
            "M2F_LOADER_PROCESSES": "0",
            "RAY_TMPDIR": self.ray,
            "MLFLOW_TRACKING_URI": f"sqlite:///{self.folder}/mlflow.db",
        }
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "driver.py"], cwd=self.folder, env=environment, stdout=log, stderr=log
            )

    def wait(self, timeout_s: float = 150) -> dict[str, Any]:
        assert self.process is not None
        assert self.process.wait(timeout_s) == 0, (self.folder / "log").read_text()[-3000:]
        result: dict[str, Any] = json.loads((self.folder / "result.json").read_text())
        return result

    def wait_for_step(self, step: int, timeout_s: float = 120) -> None:
        """Until the curve shows that `step` steps are done and a checkpoint exists."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            curves = list(self.storage.glob("runs/*/curve.jsonl"))
            checkpoints = list(self.storage.glob("runs/*/checkpoints/step-*.safetensors"))
            if curves and checkpoints and any(point["step"] >= step for point in read_curve(curves[0])):
                return
            assert self.process is not None and self.process.poll() is None, (self.folder / "log").read_text()[-3000:]
            time.sleep(0.05)
        raise AssertionError(f"step {step} was not reached: {(self.folder / 'log').read_text()[-3000:]}")

    def workers(self) -> list[psutil.Process]:
        assert self.process is not None
        everyone = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in everyone if "RayTrainWorker" in " ".join(process.cmdline())]

    def kill_everything(self) -> None:
        if self.process is None:
            return
        try:
            tree = [psutil.Process(self.process.pid)]
            tree += tree[0].children(recursive=True)
        except psutil.NoSuchProcess:
            return
        for process in tree:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        self.process.wait(30)

    def weights(self) -> bytes:
        (path,) = self.storage.glob(f"runs/*/checkpoints/step-{STEPS:08d}.safetensors")
        from safetensors.torch import load_file, save

        tensors = load_file(path)
        return save(tensors)

    def curve(self) -> list[dict[str, Any]]:
        (path,) = self.storage.glob("runs/*/curve.jsonl")
        return read_curve(path)


@pytest.fixture
def make_job(small_data: tuple[Path, dict[str, Any]], small_row: Row, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []
    train = dataclasses.replace(small_row.train, steps=STEPS, val_interval=12, checkpoint_interval=4)
    row = dataclasses.replace(small_row, train=train, seeds=(5,))

    def make(name: str) -> Job:
        jobs.append(Job(tmp_path / name, small_data[0], row, small_data[1]))
        return jobs[-1]

    yield make
    for job in jobs:
        job.kill_everything()
        shutil.rmtree(job.ray, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_worker_and_a_killed_job_end_with_the_weights_of_an_undisturbed_run(
    make_job: Callable[..., Job],
) -> None:
    undisturbed, one_killed, all_killed = make_job("undisturbed"), make_job("one"), make_job("all")
    undisturbed.start()
    result = undisturbed.wait()
    assert result["seeds"][0]["status"] == "finished" and result["seeds"][0]["workers"] == 2

    one_killed.start()
    one_killed.wait_for_step(9)
    victims = one_killed.workers()
    assert len(victims) == 2
    victims[1].send_signal(signal.SIGKILL)
    result = one_killed.wait()
    assert result["seeds"][0]["status"] == "finished"
    assert "going on from step" in (one_killed.folder / "log").read_text()

    all_killed.start()
    all_killed.wait_for_step(14)
    all_killed.kill_everything()
    assert not (all_killed.folder / "result.json").exists()
    all_killed.start()
    result = all_killed.wait()
    assert result["seeds"][0]["status"] == "finished"

    losses = [point["loss"] for point in undisturbed.curve()]
    for job in (one_killed, all_killed):
        assert job.weights() == undisturbed.weights()
        assert [point["step"] for point in job.curve()] == list(range(1, STEPS + 1))
        assert [point["loss"] for point in job.curve()] == losses


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_an_error_of_the_users_ends_the_row_with_its_sentence(make_job: Callable[..., Job]) -> None:
    job = make_job("altered")
    (shard,) = job.storage.glob("shards/**/train-*.arrow")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(content)
    job.start()
    assert job.process is not None
    assert job.process.wait(200) == 1
    log = (job.folder / "log").read_text()
    assert "no seed of row small finished" in log.splitlines()[-1]
    assert shard.name in log.splitlines()[-1]


def test_finished_seeds_are_not_trained_again_and_a_new_seed_is(
    two_steps: Row, small_data: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train_row(two_steps, manifest=small_data[1], weights=NO_WEIGHTS)
    trained: list[int] = []
    original = train_loop.train
    monkeypatch.setattr(train_loop, "train", lambda run: trained.append(run.seed) or original(run))
    more = dataclasses.replace(two_steps, seeds=(1, 2))
    second = train_row(more, manifest=small_data[1], weights=NO_WEIGHTS)
    assert trained == [2]
    assert second["seeds"][0] == first["seeds"][0]
    assert [entry["status"] for entry in second["seeds"]] == ["finished", "finished"]


def test_a_seed_that_diverges_leaves_the_others_and_is_not_tried_again(
    two_steps: Row, small_data: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = train_loop.build

    def poisoned(run: train_loop.Run, worker: train_loop.Worker) -> Any:
        model, gradients = original(run, worker)
        if run.seed == 1:
            model.query_decoder.class_head.bias.data[0] = float("nan")
        return model, gradients

    monkeypatch.setattr(train_loop, "build", poisoned)
    row = dataclasses.replace(two_steps, seeds=(1, 2))
    seeds = train_row(row, manifest=small_data[1], weights=NO_WEIGHTS)["seeds"]
    assert [entry["status"] for entry in seeds] == ["diverged", "finished"]
    assert "seed 1 diverged in step 0" in seeds[0]["reason"]
    monkeypatch.setattr(train_loop, "build", original)
    with pytest.raises(ValueError, match="no seed of row small finished .*diverged in step 0"):
        train_row(two_steps, manifest=small_data[1], weights=NO_WEIGHTS)


def test_a_tracking_server_that_was_down_at_the_start_gets_the_curve_at_the_end(
    two_steps: Row, small_data: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, answers = tracking.open_run, iter([False, True])
    monkeypatch.setattr(tracking, "open_run", lambda **run: original(**run) if next(answers) else None)
    (seed,) = train_row(two_steps, manifest=small_data[1], weights=NO_WEIGHTS)["seeds"]
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert [point.step for point in client.get_metric_history(seed["mlflow_run_id"], "loss")] == [1, 2]
    assert client.get_run(seed["mlflow_run_id"]).info.status == "FINISHED"
