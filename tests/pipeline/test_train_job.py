"""Training under Ray Train: a killed worker and a killed job end with the weights of an undisturbed run."""

from __future__ import annotations

import dataclasses
import itertools
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline import tracking, train_loop
from pipeline.params import Row
from pipeline.seeds import train_row
from tests.pipeline.conftest import NO_WEIGHTS
from tests.pipeline.train_process import STEPS, Job


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
    assert "going on from step" in one_killed.log()

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
    assert job.ended() == 1
    last_line = job.log().splitlines()[-1]
    assert "no seed of row small finished" in last_line and shard.name in last_line
    assert job.result()["seeds"][0]["status"] == "failed"  # which the report shows


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
    original, answers = tracking.attempt, itertools.chain([False], itertools.repeat(True))
    monkeypatch.setattr(tracking, "attempt", lambda *call, **how: original(*call, **how) if next(answers) else None)
    (seed,) = train_row(two_steps, manifest=small_data[1], weights=NO_WEIGHTS)["seeds"]
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert [point.step for point in client.get_metric_history(seed["mlflow_run_id"], "loss")] == [1, 2]
    assert client.get_run(seed["mlflow_run_id"]).info.status == "FINISHED"
