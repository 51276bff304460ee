"""Training under Ray Train: a killed worker and a killed job end with the weights of an undisturbed run."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline.params.schema import Row
from pipeline.runs.curve_file import read_curve
from pipeline.runs.outcome import pools_of
from pipeline.storage.results import Manifest, Pool
from pipeline.tracking import mlflow_runs
from pipeline.training import loop
from pipeline.training.seeds import train_row
from tests.helpers.ray_hosts import RayHosts
from tests.helpers.shared import PROJECT
from tests.helpers.train_process import STEPS, Job
from tests.pipeline.conftest import NO_WEIGHTS


@pytest.mark.ray
@pytest.mark.full
def test_a_killed_worker_and_then_a_killed_job_end_with_the_weights_of_an_undisturbed_run(
    make_job: Callable[..., Job],
) -> None:
    undisturbed, killed = make_job("undisturbed"), make_job("killed")
    undisturbed.start()
    result = undisturbed.wait()
    assert result.seeds[0].status == "finished" and result.seeds[0].workers == 2

    killed.start()
    killed.wait_for_step(5)
    victims = killed.workers()
    assert len(victims) == 2
    victims[1].send_signal(signal.SIGKILL)
    killed.wait_for_step(14)
    assert "lost a worker (1 of 3 times)" in killed.log() and "going on from step" in killed.log()
    killed.kill_everything()
    assert not killed.has_result
    killed.start()
    assert killed.wait().seeds[0].status == "finished"
    assert killed.log().count("going on from step") == 2

    assert killed.weights() == undisturbed.weights()
    assert [point["step"] for point in killed.curve()] == list(range(1, STEPS + 1))
    assert [point["loss"] for point in killed.curve()] == [point["loss"] for point in undisturbed.curve()]


@pytest.mark.ray
@pytest.mark.long
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
    assert job.result().seeds[0].status == "failed"  # which the report shows


@pytest.mark.ray
@pytest.mark.full
def test_a_pool_on_one_host_is_queued_again_and_one_on_two_shrinks_and_grows_back(
    make_job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job("lossy")
    # longer than the test: it ends when all has been seen
    train = dataclasses.replace(job.row.train, steps=5000, val_interval=5000, checkpoint_interval=5)
    job.row = dataclasses.replace(job.row, train=train)
    with RayHosts() as hosts:
        both = hosts.add(cpus=2)
        job.start(**hosts.settings)
        job.wait_for_step(8)
        hosts.lose(both)
        job.until(lambda: "waits for a pool of 2 workers" in job.log())
        one = hosts.add(cpus=1)  # room for one worker, which will not do
        time.sleep(6)  # Ray gives up once meanwhile
        assert len(pools(job)) == 1 and "goes on with" not in job.log()

        other = hosts.add(cpus=1)
        job.until(lambda: len(pools(job)) == 2)
        assert (pools(job)[-1].workers, pools(job)[-1].hosts) == (2, 2)
        began = pools(job)[-1].from_step
        job.wait_for_step(began + 8)
        hosts.lose(other)
        by_two = job.curve()
        job.until(lambda: len(pools(job)) == 3)  # while no host comes back
        assert (pools(job)[-1].workers, pools(job)[-1].hosts) == (1, 1)
        assert "goes on with 1 of its 2 workers until the others' places are free again" in job.log()
        shrunk = pools(job)[-1].from_step
        assert began < shrunk < by_two[-1]["step"]  # so some steps are made again
        job.wait_for_step(by_two[-1]["step"])
        assert [point["loss"] for point in job.curve()][shrunk : len(by_two)] == pytest.approx(
            [point["loss"] for point in by_two][shrunk:], rel=1e-5
        )

        hosts.add(cpus=1)
        job.until(lambda: len(pools(job)) == 4)
        grown = pools(job)[-1].from_step
        shutil.copytree(job.run_dir(5), tmp_path / "copy")
        assert pools(job)[-1].workers == 2 and one.poll() is None
        assert "goes on with all 2 workers after its next checkpoint: there is room again" in job.log()
        job.wait_for_step(grown + 5)
    assert job.log().count("lost a worker") == 2

    # the same steps by one worker, from the checkpoint at which it made place for the whole pool
    monkeypatch.setenv("M2F_STORAGE", str(job.storage))
    copy = tmp_path / "copy"
    run = loop.Run(row=job.row, seed=5, run_key=job.run_dir(5).name, run_dir=copy, manifest=job.manifest)
    (copy / "run.json").unlink()  # nothing for MLflow
    (copy / loop.LEAVE).touch()
    with pytest.raises(loop.Left, match=f"left after step {grown + 5}, as it was asked to"):
        loop.train(run)
    alone = read_curve(copy / "curve.jsonl")[grown:]
    assert [point["step"] for point in job.curve()][: grown + 5] == list(range(1, grown + 6))
    assert [point["loss"] for point in alone] == pytest.approx(
        [point["loss"] for point in job.curve()[grown : grown + 5]], rel=1e-5
    )


def pools(job: Job) -> tuple[Pool, ...]:
    """The pools that have made the job's steps in turn."""
    return pools_of(folder) if (folder := job.run_dir(5)) else ()


