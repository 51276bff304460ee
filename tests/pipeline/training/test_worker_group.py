"""Training under Ray Train: a killed worker and a killed job end with the weights of an undisturbed run."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from pipeline.compute.resources import Resources
from pipeline.params.schema import Row
from pipeline.runs.checkpoints import save_checkpoint
from pipeline.runs.curve_file import read_curve
from pipeline.runs.outcome import run_status, worker_groups_of, write_worker_groups
from pipeline.runs.run import Run
from pipeline.storage.results.data import Manifest
from pipeline.storage.results.rows import WorkerGroupSpan
from pipeline.tracking import mlflow_runs
from pipeline.training import loop, worker_group
from pipeline.training.loop import YieldRequested
from pipeline.training.seeds import train_row
from tests.helpers.made_up import span
from tests.helpers.ray_nodes import RayNodes, times_ray_gave_up
from tests.helpers.train_process import STEPS, Job
from tests.helpers.worker_groups import group_of, lost
from tests.pipeline.conftest import NO_WEIGHTS


@pytest.mark.ray
@pytest.mark.long
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
    furthest = killed.curve()[-1]["step"]
    killed.start()
    (seed,) = killed.wait().seeds
    assert seed.status == "finished"
    goes_on = [int(line.split()[-1]) for line in killed.log().splitlines() if "going on from step" in line]
    assert len(goes_on) == 2 and 0 <= furthest - goes_on[1] <= killed.row.train.checkpoint_interval

    assert killed.weights() == undisturbed.weights()
    steps = list(range(1, STEPS + 1))
    assert [point["step"] for point in killed.curve()] == steps
    assert [point["loss"] for point in killed.curve()] == [point["loss"] for point in undisturbed.curve()]
    shown = MlflowClient(f"sqlite:///{killed.folder}/mlflow.db").get_metric_history(seed.mlflow_run_id, "train/loss")
    assert sorted(point.step for point in shown) == steps
    names = [path.name for path in killed.storage.rglob("*")]
    assert [name for name in names if name == "ray" or name.endswith((".part", ".damaged"))] == []


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
def test_a_worker_group_on_one_node_is_queued_again_and_one_on_two_shrinks_and_grows_back(
    make_job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job("lossy")
    # longer than the test: it ends when all has been seen
    train = dataclasses.replace(job.row.train, steps=5000, val_interval=5000, checkpoint_interval=5)
    job.row = dataclasses.replace(job.row, train=train)
    with RayNodes() as nodes:
        both = nodes.add(cpus=2)
        job.start(**nodes.settings)
        job.wait_for_step(8)
        nodes.lose(both)
        job.until(lambda: "waits for a worker group of 2 workers" in job.log())
        before = times_ray_gave_up(nodes.folder)
        one = nodes.add(cpus=1)  # room for one worker, which will not do
        job.until(lambda: times_ray_gave_up(nodes.folder) > before)
        assert len(worker_groups(job)) == 1 and "goes on with" not in job.log()

        other = nodes.add(cpus=1)
        job.until(lambda: len(worker_groups(job)) == 2)
        assert (worker_groups(job)[-1].workers, worker_groups(job)[-1].nodes) == (2, 2)
        began = worker_groups(job)[-1].from_step
        job.wait_for_step(began + 8)
        nodes.lose(other)
        by_two = job.curve()
        job.until(lambda: len(worker_groups(job)) == 3)  # while no node comes back
        assert (worker_groups(job)[-1].workers, worker_groups(job)[-1].nodes) == (1, 1)
        assert "goes on with 1 of its 2 workers until the others' places are free again" in job.log()
        shrunk = worker_groups(job)[-1].from_step
        assert began < shrunk < by_two[-1]["step"]  # so some steps are made again
        job.wait_for_step(by_two[-1]["step"])
        assert [point["loss"] for point in job.curve()][shrunk : len(by_two)] == pytest.approx(
            [point["loss"] for point in by_two][shrunk:], rel=1e-5
        )

        nodes.add(cpus=1)
        job.until(lambda: len(worker_groups(job)) == 4)
        grown = worker_groups(job)[-1].from_step
        shutil.copytree(job.run_dir(5), tmp_path / "copy")
        assert worker_groups(job)[-1].workers == 2 and one.poll() is None
        assert "goes on with all 2 workers after its next checkpoint: there is room again" in job.log()
        job.wait_for_step(grown + 5)
    assert job.log().count("lost a worker") == 2

    # the same steps by one worker, from the checkpoint at which it made place for the whole worker group
    monkeypatch.setenv("M2F_STORAGE", str(job.storage))
    copy = tmp_path / "copy"
    run = loop.Run(row=job.row, seed=5, run_key=job.run_dir(5).name, run_dir=copy, manifest=job.manifest)
    (copy / "run.json").unlink()  # nothing for MLflow
    (copy / loop.YIELD).touch()
    with pytest.raises(loop.YieldRequested, match=f"yielded after step {grown + 5}, as it was asked to"):
        loop.train(run)
    alone = read_curve(copy / "curve.jsonl")[grown:]
    assert [point["step"] for point in job.curve()][: grown + 5] == list(range(1, grown + 6))
    assert [point["loss"] for point in alone] == pytest.approx(
        [point["loss"] for point in job.curve()[grown : grown + 5]], rel=1e-5
    )


def worker_groups(job: Job) -> tuple[WorkerGroupSpan, ...]:
    """The worker groups that have made the job's steps in turn."""
    return worker_groups_of(folder) if (folder := job.run_dir(5)) else ()


