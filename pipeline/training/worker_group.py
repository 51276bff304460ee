"""One seed from its start, or from where it stopped, to its end: the driver of its Ray Train runs.

Ray Train launches the loop on a worker group and ranks the workers. What follows a failure is decided here, because Ray
counts a lost worker and a bug alike: lost workers are replaced, what the user must mend and a divergence are final.

A training starts with its whole worker group. One whose worker group spanned several nodes goes on, after a loss, with
the workers that fit on what is left, and with the whole worker group again once the rest is free; one on a single node
waits for a whole worker group. Each is another Ray Train run from the newest checkpoint: Ray's own elastic runs would
also start small, resize at any moment instead of after a checkpoint, and shrink every worker group.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.compute.ray_session import connect, ray_storage
from pipeline.compute.resources import Resources, check_gpu
from pipeline.params.tasks import LABELS, primary
from pipeline.runs.outcome import (
    Failed,
    Finished,
    Launch,
    Stopped,
    forget_note,
    note_of,
    run_status,
    worker_groups_of,
    write_note,
    write_worker_groups,
)
from pipeline.runs.run import run_name, say
from pipeline.storage.results.rows import WorkerGroupSpan
from pipeline.storage.stores import StoredPath
from pipeline.training.elastic import (
    Decision,
    End,
    WorkerGroup,
    after,
    counted,
    group_fits,
    growing,
    is_to_say_it_waits,
    places,
    say_it_waits,
    sized,
)
from pipeline.training.failures import fail, sentence, what_failed

if TYPE_CHECKING:
    from ray.util.queue import Queue

    from pipeline.runs.run import Run


_RAY_TRAIN = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how often the controller looks at its workers
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",  # how long it waits for a worker group before it comes back to us
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it says every line twice
}


def train_seed(run: Run, resources: Resources, lines: Queue | None = None) -> None:
    """Bring one seed to its end; the run folder says which (pipeline.runs.outcome).

    `lines`: where workers send what they have to say (pipeline.compute.worker_output). Without workers the loop runs in
    this process, where a bug ends in its traceback.
    """
    from pipeline.runs.checkpoints import set_aside_without_best
    from pipeline.runs.run import YIELD
    from pipeline.tracking import mlflow_runs

    run_dir = run.run_dir
    set_aside_without_best(run_dir)
    workers = max(1, resources.workers)
    run_id = open_tracked(run, workers)
    launched = Launch(mlflow_run_id=run_id, workers=workers)
    write_note(run_dir, launched)
    for note in (Failed, Stopped):
        forget_note(run_dir, note)
    (run_dir / YIELD).unlink(missing_ok=True)
    run = dataclasses.replace(run, mlflow_run_id=run_id)
    if resources.workers == 0:
        _train_here(run, resources)
    else:
        assert lines is not None
        _train_on_group(run, resources, lines)
    end = run_status(run_dir)
    status = end.status if end else "failed"
    if end is not None and end.reason is not None:
        say(run, f"{status}: {end.reason}")
    run_id = mlflow_runs.catch_up(run_dir, status=status, tags=_below_reference(run) | _workers_in_turn(run)) or run_id
    write_note(run_dir, dataclasses.replace(launched, mlflow_run_id=run_id))


def open_tracked(run: Run, workers: int) -> str | None:
    """The seed's MLflow run, made if there is none; None while no server answers."""
    from pipeline.tracking import mlflow_runs

    assert run.manifest is not None
    return mlflow_runs.open_training(
        run.run_dir, run.row, seed=run.seed, run_key=run.run_key, manifest=run.manifest, workers=workers
    )


def _below_reference(run: Run) -> dict[str, str]:
    """The tag of the last warning that the training was clearly below its reference, if there was one."""
    from pipeline.training.early_warning import warning

    end = note_of(run.run_dir, Finished) or note_of(run.run_dir, Stopped)
    if end is None or not end.below_reference:
        return {}
    return {"m2f.below_reference": warning(end.below_reference[-1], LABELS[primary(run.row.task)])}


def _workers_in_turn(run: Run) -> dict[str, str]:
    """The tag that says how many workers there were, where the number has changed: 16, 8 from step 4000."""
    worker_groups = worker_groups_of(run.run_dir)
    if len({span.workers for span in worker_groups}) < 2:
        return {}
    changed = [span for before, span in itertools.pairwise(worker_groups) if span.workers != before.workers]
    later = [f"{span.workers} from step {span.from_step}" for span in changed]
    return {"m2f.workers": ", ".join([str(worker_groups[0].workers), *later])}


def _train_here(run: Run, resources: Resources) -> None:
    """The loop in this process, without Ray."""
    import torch

    from m2f.losses import Divergence
    from pipeline.training.loop import train

    try:
        if resources.use_gpu:
            check_gpu()
        note_worker_group(run, "here")
        train(run)
    except Divergence:
        return  # diverged.json says it
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        fail(run.run_dir, sentence(error, run))


