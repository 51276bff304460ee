"""Faults of every kind during a training by two workers on two hosts: it ends as it would have ended without them.

Every test trains the same row with the same seed. What it leaves is compared with an undisturbed training: weights and
optimiser bit for bit, the curve, and what MLflow shows. docs/reliability.md has the table that the session ends with. A
killed worker process needs no hosts: tests/pipeline/training/test_worker_group.py.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Sequence

import pytest

from tests.cluster.conftest import CHECKPOINT_INTERVAL, STEPS, Cluster, wait_for
from tests.cluster.hosts import ADDRESSES
from tests.cluster.training import (
    Ending,
    Training,
    check_nothing_is_left_over,
    check_nothing_is_missing_or_double,
    done_twice,
    ending,
    forget,
    last_step,
    result_file,
    run_folder,
)

pytestmark = pytest.mark.cluster

WORKER = "RayTrainWorker"
LOST = r"lost a worker \(\d of 3 times\)"
WAITS = "waits for a worker group of 2 workers"
RESTARTS = "goes on with both workers, or with one until both are there"
FAULT_AT = CHECKPOINT_INTERVAL + 5
"""The step at which faults begin: between two checkpoints."""

Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> Ending:
    """What the training leaves when nothing happens to it."""
    training = begin(cluster, "undisturbed")
    assert training.ends() == 0, training.output()
    end = ending(cluster)
    check_nothing_is_missing_or_double(end)
    assert not training.said(LOST) and done_twice(training) == []
    return end


def begin(cluster: Cluster, name: str) -> Training:
    """Submit the training anew, on a cluster that is whole."""
    cluster.ready()
    forget(cluster)
    return Training(cluster, name)


@pytest.fixture(scope="module")
def spread(cluster: Cluster, undisturbed: Ending) -> float:
    """By how much the final PQ differs between seeds."""
    cluster.ready()
    training = Training(cluster, "seeds", row="faults_seeds")
    assert training.ends() == 0, training.output()
    seeds = json.loads(result_file(cluster, "faults_seeds").read_text())["seeds"]
    figures = [undisturbed.pq, *(seed["metrics"]["pq"] for seed in seeds)]
    return max(figures) - min(figures)


def check(training: Training, undisturbed: Ending, spread: float | None = None) -> Ending:
    """It has finished, and its end is that of the undisturbed training.

    `spread`: of the seeds, where the training may go on with fewer workers. Then its first losses differ by rounding.
    """
    assert training.ends() == 0, training.output()
    end = ending(training.cluster)
    check_nothing_is_missing_or_double(end)
    check_nothing_is_left_over(training.cluster)
    assert all(steps <= CHECKPOINT_INTERVAL for steps in done_twice(training)), training.steps
    if (step := end.shrank) is None:
        assert end.curve == undisturbed.curve
        assert end.weights == undisturbed.weights
    else:
        assert spread is not None, end.worker_groups
        assert end.curve[:step] == undisturbed.curve[:step]
        first, expected = end.curve[step], undisturbed.curve[step]
        assert first == pytest.approx(expected, rel=1e-5)
        assert abs(end.pq - undisturbed.pq) <= spread
    return end


def measured(
    record: Record,
    fault: str,
    promise: str,
    training: Training,
    fault_s: float,
    noticed: str | None = LOST,
    *,
    over_s: float | None = None,
) -> None:
    """Put a line into the table: when the log said it (`noticed`), when a step was made again, the end of the job.

    `over_s`: the end of a fault that nothing notices.
    """
    said = training.said(noticed, fault_s) if noticed else []
    again = training.steps_since(said[0].at_s if said else over_s or fault_s)
    assert training.ended_s is not None and again
    times = (said[0].at_s - fault_s if said else None, again[0][0] - fault_s, training.ended_s - fault_s)
    line(record, fault, promise, times, sum(done_twice(training)))


def line(record: Record, fault: str, promise: str, times_s: Sequence[float | None], twice: int) -> None:
    """A line of the table in docs/reliability.md, which the session ends with."""
    times = ["-" if seconds is None else f"{seconds:.0f} s" for seconds in times_s]
    record("fault", f"| {fault} | {promise} | {' | '.join(times)} | {twice} |")


def workers(cluster: Cluster) -> list[list[int]]:
    """Process ids of the training's workers, host by host."""
    return [cluster.lab.pids(host, WORKER) for host in ("worker1", "worker2")]


