"""Trains the seeds of a row: Ray Train launches the loop on its workers, restarts it after a loss, and ranks it."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.cluster import Resources, cluster_resources, connect
from pipeline.files import read_json, write_json
from pipeline.params import Row
from pipeline.storage import storage_root, stored

_RESTARTS = 3
"""Restarts of a training after lost workers; an error of ours is not retried."""

_POLL_S = "0.5"
"""How often Ray Train's controller looks at its workers."""


def train_row(
    row: Row,
    *,
    manifest: Mapping[str, Any],
    weights: Mapping[str, Any],
) -> dict[str, Any]:
    """Train every seed of a row that is not finished; the content of results/train/<row>.json.

    A finished seed is recognised by its run key in the storage root and never trained again; nor is one that
    diverged, which a retry would replay. ValueError when no seed finished.
    """
    from pipeline.provenance import run_key

    resources = cluster_resources(row)
    seeds = []
    for number, seed in enumerate(row.seeds, start=1):
        key = run_key(row, seed=seed, data_digest=manifest["digest"], weights_sha256=weights["sha256"])
        print(f"{row.name}: seed {seed} ({number} of {len(row.seeds)}), run {key}", file=sys.stderr, flush=True)
        seeds.append(_train_seed(row, seed, key, manifest, weights, resources))
    if not any(entry["status"] == "finished" for entry in seeds):
        reasons = "; ".join(f"seed {entry['seed']}: {entry['reason']}" for entry in seeds)
        raise ValueError(f"no seed of row {row.name} finished ({reasons})")
    return {"row": row.name, "dataset": row.dataset, "seeds": seeds}


def _train_seed(
    row: Row, seed: int, key: str, manifest: Mapping[str, Any], weights: Mapping[str, Any], resources: Resources
) -> dict[str, Any]:
    """Bring one seed to its end; its entry in results/train/<row>.json."""
    from pipeline import tracking
    from pipeline.train_loop import finished_result

    run_dir = storage_root() / "runs" / key
    diverged, launch = run_dir / "diverged.json", run_dir / "launch.json"
    if finished_result(run_dir) is None and not diverged.exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        open_run = partial(
            tracking.open_run,
            dataset=row.dataset,
            row=row.name,
            name=f"{row.name} seed {seed}",
            run_key=key,
            params={"seed": seed, "model": asdict(row.model), "train": asdict(row.train)},
            tags={"data_digest": manifest["digest"], "seed": str(seed)},
        )
        run_id = open_run()
        write_json(launch, {"mlflow_run_id": run_id, "workers": resources.workers})
        job = {
            "row": row,
            "seed": seed,
            "run_key": key,
            "run_dir": run_dir,
            "manifest": dict(manifest),
            "weights": stored(weights["path"], made_by=f"dvc repro -f weights@{row.weights}")
            if weights["path"]
            else None,
            "mlflow_run_id": run_id,
            "loader_processes": resources.loader_processes,
            "groups_at_once": resources.groups_at_once,
        }
        _launch(job, resources)
        if run_id is None and (run_id := open_run()) is not None:  # the server was down, and has missed the curve
            tracking.Curve(run_dir / "curve.jsonl", run_id, row.train.steps + 1).close()
            write_json(launch, {**read_json(launch, made_by="training again"), "mlflow_run_id": run_id})
        if finished_result(run_dir) is not None:
            tracking.set_status(run_id, "FINISHED", {"status": "finished"})
        else:
            tracking.set_status(run_id, "FAILED", {"status": "diverged" if diverged.exists() else "failed"})
    launched = read_json(launch, made_by=f"dvc repro -f train@{row.name}")
    entry = {
        "seed": seed,
        "run_key": key,
        "status": "failed",
        "reason": None,
        "run_dir": f"runs/{key}",
        "steps": row.train.steps,
        "checkpoints": {},
        "metrics": {},
        "train_s": None,
        "workers": max(1, launched["workers"]),
        "images_per_s": None,
        "mlflow_run_id": launched["mlflow_run_id"],
        "environment": _read(run_dir / "environment.json"),  # None: no worker got as far
    }
    result = finished_result(run_dir)
    if result is not None:
        figures = {name: result[name] for name in ("checkpoints", "metrics", "train_s", "images_per_s")}
        return {**entry, **figures, "status": "finished"}
    if diverged.exists():
        return {**entry, "status": "diverged", "reason": read_json(diverged, made_by="training again")["reason"]}
    return {**entry, "reason": _failure(run_dir)}