def _train_on_group(run: Run, resources: Resources, lines: Queue) -> None:
    """Run the loop on a worker group until it ends, replacing workers that are lost, or going on without them."""
    from ray.exceptions import RayError
    from ray.train import TrainingFailedError

    group = WorkerGroup(full=resources.workers, workers=resources.workers, saved=_saved_steps(run.run_dir))
    if not group_fits(resources):
        group = dataclasses.replace(group, said_s=say_it_waits(run, resources))
    while True:
        try:
            with growing(run, resources, group.workers):
                started = dataclasses.replace(resources, workers=group.workers)
                _fit(sized(run, resources, group.workers), started, lines)
            return
        except (TrainingFailedError, RayError) as error:
            end = _end_of(run, error)
        if run_status(run.run_dir) is not None:  # a divergence; or a worker was lost after the last step
            return
        group, decision = after(group, end)
        if decision.fail is not None:
            fail(run.run_dir, decision.fail)
            return
        _say_decided(run, decision)
        if decision.count:
            group, decision = counted(group, places(resources))
            _say_decided(run, decision)
        if is_to_say_it_waits(group, time.monotonic()):
            group = dataclasses.replace(group, said_s=say_it_waits(run, resources))


def _end_of(run: Run, error: BaseException) -> End:
    """How a Ray Train run has ended, and how far the training had come by then."""
    import torch

    failure, cause = what_failed(error)
    return End(
        failure="no memory" if failure == "final" and isinstance(cause, torch.OutOfMemoryError) else failure,
        reason=sentence(cause, run),
        saved=_saved_steps(run.run_dir),
        nodes=_nodes(run.run_dir),
    )


def _say_decided(run: Run, decision: Decision) -> None:
    if decision.say is not None:
        say(run, decision.say)


def _fit(run: Run, resources: Resources, lines: Queue) -> None:
    """One Ray Train run on a worker group, which is one placement group, on one node if it fits there; raises what
    ended it."""
    for name, value in _RAY_TRAIN.items():
        os.environ.setdefault(name, value)
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    connect()
    TorchTrainer(
        work,
        train_loop_config={
            "run": run,
            "threads": resources.cpus_per_worker,
            "use_gpu": resources.use_gpu,
            "lines": lines,
        },
        torch_config=TorchConfig(),
        scaling_config=ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.use_gpu,
            resources_per_worker=resources.per_worker,
            placement_strategy="PACK",
            accelerator_type=resources.gpu_type,
        ),
        run_config=RunConfig(
            # a new one each time, for Ray takes up any it knows
            name=f"{run.row.name}-seed{run.seed}-{time.time_ns()}",
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            **ray_storage(run.run_dir / "ray"),
        ),
    ).fit()


def work(config: Mapping[str, Any]) -> None:
    """What every worker of a Ray training runs; what it has to say goes to the row's driver."""
    import logging

    import ray
    import torch
    from ray.train import report
    from ray.train.torch import get_device
    from ray.train.v2._internal.execution import context

    from pipeline.compute.worker_output import relayed
    from pipeline.training.loop import train

    logging.getLogger(context.__file__).setLevel(logging.WARNING)  # it says a line for every report
    torch.set_num_threads(config["threads"])  # Ray gives a worker one
    if config["use_gpu"]:
        check_gpu()
    if torch.cuda.is_available():  # workers of one node share the list of its GPUs
        torch.cuda.set_device(get_device())
    run: Run = config["run"]
    with relayed(config["lines"], run_name(run)):
        note_worker_group(run, ray.get_runtime_context().get_node_id())
        train(run, report)


def note_worker_group(run: Run, node: str) -> None:
    """Write down in worker_groups.json, on rank 0, which workers go on with the run, and from where.

    Each worker group in turn that made steps which are still there. `node`: what this worker calls its own.
    """
    import torch.distributed as dist

    from pipeline.provenance.environment import device_name
    from pipeline.runs.checkpoints import newest_checkpoint, read_header, step_of
    from pipeline.training.worker import Worker

    worker = Worker.here()
    places = [(node, device_name())] * worker.size
    if worker.size > 1:
        dist.all_gather_object(places, places[0])
    if worker.rank == 0:
        newest = newest_checkpoint(run.run_dir)
        span = WorkerGroupSpan(
            from_step=step_of(newest) if newest else 0,
            # a foreign checkpoint, without the time, is refused later
            train_s=read_header(newest)["state"].get("train_s", 0.0) if newest else 0.0,
            time_ms=int(time.time() * 1000),
            workers=worker.size,
            nodes=len({node for node, _ in places}),
            devices=tuple(sorted({device for _, device in places})),
        )
        before = (each for each in worker_groups_of(run.run_dir) if each.from_step < span.from_step)
        write_worker_groups(run.run_dir, [*before, span])


def _nodes(run_dir: StoredPath) -> int:
    """Nodes of the newest worker group; 0 before the first."""
    worker_groups = worker_groups_of(run_dir)
    return worker_groups[-1].nodes if worker_groups else 0


def _saved_steps(run_dir: StoredPath) -> int:
    """Steps of the newest checkpoint; 0 without one."""
    names = (re.fullmatch(r"step-(\d+)\.safetensors", path.name) for path in (run_dir / "checkpoints").glob("step-*"))
    return max((int(match[1]) for match in names if match), default=0)