def test_a_tracking_server_that_was_down_at_the_start_gets_the_curve_at_the_end(
    two_steps: Row, small_data: tuple[Path, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, answers = mlflow_runs.attempt, itertools.chain([False], itertools.repeat(True))
    monkeypatch.setattr(mlflow_runs, "attempt", lambda *call, **how: original(*call, **how) if next(answers) else None)
    (seed,) = train_row(two_steps, manifest=small_data[1], weights=NO_WEIGHTS).seeds
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert [point.step for point in client.get_metric_history(seed.mlflow_run_id, "train/loss")] == [1, 2]
    assert client.get_run(seed.mlflow_run_id).info.status == "FINISHED"


# What follows a failure


@pytest.fixture
def failing(small_run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str | None, int]]:
    """Calls the retries with a list of failures in turn, each with the steps saved by then: (reason, launches)."""
    run = small_run
    monkeypatch.setattr(worker_group, "group_fits", lambda resources: True)
    monkeypatch.setattr(worker_group, "say_it_waits", lambda run, resources: time.monotonic())

    def go(*failures: tuple[BaseException, int]) -> tuple[str | None, int]:
        launches = 0

        def fit(*_: Any) -> None:
            nonlocal launches
            launches += 1
            if launches <= len(failures):
                error, step = failures[launches - 1]
                (run.run_dir / f"checkpoints/step-{step:08d}.safetensors").touch()
                raise error

        monkeypatch.setattr(worker_group, "_fit", fit)
        worker_group._train_on_group(run, group_of(2), None)  # type: ignore[arg-type]
        note = run.run_dir / "failed.json"
        return (json.loads(note.read_text())["reason"] if note.exists() else None), launches

    return go


def test_lost_workers_are_replaced_three_times_in_a_row_but_not_counted_when_the_training_got_further(
    failing: Callable[..., tuple[str | None, int]],
) -> None:
    reason, launches = failing(*[(lost(), 4)] * 2, *[(lost(), 8)] * 3)  # 2 without and 3 with step 8: one got further
    assert (reason, launches) == (None, 6)
    reason, launches = failing(*[(lost(), 8)] * 5)
    assert reason is not None and reason.startswith("lost its workers 4 times without getting further")
    assert launches == 4


def test_a_bug_is_tried_once_more_and_waiting_for_a_worker_group_does_not_count(
    failing: Callable[..., tuple[str | None, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    bug, waiting = WorkerGroupError("", {0: KeyError("typo")}), ControllerError(WorkerGroupStartupTimeoutError(2))
    assert failing((bug, 4), *[(waiting, 4)] * 9) == (None, 11)
    assert failing((bug, 4), (bug, 8))[0] == "KeyError: 'typo', and again when it was tried once more"
    assert "failed, and is tried once more: KeyError: 'typo'" in capsys.readouterr().err


def test_a_gpu_without_enough_memory_ends_in_a_sentence_with_the_setting(
    failing: Callable[..., tuple[str | None, int]],
) -> None:
    memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
    reason, launches = failing((WorkerGroupError("", {1: memory}), 4))
    assert launches == 1 and reason is not None
    advice = "set M2F_GROUPS_AT_ONCE below that or M2F_CHECKPOINT_ACTIVATIONS to 1, or use more workers"
    assert f"{advice} (CUDA out of memory. Tried" in reason


# How many workers go on


YIELDED = WorkerGroupError(
    "", {0: YieldRequested("yielded after step 4"), 1: RuntimeError("gloo/x.cc Connection closed")}
)
NO_ROOM = ControllerError(WorkerGroupStartupTimeoutError(2))
NO_MEMORY = WorkerGroupError("", {0: torch.OutOfMemoryError("CUDA out of memory")})


@pytest.mark.parametrize(
    ("nodes", "failures", "room", "launches"),
    [
        # on two nodes: 4 workers, 2 after a loss, the whole worker group when it was asked to yield for it
        (2, [lost(), YIELDED], [2], [4, 2, 4]),
        # a lost process: its place is there
        (2, [lost()], [4], [4, 4]),
        # nothing is left: it waits for its worker group, and takes what there is by then
        (2, [lost(), NO_ROOM, NO_ROOM], [0, 0, 1], [4, 4, 4, 1]),
        # another row was quicker to take the whole worker group's places
        (2, [lost(), YIELDED, NO_ROOM], [2, 1], [4, 2, 4, 1]),
        # what is left has not the memory: only the whole worker group will do, also after another loss
        (2, [lost(), NO_MEMORY, NO_ROOM, lost()], [1], [4, 1, 4, 4, 4]),
        # on one node, or before it ever had a worker group: the whole worker group only
        (1, [lost(), NO_ROOM, lost()], [], [4, 4, 4, 4]),
        (0, [NO_ROOM, NO_ROOM], [], [4, 4, 4]),
    ],
)
def test_a_worker_group_of_several_nodes_goes_on_with_what_is_left_and_another_waits_for_all_of_it(
    nodes: int,
    failures: list[Exception],
    room: list[int],
    launches: list[int],
    small_run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts, began, errors = iter(room), [], iter(failures)

    def fit(run: Run, resources: Resources, lines: Any) -> None:
        began.append(resources.workers)
        if nodes:
            write_worker_groups(run.run_dir, [span(workers=4, nodes=nodes)])
        if (error := next(errors, None)) is not None:
            raise error

    monkeypatch.setattr(worker_group, "_fit", fit)
    monkeypatch.setattr(worker_group, "growing", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(worker_group, "group_fits", lambda resources: True)
    monkeypatch.setattr(worker_group, "say_it_waits", lambda run, resources: time.monotonic())
    monkeypatch.setattr(worker_group, "places", lambda resources: next(counts))
    worker_group._train_on_group(small_run, group_of(4), None)  # type: ignore[arg-type]
    assert began == launches and list(counts) == []
    assert not (small_run.run_dir / "failed.json").exists()


def test_worker_groups_are_noted_in_turn_without_those_whose_steps_are_lost(small_run: Run) -> None:
    def noted() -> list[tuple[int, int, int]]:
        return [(span.from_step, span.workers, span.nodes) for span in worker_groups_of(small_run.run_dir)]

    worker_group.note_worker_group(small_run, "a")
    worker_group.note_worker_group(small_run, "a")  # lost before its first checkpoint
    assert noted() == [(0, 1, 1)]
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    state = {"train_s": 60.0}
    save_checkpoint(small_run.run_dir, step=4, run_key="k", model=model, optimizer=optimizer, state=state)
    worker_group.note_worker_group(small_run, "a")
    assert noted() == [(0, 1, 1), (4, 1, 1)]
    assert [span.train_s for span in worker_groups_of(small_run.run_dir)] == [0.0, 60.0]
    assert worker_group._workers_in_turn(small_run) == {}
    counts = [(0, 16), (4000, 8), (5000, 8), (7000, 16)]
    write_worker_groups(small_run.run_dir, [span(workers=workers, from_step=step) for step, workers in counts])
    assert worker_group._workers_in_turn(small_run) == {"m2f.workers": "16, 8 from step 4000, 16 from step 7000"}


def test_a_gpu_that_torch_cannot_use_fails_a_training_instead_of_leaving_it_to_the_cpu(
    small_run: Run, old_driver: None
) -> None:
    alone = Resources(workers=0, use_gpu=True, cpus_per_worker=1, loader_processes=0, groups_at_once=None)
    worker_group.train_seed(small_run, alone)
    end = run_status(small_run.run_dir)
    assert end is not None and end.status == "failed" and end.reason is not None
    assert "cannot use the GPU of host" in end.reason and "is too old" in end.reason