@pytest.mark.full
def test_a_link_that_is_out_for_2_seconds_restarts_nothing(
    cluster: Cluster, undisturbed: Ending, record_property: Record
) -> None:
    training = begin(cluster, "link-2")
    training.reaches(FAULT_AT)
    before = workers(cluster)
    cluster.lab.cut("worker1")
    fault_s = time.monotonic()
    time.sleep(2)
    cluster.lab.heal("worker1")
    over_s = time.monotonic()
    training.reaches(FAULT_AT + 20)
    assert workers(cluster) == before and all(len(pids) == 1 for pids in before)
    check(training, undisturbed)
    assert not training.said(f"{LOST}|going on from") and done_twice(training) == []
    measured(
        record_property, "link of a worker out for 2 s", "nothing restarts", training, fault_s, None, over_s=over_s
    )


@pytest.mark.full
def test_a_link_that_is_out_for_15_seconds_costs_no_more_than_a_restart(
    cluster: Cluster, undisturbed: Ending, spread: float, record_property: Record
) -> None:
    training = begin(cluster, "link-15")
    training.reaches(FAULT_AT)
    cluster.lab.cut("worker1")
    fault_s = time.monotonic()
    time.sleep(15)
    cluster.lab.heal("worker1")
    check(training, undisturbed, spread)
    measured(record_property, "link of a worker out for 15 s", RESTARTS, training, fault_s)


@pytest.mark.full
def test_a_killed_raylet_comes_back_with_its_worker(
    cluster: Cluster, undisturbed: Ending, spread: float, record_property: Record
) -> None:
    training = begin(cluster, "raylet")
    training.reaches(FAULT_AT)
    assert cluster.lab.kill("worker1", "raylet") >= 1
    fault_s = time.monotonic()
    check(training, undisturbed, spread)
    measured(
        record_property, "raylet of a worker killed", f"{RESTARTS}; the raylet is started again", training, fault_s
    )


@pytest.mark.full
def test_a_host_that_is_taken_away_after_a_notice_costs_no_more_than_a_restart(
    cluster: Cluster, undisturbed: Ending, spread: float, record_property: Record
) -> None:
    """A spot machine: Ray is told that the node goes, SIGTERM comes, and at the deadline all its processes end."""
    lab = cluster.lab
    training = begin(cluster, "preemption")
    training.reaches(FAULT_AT)
    fault_s = time.monotonic()
    node = "python -c \"import ray; ray.init('auto', log_to_driver=False); print([n['NodeID'] for n in ray.nodes() if "
    node += f"n['Alive'] and n['NodeManagerAddress'] == '{ADDRESSES['worker1']}'][0])\""
    drain = "--reason DRAIN_NODE_REASON_PREEMPTION --reason-message reclaimed --deadline-remaining-seconds 5"
    cluster.head(f"ray drain-node --address {ADDRESSES['head']}:6379 --node-id $({node} | tail -n 1) {drain}")
    lab.kill("worker1", "raylet", signal.SIGTERM)
    time.sleep(5)
    lab.kill("worker1", "ray")
    check(training, undisturbed, spread)
    measured(record_property, "host reclaimed: notice, SIGTERM, 5 s later its end", RESTARTS, training, fault_s)


def test_after_the_loss_of_the_heads_processes_the_job_is_submitted_again_and_goes_on(
    cluster: Cluster, undisturbed: Ending, record_property: Record
) -> None:
    lab = cluster.lab
    first = begin(cluster, "head-1")
    first.reaches(FAULT_AT)
    for name in ("gcs_server", "raylet", "dashboard"):
        assert lab.kill("head", name) >= 1, name
    fault_s = time.monotonic()
    cluster.up()
    cluster.ready()
    furthest = last_step(cluster)  # the workers may have gone on for a while without the head
    again = Training(cluster, "head-2")
    assert again.ends() == 0, again.output()
    goes_on = again.said(r"going on from step \d+")
    if not goes_on:  # the workers have made the last step without the head: MLflow alone may lack something
        cluster.head("cd ~/m2f && python -m stages.track faults")
    check(again, undisturbed)
    start = int(goes_on[0].text.split()[-1]) if goes_on else STEPS
    assert 0 <= furthest - start <= CHECKPOINT_INTERVAL
    assert again.ended_s is not None
    steps = again.steps_since(0)
    times = [again.begun_s - fault_s, steps[0][0] - fault_s if steps else None, again.ended_s - fault_s]
    promise = "after `up` the job is submitted again (first time) and goes on"
    line(record_property, "head: all of Ray's processes killed", promise, times, furthest - start)


