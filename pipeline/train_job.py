"""One seed from its start, or from where it stopped, to its end: the driver of its Ray Train run.

Ray Train launches the loop on a pool of workers and ranks them. What follows a failure is decided here, because Ray
counts a lost worker and a bug alike: lost workers are replaced, what the user must mend and a divergence are final.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.cluster import Resources, connect, ray_storage
from pipeline.files import write_json
from pipeline.run_folder import note_of, outcome
from pipeline.tasks import LABELS, primary

if TYPE_CHECKING:
    from ray.util.queue import Queue

    from pipeline.train_loop import Run

RESTARTS = 3
"""Times in a row that lost workers are replaced without the training getting any further."""

_RAY_TRAIN = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how often the controller looks at its workers
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",  # how long it waits for a pool before it comes back to us
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it says every line twice
}

_SAY_AGAIN_S = 600.0
"""How often a seed that waits for its pool says so."""


def train_seed(run: Run, resources: Resources, lines: Queue | None = None) -> None:
    """Bring one seed to its end; the run folder says which (pipeline.run_folder).

    `lines`: where workers send what they have to say (pipeline.relay). Without workers the loop runs in this process,
    where a bug ends in its traceback.
    """
    from pipeline import tracking

    run_dir = run.run_dir
    workers = max(1, resources.workers)
    run_id = open_tracked(run, workers)
    launched = {"mlflow_run_id": run_id, "workers": workers}
    write_json(run_dir / "launch.json", launched)
    for note in ("failed", "stopped"):
        (run_dir / f"{note}.json").unlink(missing_ok=True)
    run = dataclasses.replace(run, mlflow_run_id=run_id)
    if resources.workers == 0:
        _train_here(run)
    else:
        assert lines is not None
        _train_on_pool(run, resources, lines)
    end = outcome(run_dir)
    status = end.status if end else "failed"
    if end is not None and end.reason is not None:
        say(run, f"{status}: {end.reason}")
    run_id = tracking.catch_up(run_dir, status=status, tags=_behind(run)) or run_id
    write_json(run_dir / "launch.json", {**launched, "mlflow_run_id": run_id})


def open_tracked(run: Run, workers: int) -> str | None:
    """The seed's MLflow run, made if there is none; None while no server answers."""
    from pipeline import tracking

    return tracking.open_training(
        run.run_dir, run.row, seed=run.seed, run_key=run.run_key, data_digest=run.manifest["digest"], workers=workers
    )


def _behind(run: Run) -> dict[str, str]:
    """The tag of the last warning that the training was clearly behind, if there was one."""
    from pipeline.early_warning import Behind, described

    state = note_of(run.run_dir, "finished") or note_of(run.run_dir, "stopped") or {}
    if not state.get("behind"):
        return {}
    behind = Behind(**state["behind"][-1])
    return {"m2f.behind": f"step {behind.step}: {described(behind, LABELS[primary(run.row.task)])}"}


def say(run: Run, text: str) -> None:
    """One line on stderr."""
    print(f"{run_name(run)}: {text}", file=sys.stderr, flush=True)


def fail(run_dir: Path, reason: str) -> None:
    """Write down why a seed failed; its next start forgets it."""
    write_json(run_dir / "failed.json", {"reason": reason})


def _train_here(run: Run) -> None:
    """The loop in this process, without Ray."""
    import torch

    from m2f.losses import Divergence
    from pipeline.train_loop import train

    try:
        train(run)
    except Divergence:
        return  # diverged.json says it
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        fail(run.run_dir, sentence(error, run))


def _train_on_pool(run: Run, resources: Resources, lines: Queue) -> None:
    """Run the loop on a pool of workers until it ends, replacing workers that are lost."""
    from ray.exceptions import RayError
    from ray.train import TrainingFailedError

    lost = bugs = 0
    saved, said_s = _saved_steps(run.run_dir), -math.inf
    if not _pool_is_free(resources):
        said_s = _say_it_waits(run, resources)
    while True:
        try:
            _fit(run, resources, lines)
            return
        except (TrainingFailedError, RayError) as error:
            kind, cause = what_failed(error)
        end = outcome(run.run_dir)
        if end is not None:  # a divergence; or a worker was lost after the last step
            return
        if kind == "no pool":
            if time.monotonic() - said_s > _SAY_AGAIN_S:
                said_s = _say_it_waits(run, resources)
            continue
        if (now := _saved_steps(run.run_dir)) > saved:
            saved, lost = now, 0
        lost, bugs = lost + (kind == "lost"), bugs + (kind == "bug")
        if kind == "final":
            fail(run.run_dir, sentence(cause, run))
            return
        if bugs > 1:
            fail(run.run_dir, f"{sentence(cause, run)}, and again when it was tried once more")
            return
        if lost > RESTARTS:
            fail(run.run_dir, f"lost its workers {lost} times without getting further ({sentence(cause, run)})")
            return
        what = f"lost a worker ({lost} of {RESTARTS} times)" if kind == "lost" else "failed, and is tried once more"
        say(run, f"{what}: {sentence(cause, run)}")