def _read(path: Path) -> Any:
    """A JSON file of the run folder; None without it."""
    return read_json(path, made_by="training again") if path.exists() else None


def _failure(run_dir: Path) -> str:
    failed = _read(run_dir / "failed.json")
    return failed["reason"] if failed else "it ended without a word"


def _launch(job: dict[str, Any], resources: Resources) -> None:
    """Run the loop on its workers until it ends; what went wrong is in diverged.json or failed.json."""
    run_dir: Path = job["run_dir"]
    (run_dir / "failed.json").unlink(missing_ok=True)
    if resources.workers == 0:
        _train_here(job)
        return

    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", _POLL_S)
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # it says every line twice
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    connect()
    ray_dir = run_dir / "ray"  # Ray's own notes; a new name each time, for it takes up any it knows
    trainer = TorchTrainer(
        work,
        train_loop_config={**job, "threads": resources.cpus_per_worker},
        torch_config=TorchConfig(),
        scaling_config=ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.use_gpu,
            resources_per_worker={"CPU": resources.cpus_per_worker, **({"GPU": 1} if resources.use_gpu else {})},
        ),
        run_config=RunConfig(
            name=f"{job['run_key']}-{time.time_ns()}",
            storage_path=str(ray_dir),
            failure_config=FailureConfig(max_failures=_RESTARTS, controller_failure_limit=_RESTARTS),
        ),
    )
    try:
        with _following(run_dir / "progress.log"):
            trainer.fit()
    except TrainingFailedError as error:
        if not (run_dir / "failed.json").exists():
            write_json(
                run_dir / "failed.json", {"reason": f"lost its workers {_RESTARTS + 1} times ({_last_line(error)})"}
            )
    finally:
        shutil.rmtree(ray_dir, ignore_errors=True)


def _train_here(job: Mapping[str, Any]) -> None:
    """The loop in this process, without Ray; an error of ours is written down."""
    from m2f.losses import Divergence
    from pipeline.train_loop import Run, train

    run = Run(**job)
    try:
        train(run)
    except Divergence:
        return  # diverged.json says it
    except (ValueError, OSError) as error:
        write_json(run.run_dir / "failed.json", {"reason": " ".join(str(error).split())})


@contextlib.contextmanager
def _following(path: Path) -> Iterator[None]:
    """Print the lines that a worker adds to a file, while the block runs."""
    start = path.stat().st_size if path.exists() else 0
    ended = threading.Event()

    def follow() -> None:
        position = start
        while True:
            last = ended.wait(0.5)
            if path.exists():
                with open(path, encoding="utf-8") as file:
                    file.seek(position)
                    sys.stderr.write(file.read())
                    position = file.tell()
                sys.stderr.flush()
            if last:
                return

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def work(job: dict[str, Any]) -> None:
    """What every worker of a Ray training runs; what rank 0 has to say goes to `progress.log`.

    An error of ours (bad input, divergence) is written down and raised, so that the other workers stop too; the
    restart that follows finds the note and ends at once. A worker that is killed leaves no note and is resumed.
    """
    import torch
    from ray.train.torch import get_device

    from pipeline.train_loop import Run, train

    threads = job["threads"]
    run = Run(**{name: value for name, value in job.items() if name != "threads"})
    failed, diverged = run.run_dir / "failed.json", run.run_dir / "diverged.json"
    if failed.exists() or diverged.exists():
        return
    torch.set_num_threads(threads)  # Ray gives a worker one
    if torch.cuda.is_available():  # workers of one host share the list of its GPUs
        torch.cuda.set_device(get_device())
    with open(run.run_dir / "progress.log", "a", buffering=1, encoding="utf-8") as log, contextlib.redirect_stderr(log):
        try:
            train(run)
        except (ValueError, OSError) as error:
            write_json(failed, {"reason": " ".join(str(error).split())})
            raise


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1][:200] if str(error).strip() else type(error).__name__