@pytest.mark.full
def test_a_tracking_server_that_is_away_costs_no_step_and_is_brought_up_to_date(
    cluster: Cluster, undisturbed: Ending, record_property: Record
) -> None:
    lab = cluster.lab
    start = f"bash ~/m2f-upload/pipeline/cluster/tracking_server.sh {ADDRESSES['head']}"
    training = begin(cluster, "tracking")
    training.reaches(FAULT_AT)
    for name in ("tracking_server.sh", "mlflow server", "uvicorn"):  # the first would start it again
        assert lab.kill("head", name) >= 1, name
    fault_s = time.monotonic()
    try:
        assert training.ends() == 0, training.output()
    finally:
        cluster.head(start)
    assert not training.said(LOST) and done_twice(training) == []
    assert "2 of 2 runs are up to date" in cluster.head("cd ~/m2f && python -m stages.track faults")
    check(training, undisturbed)
    promise = "the training waits for nobody; `python -m stages.track` brings MLflow up to date"
    measured(record_property, "MLflow server killed, back after the end", promise, training, fault_s, "kept on disk")

    lab.kill("head", "uvicorn")  # alone: it is started again
    probe = f"timeout 1 bash -c 'exec 3<>/dev/tcp/{ADDRESSES['head']}/5000' 2>/dev/null && echo open || echo closed"
    wait_for("the server's end", lambda: "closed" in cluster.head(probe))
    wait_for("the server", lambda: "open" in cluster.head(probe))


@pytest.mark.full
def test_a_full_disk_ends_the_job_with_a_sentence_and_the_same_again_goes_on(
    cluster: Cluster, undisturbed: Ending, record_property: Record
) -> None:
    first = begin(cluster, "full-1")
    first.reaches(FAULT_AT)
    with cluster.lab.full():
        fault_s = time.monotonic()
        assert first.ends() != 0
    noticed = first.said("could not be written, for its disk is full; make room", fault_s)
    assert noticed, first.output()
    (kept,) = [path.name for path in (run_folder(cluster) / "checkpoints").iterdir()]  # a whole one, and no half
    step = int(kept.removeprefix("step-").removesuffix(".safetensors"))

    freed_s = time.monotonic()
    again = Training(cluster, "full-2")
    check(again, undisturbed)
    assert again.said(f"going on from step {step}$")
    furthest = max(step for _, step in first.steps)
    assert again.ended_s is not None
    times = [noticed[0].at_s - fault_s, again.steps_since(0)[0][0] - freed_s, again.ended_s - freed_s]
    promise = "the job ends with a sentence; submitted again when there is room (other times: since then), it goes on"
    line(record_property, "disk of the storage root full", promise, times, furthest - step)


@pytest.mark.full
def test_a_training_whose_host_is_cut_off_for_good_goes_on_with_one_worker_and_grows_back_when_it_returns(
    cluster: Cluster, undisturbed: Ending, spread: float, record_property: Record
) -> None:
    lab = cluster.lab
    training = begin(cluster, "link-for-good")
    training.reaches(FAULT_AT)
    lab.cut("worker1")
    fault_s = time.monotonic()
    try:
        shrinks = wait_for("one worker", lambda: training.said("goes on with 1 of its 2 workers", fault_s))
        assert shrinks[0].at_s - fault_s < 60
        wait_for("steps of one worker", lambda: training.steps_since(shrinks[0].at_s))
        # held until the other host is back, for the rest of this short training might be over before
        (alone,) = lab.pids("worker2", WORKER)
        os.kill(alone, signal.SIGSTOP)
    finally:
        lab.heal("worker1")
    try:
        wait_for("room", lambda: training.said("goes on with all 2 workers after its next checkpoint"))
    finally:
        os.kill(alone, signal.SIGCONT)
    end = check(training, undisturbed, spread)
    assert [workers for _, workers in end.worker_groups] == [2, 1, 2]
    promise = "one worker goes on within a minute; two again when the host is back"
    measured(
        record_property, "link of a worker cut for good, healed once one worker trains", promise, training, fault_s
    )


def test_down_leaves_nothing_behind(cluster: Cluster, undisturbed: Ending) -> None:
    """Of all these trainings: no process but the tracking server, no shared memory, no note of Ray."""
    lab = cluster.lab
    cluster.down()
    assert cluster.ray_is_running() == []
    for host in ("head", "worker1", "worker2"):
        for name in ("ray::", "stages.train", "pipeline/submit.py", "dvc"):
            assert lab.pids(host, name) == [], (host, name)
        assert lab.on(host, "ls -A /dev/shm").stdout == "", host
    check_nothing_is_left_over(cluster)