@pytest.mark.ray
@pytest.mark.long
def test_a_pool_is_reserved_whole_or_not_at_all_and_on_one_host_if_one_has_the_room() -> None:
    code = """
        import collections, os, ray, time
        from ray.util import placement_group, placement_group_table
        from pipeline.compute.resources import Host, resources_for
        from pipeline.params.load import load_params
        from pipeline.training.worker_group import places

        ray.init(log_to_driver=False)
        rows = load_params("params.yaml").rows
        hosts = [Host.of(node["Resources"]) for node in ray.nodes()]
        small, large = (resources_for(rows[name], hosts) for name in ("ade20k_swin-t", "coco_panoptic_swin-l-in22k"))

        def reserved(resources, workers, wait_s):
            group = placement_group([resources.per_worker] * workers, strategy="PACK")
            ready = group.wait(wait_s)
            hosts = placement_group_table(group)["bundles_to_node_id"].values()
            return group, sorted(collections.Counter(hosts).values()) if ready else None

        def free(expected):
            "The GPUs that nobody has, which Ray knows a little later."
            for _ in range(600):
                if (found := ray.available_resources().get("GPU", 0)) == expected:
                    break
                time.sleep(0.5)
            return found

        sixteen, where = reserved(large, 16, 600)
        print(where)
        ray.util.remove_placement_group(sixteen)
        few, _ = reserved(small, 2, 600)
        eight, where = reserved(small, 8, 600)  # 6 and 8 places: on the host that has 8
        print(where)
        print(places(small))
        second, where = reserved(small, 8, 3)  # 6 are free: it holds none of them
        third, also = reserved(small, 8, 3)
        print(where, also, free(6.0))
        ray.util.remove_placement_group(eight)
        while not second.wait(1) and not third.wait(1):
            pass
        print(free(6.0))  # one of the two has all of the eight
        for group in (second, third, few):
            ray.util.remove_placement_group(group)

        os.environ["M2F_ACCELERATOR_TYPE"] = "H100"
        named = resources_for(rows["coco_panoptic_swin-l-in22k"], hosts)
        group, where = reserved(named, named.workers, 600)
        (node,) = {*placement_group_table(group)["bundles_to_node_id"].values()}
        kinds = [node_of["Resources"] for node_of in ray.nodes() if node_of["NodeID"] == node]
        print(where, "accelerator_type:H100" in kinds[0], free(8.0))
    """
    with RayHosts() as hosts:
        for kind in ("A100", "H100"):
            hosts.add(cpus=16, gpus=8, resources=json.dumps({f"accelerator_type:{kind}": 1}))
        answer = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            cwd=PROJECT,
            env={**os.environ, **hosts.settings, "M2F_WORKERS": ""},
            capture_output=True,
            text=True,
        )
    lines = ["[8, 8]", "[8]", "6", "None None 6.0", "6.0", "[8] True 8.0"]
    assert answer.stdout.splitlines() == lines, answer.stderr


def test_a_run_that_is_asked_to_leave_does_so_after_a_checkpoint_and_loses_nothing(
    small_row: Row, small_manifest: Manifest, tmp_path: Path
) -> None:
    def run(name: str) -> loop.Run:  # 6 steps, a checkpoint after every second
        return loop.Run(row=small_row, seed=5, run_key="k", run_dir=tmp_path / name, manifest=small_manifest)

    undisturbed = loop.train(run("undisturbed"))
    asked, leave = run("asked"), tmp_path / "asked" / loop.LEAVE
    asked.run_dir.mkdir()
    leave.touch()
    for step in (2, 3, 4):  # 3: validation saves too
        with pytest.raises(loop.Left, match=f"left after step {step}"):
            loop.train(asked)
        assert [point["step"] for point in read_curve(asked.run_dir / "curve.jsonl")] == list(range(1, step + 1))
    result = loop.train(asked)  # the last step is an end
    assert result is not None and undisturbed is not None and result.metrics == undisturbed.metrics
    losses = [
        [point["loss"] for point in read_curve(tmp_path / name / "curve.jsonl")] for name in ("asked", "undisturbed")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6


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


def test_a_tracking_server_that_was_down_at_the_start_gets_the_curve_at_the_end(
    two_steps: Row, small_data: tuple[Path, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, answers = mlflow_runs.attempt, itertools.chain([False], itertools.repeat(True))
    monkeypatch.setattr(mlflow_runs, "attempt", lambda *call, **how: original(*call, **how) if next(answers) else None)
    (seed,) = train_row(two_steps, manifest=small_data[1], weights=NO_WEIGHTS).seeds
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert [point.step for point in client.get_metric_history(seed.mlflow_run_id, "loss")] == [1, 2]
    assert client.get_run(seed.mlflow_run_id).info.status == "FINISHED"