def _fit(run: Run, resources: Resources, lines: Queue) -> None:
    """One Ray Train run on a pool; raises what ended it."""
    for name, value in _RAY_TRAIN.items():
        os.environ.setdefault(name, value)
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    connect()
    TorchTrainer(
        work,
        train_loop_config={"run": run, "threads": resources.cpus_per_worker, "lines": lines},
        torch_config=TorchConfig(),
        scaling_config=ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.use_gpu,
            resources_per_worker=resources.per_worker,
        ),
        run_config=RunConfig(
            name=f"train-{time.time_ns()}",  # a new one each time, for Ray takes up any it knows
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            **ray_storage(run.run_dir / "ray"),
        ),
    ).fit()


def work(config: Mapping[str, Any]) -> None:
    """What every worker of a Ray training runs; what it has to say goes to the row's driver."""
    import torch
    from ray.train.torch import get_device

    from pipeline.relay import relayed
    from pipeline.train_loop import train

    torch.set_num_threads(config["threads"])  # Ray gives a worker one
    if torch.cuda.is_available():  # workers of one host share the list of its GPUs
        torch.cuda.set_device(get_device())
    run: Run = config["run"]
    with relayed(config["lines"], run_name(run)):
        train(run)


def run_name(run: Run) -> str:
    """How progress lines call a run."""
    return f"{run.row.name} seed {run.seed}"


def what_failed(error: BaseException) -> tuple[Literal["no pool", "lost", "final", "bug"], BaseException]:
    """What ended a Ray Train run, and the exception that says most about it.

    no pool: none got free in time. lost: a worker died, with which the others' connections break. final: what a retry
    would meet again. bug: any other exception of the loop.
    """
    import torch
    from ray.train import ControllerError, WorkerGroupError
    from ray.train.v2._internal.exceptions import RayTrainError, WorkerGroupStartupTimeoutError

    from m2f.losses import Divergence

    if isinstance(error, ControllerError):
        cause = error.controller_failure
        return ("no pool" if isinstance(cause, WorkerGroupStartupTimeoutError) else "lost"), cause
    if not isinstance(error, WorkerGroupError):
        return "lost", error  # the controller itself
    failures = list(error.worker_failures.values())
    mendable = (ValueError, FileNotFoundError, PermissionError, torch.OutOfMemoryError, Divergence)
    for failure in failures:
        if isinstance(failure, mendable):
            return "final", failure
    for failure in failures:
        if isinstance(failure, RayTrainError) or _is_broken_connection(failure):
            return "lost", failure
    return "bug", failures[0]


def _is_broken_connection(error: BaseException) -> bool:
    """Whether a worker's exception only says that another one is gone."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


def sentence(error: BaseException, run: Run) -> str:
    """An exception in one sentence: our own as it is, another with its type and last line."""
    import torch

    text = str(getattr(error, "health_check_failure", error))
    if isinstance(error, torch.OutOfMemoryError):
        groups, size = run.groups_at_once or "all its", run.row.train.group_size
        return (
            f"a worker's GPU has not the memory for {groups} groups of {size} pictures at once; set M2F_GROUPS_AT_ONCE "
            f"below that, or use more workers ({_first_line(text)})"
        )
    if isinstance(error, (ValueError, OSError)):
        return " ".join(text.split())
    return f"{type(error).__name__}: {_last_line(text).partition(' Some common causes')[0]}"


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "")[:200]


def _last_line(text: str) -> str:
    return next(iter(reversed(text.strip().splitlines())), "")[:400].strip()


def _saved_steps(run_dir: Path) -> int:
    """Steps of the newest checkpoint; 0 without one."""
    names = (re.fullmatch(r"step-(\d+)\.safetensors", path.name) for path in (run_dir / "checkpoints").glob("step-*"))
    return max((int(match[1]) for match in names if match), default=0)


def _pool_is_free(resources: Resources) -> bool:
    """Whether the cluster as a whole has as much left as a pool needs."""
    import ray

    free = ray.available_resources()
    return all(free.get(name, 0) >= resources.workers * amount for name, amount in resources.per_worker.items())


def _say_it_waits(run: Run, resources: Resources) -> float:
    """Say that there is no pool yet, what one is and what there is; the time."""
    import ray

    free, total = ray.available_resources(), ray.cluster_resources()
    name = "GPU" if resources.use_gpu else "CPU"
    what = "GPUs" if resources.use_gpu else "cores"
    there = f"{int(free.get(name, 0))} of the cluster's {int(total.get(name, 0))} {what} are free"
    say(run, f"waits for a pool of {resources}; {there}")
    return time.monotonic()
