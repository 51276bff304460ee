"""The seeds of a row as trials of Ray Tune: what one seed meets leaves the others."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError

from m2f.losses import Divergence
from pipeline.compute.ray_session import ray_storage
from pipeline.compute.resources import Resources
from pipeline.cost.speed import refuse_if_too_costly
from pipeline.params.load import load_params
from pipeline.params.schema import Row
from pipeline.provenance.run_key import run_key
from pipeline.runs.checkpoints import save_checkpoint, save_model
from pipeline.runs.outcome import pools_of, write_pools
from pipeline.runs.run import Run
from pipeline.storage.files import sha256
from pipeline.storage.results import Manifest
from pipeline.storage.root import storage_root
from pipeline.tracking.client import mlflow_client
from pipeline.training import worker_group
from pipeline.training.elastic import sized
from pipeline.training.loop import Left
from pipeline.training.seeds import _worker_s, _workers, train_row
from tests.helpers.made_up import pool
from tests.helpers.ray_hosts import RayHosts
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
def test_of_three_seeds_one_is_killed_and_one_fails_and_the_next_run_trains_the_failed_one_alone(
    make_job: Callable[..., Job],
) -> None:
    quiet = make_job("quiet", workers=1, seeds=SEEDS)
    quiet.start()
    assert [seed.status for seed in quiet.wait().seeds] == ["finished"] * 3
    lines = quiet.log().splitlines()
    assert f"small: 3 seeds to train on {pools()} pools of 1 worker with 1 core" in lines
    for seed in SEEDS:
        assert any(line.startswith(f"small seed {seed}: step 24: validation PQ") for line in lines)
    # nothing but our own lines: no boxes, no words of Ray's
    assert [line for line in lines if not line.startswith(("small: ", "small seed "))] == []

    job = make_job("faults", workers=1, seeds=SEEDS)
    foreign = spoil(job, 2)
    job.start()
    job.wait_for_step(9, seed=1)
    job.workers()[0].send_signal(signal.SIGKILL)
    first, second, third = job.wait().seeds
    assert [first.status, second.status, third.status] == ["finished", "failed", "finished"]
    assert "belongs to run another, not to" in second.reason
    assert "small seed 2: failed: checkpoint " in job.log()
    assert "lost a worker (1 of 3 times)" in job.log() and "going on from step" in job.log()
    assert job.weights(1) == quiet.weights(1) and job.weights(3) == quiet.weights(3)

    folders = [job.run_dir(1), job.run_dir(3)]
    before = [digests(folder) for folder in folders if folder]
    foreign.unlink()
    job.start()
    seeds = job.wait().seeds
    assert [seed.status for seed in seeds] == ["finished"] * 3 and (seeds[0], seeds[2]) == (first, third)
    assert job.weights(2) == quiet.weights(2)
    assert [digests(folder) for folder in folders if folder] == before
    assert "small: 1 seed to train on one pool of 1 worker with 1 core" in job.log()
    assert list(job.storage.glob("runs/*/ray")) == []


def pools() -> int:
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
    with RayHosts(head_cpus=2) as hosts:
        yield hosts.settings


@pytest.mark.ray
@pytest.mark.full
def test_seeds_take_turns_on_one_pool_and_wait_for_it_while_another_row_has_it_saying_for_what(
    make_job: Callable[..., Job], cluster: dict[str, str]
) -> None:
    job = make_job("job", seeds=(1, 2))
    with other_row(cluster):
        job.start(**cluster)
        job.until(lambda: "waits for a pool" in job.log())
        time.sleep(12)  # Ray gives up twice meanwhile
        waiting = "small seed 1: waits for a pool of 2 workers with 1 core each; 0 of the cluster's 2 cores are free"
        assert job.log().splitlines()[-1] == waiting
    assert [seed.status for seed in job.wait().seeds] == ["finished", "finished"]
    said = job.log()  # the second seed queued: its first line comes after the first one's last
    assert "small: 2 seeds to train on one pool of 2 workers with 1 core each" in said
    assert said.index("small seed 1: step 24: validation") < said.index("small seed 2: ")
    assert said.count("waits for a pool") == 1


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


def test_one_seed_alone_has_the_key_that_it_has_among_the_others(
    two_steps: Row, small_data: tuple[Path, Manifest]
) -> None:
    row = dataclasses.replace(two_steps, seeds=(1, 2))
    (alone,) = train_row(row, manifest=small_data[1], weights=NO_WEIGHTS, only=2).seeds
    both = train_row(row, manifest=small_data[1], weights=NO_WEIGHTS).seeds
    assert both[1] == alone and both[0].run_key != alone.run_key


# What follows a failure


def lost() -> WorkerGroupError:
    return WorkerGroupError("", {0: RuntimeError("[enforce fail at gloo/transport/tcp/pair.cc] Connection closed"),
                                 1: WorkerHealthCheckFailedError("", ActorDiedError())})  # fmt: skip


def test_a_dead_worker_explains_the_broken_connections_of_the_others() -> None:
    assert worker_group.what_failed(lost())[0] == "lost"
    alone = WorkerGroupError("", {0: RuntimeError("[enforce fail at gloo/transport/tcp/pair.cc] Connection closed")})
    assert worker_group.what_failed(alone)[0] == "lost"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("wrong"), "final"),
        (FileNotFoundError("gone"), "final"),
        (Divergence("nan"), "final"),
        (torch.OutOfMemoryError("CUDA out of memory"), "final"),
        (OSError(5, "Input/output error"), "bug"),
        (KeyError("typo"), "bug"),
    ],
)
def test_what_a_retry_would_meet_again_is_final_and_a_bug_is_not_a_lost_worker(error: Exception, kind: str) -> None:
    assert worker_group.what_failed(WorkerGroupError("", {0: error})) == (kind, error)


def test_what_a_library_guesses_about_a_loss_is_left_out(small_run: Run) -> None:
    error = RuntimeError(
        "Traceback:\n[gloo/transport/tcp/pair.cc:561] Connection closed by peer [10.0.0.2]:17033. This is typically "
        "caused by a remote worker crashing."
    )
    said = worker_group.sentence(error, small_run)
    assert said == "RuntimeError: [gloo/transport/tcp/pair.cc:561] Connection closed by peer [10.0.0.2]:17033."


def test_a_pool_that_does_not_get_free_in_time_is_no_failure() -> None:
    assert worker_group.what_failed(ControllerError(WorkerGroupStartupTimeoutError(2)))[0] == "no pool"
    assert worker_group.what_failed(ControllerError(RuntimeError("x")))[0] == "lost"


@pytest.fixture
def small_run(two_steps: Row, small_data: tuple[Path, Manifest], tmp_path: Path) -> Run:
    """A run that has not begun."""
    run = Run(row=two_steps, seed=1, run_key="k", run_dir=tmp_path / "run", manifest=small_data[1])
    (run.run_dir / "checkpoints").mkdir(parents=True)
    return run


@pytest.fixture
def failing(small_run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str | None, int]]:
    """Calls the retries with a list of failures in turn, each with the steps saved by then: (reason, launches)."""
    run = small_run
    monkeypatch.setattr(worker_group, "pool_is_free", lambda resources: True)
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
        worker_group._train_on_pool(run, pool_of(2), None)  # type: ignore[arg-type]
        note = run.run_dir / "failed.json"
        return (json.loads(note.read_text())["reason"] if note.exists() else None), launches

    return go


def pool_of(workers: int) -> Resources:
    return Resources(workers=workers, use_gpu=False, cpus_per_worker=1, loader_processes=0, groups_at_once=None)


def test_lost_workers_are_replaced_three_times_in_a_row_but_not_counted_when_the_training_got_further(
    failing: Callable[..., tuple[str | None, int]],
) -> None:
    reason, launches = failing(*[(lost(), 4)] * 2, *[(lost(), 8)] * 3)  # 2 without and 3 with step 8: one got further
    assert (reason, launches) == (None, 6)
    reason, launches = failing(*[(lost(), 8)] * 5)
    assert reason is not None and reason.startswith("lost its workers 4 times without getting further")
    assert launches == 4


def test_a_bug_is_tried_once_more_and_waiting_for_a_pool_does_not_count(
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
    assert "set M2F_GROUPS_AT_ONCE below that, or use more workers (CUDA out of memory. Tried" in reason


# How many workers go on


LEFT = WorkerGroupError("", {0: Left("left after step 4"), 1: RuntimeError("gloo/x.cc Connection closed")})
NO_POOL = ControllerError(WorkerGroupStartupTimeoutError(2))
NO_MEMORY = WorkerGroupError("", {0: torch.OutOfMemoryError("CUDA out of memory")})


@pytest.mark.parametrize(
    ("hosts", "failures", "room", "launches"),
    [
        # on two hosts: 4 workers, 2 after a loss, the whole pool when it was asked to leave for it
        (2, [lost(), LEFT], [2], [4, 2, 4]),
        # a lost process: its place is there
        (2, [lost()], [4], [4, 4]),
        # nothing is left: it waits for its pool, and takes what there is by then
        (2, [lost(), NO_POOL, NO_POOL], [0, 0, 1], [4, 4, 4, 1]),
        # another row was quicker to take the whole pool's places
        (2, [lost(), LEFT, NO_POOL], [2, 1], [4, 2, 4, 1]),
        # what is left has not the memory: only the whole pool will do, also after another loss
        (2, [lost(), NO_MEMORY, NO_POOL, lost()], [1], [4, 1, 4, 4, 4]),
        # on one host, or before it ever had a pool: the whole pool only
        (1, [lost(), NO_POOL, lost()], [], [4, 4, 4, 4]),
        (0, [NO_POOL, NO_POOL], [], [4, 4, 4]),
    ],
)
def test_a_pool_of_several_hosts_goes_on_with_what_is_left_and_another_waits_for_all_of_it(
    hosts: int,
    failures: list[Exception],
    room: list[int],
    launches: list[int],
    small_run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts, began, errors = iter(room), [], iter(failures)

    def fit(run: Run, resources: Resources, lines: Any) -> None:
        began.append(resources.workers)
        if hosts:
            write_pools(run.run_dir, [pool(workers=4, hosts=hosts)])
        if (error := next(errors, None)) is not None:
            raise error

    monkeypatch.setattr(worker_group, "_fit", fit)
    monkeypatch.setattr(worker_group, "growing", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(worker_group, "pool_is_free", lambda resources: True)
    monkeypatch.setattr(worker_group, "say_it_waits", lambda run, resources: time.monotonic())
    monkeypatch.setattr(worker_group, "places", lambda resources: next(counts))
    worker_group._train_on_pool(small_run, pool_of(4), None)  # type: ignore[arg-type]
    assert began == launches and list(counts) == []
    assert not (small_run.run_dir / "failed.json").exists()


def test_fewer_workers_take_no_more_groups_at_once_than_the_whole_pool_did(small_run: Run) -> None:
    # 4 groups: one each for 4 workers, so one at once for 3 of them; two each for 2
    assert sized(small_run, pool_of(4), 3).groups_at_once == 1
    assert sized(small_run, pool_of(2), 1).groups_at_once == 2
    assert sized(small_run, pool_of(4), 4) is small_run
    few = dataclasses.replace(small_run, groups_at_once=1)
    assert sized(few, pool_of(2), 1) is few
    # batch statistics are of the whole step: all of a worker's groups go through together
    row = load_params(PROJECT / "params.yaml").rows["ade20k_r50"]
    synchronised = dataclasses.replace(small_run, row=row)
    assert sized(synchronised, pool_of(8), 4) is synchronised


def test_pools_are_noted_in_turn_without_those_whose_steps_are_lost(small_run: Run) -> None:
    def noted() -> list[tuple[int, int, int]]:
        return [(pool.from_step, pool.workers, pool.hosts) for pool in pools_of(small_run.run_dir)]

    worker_group.note_pool(small_run, "a")
    worker_group.note_pool(small_run, "a")  # lost before its first checkpoint
    assert noted() == [(0, 1, 1)]
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    state = {"train_s": 60.0}
    save_checkpoint(small_run.run_dir, step=4, run_key="k", model=model, optimizer=optimizer, state=state)
    worker_group.note_pool(small_run, "a")
    assert noted() == [(0, 1, 1), (4, 1, 1)]
    assert [pool.train_s for pool in pools_of(small_run.run_dir)] == [0.0, 60.0]
    assert worker_group._workers_in_turn(small_run) == {}
    counts = [(0, 16), (4000, 8), (5000, 8), (7000, 16)]
    write_pools(small_run.run_dir, [pool(workers=workers, from_step=step) for step, workers in counts])
    assert worker_group._workers_in_turn(small_run) == {"m2f.workers": "16, 8 from step 4000, 16 from step 7000"}


def test_the_workers_of_a_result_are_those_that_made_the_most_of_its_steps() -> None:
    def of(*pools: tuple[int, int]) -> int | None:
        return _workers([pool(from_step=step, workers=workers) for step, workers in pools], 100)

    assert of((0, 8)) == 8
    assert of((0, 8), (30, 4)) == 4  # 30 and 70 steps
    assert of((0, 8), (30, 4), (60, 8)) == 8  # 30 + 40 and 30
    assert of((0, 4), (50, 8)) == 8  # 50 and 50: the larger
    assert of() is None


def test_the_time_of_a_training_is_counted_for_the_workers_of_each_of_its_pools() -> None:
    # 60 s on 8 workers, 30 s on 4 and 10 s on 8 again: 480 + 120 + 80
    pools = [pool(train_s=train_s, workers=workers) for train_s, workers in ((0.0, 8), (60.0, 4), (90.0, 8))]
    assert _worker_s(pools, 100.0) == 680.0


def test_a_training_in_this_process_says_so_in_its_result(two_steps: Row, small_data: tuple[Path, Manifest]) -> None:
    (seed,) = train_row(two_steps, manifest=small_data[1], weights=NO_WEIGHTS).seeds
    (only,) = seed.pools
    assert (seed.workers, only.from_step, only.workers, only.hosts) == (1, 0, 1, 1)
    assert only.devices == (seed.environment.device,) and seed.worker_s == seed.train_s > 0


def test_ray_keeps_its_notes_in_a_folder_or_a_file_system_of_its_own(tmp_path: Path) -> None:
    assert ray_storage(tmp_path / "ray") == {"storage_path": f"{tmp_path}/ray", "storage_filesystem": None}


def test_a_seed_that_would_cost_more_gpu_hours_than_its_row_allows_does_not_start(tmp_path: Path) -> None:
    rows = load_params(PROJECT / "params.yaml").rows
    row = rows["cityscapes_r50"]  # nothing is measured here: its published speed, 9.17 fps on an A100, tells
    with pytest.raises(ValueError, match=r"about \d+ GPU-hours \(by published speed .* set rows.cityscapes_r50"):
        refuse_if_too_costly(row, tmp_path)
    refuse_if_too_costly(dataclasses.replace(row, max_gpu_hours=1000.0), tmp_path)
    refuse_if_too_costly(rows["shapes_tiny"], tmp_path)  # nobody knows its speed on a GPU: its first steps will judge
