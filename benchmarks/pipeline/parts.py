"""What `python -m benchmarks.pipeline` measures: a training's surroundings, evaluation, and the way to a first step."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import psutil
import torch
import yaml
from torch import nn

from benchmarks.pipeline.processes import PROJECT, end
from pipeline.cluster.workspace import without_git
from pipeline.compute.ray_session import connect
from pipeline.compute.resources import Resources
from pipeline.compute.worker_output import printing
from pipeline.cost.plan import known_checkpoint_bytes
from pipeline.data.fetch import fetch, open_sources
from pipeline.data.shards.build import build
from pipeline.evaluation.evaluate_checkpoint import Job, evaluate, evaluation_key
from pipeline.params.load import load_params
from pipeline.params.schema import Row
from pipeline.runs.checkpoints import keep_only, save_checkpoint
from pipeline.runs.curve_file import lines_of, read_points
from pipeline.runs.run import Run
from pipeline.storage.files import delete
from pipeline.storage.results.data import Manifest
from pipeline.tracking.client import mlflow_client
from pipeline.tracking.curve import Curve
from pipeline.tracking.sender import SEND_EVERY_S
from pipeline.training.loop import train
from pipeline.training.worker_group import open_tracked, train_seed

ROW = "shapes_tiny"

WARM_STEPS = 5
"""First steps of a training, which do not count."""

STEP_S = (0.3, 1.0)
"""Step times that shares are derived for: a published row's step on 8 A100 takes about so long."""

POINTS, LOSSES = 300, 33
"""Points of a curve that are logged, and figures of each: 3 losses of 10 predictions, their sum, rate and norm."""

CHECKPOINT_MIB = 192
"""Of the checkpoint that is written."""

FEW_IMAGES = 8
"""Pictures of the evaluation whose time is taken for starting."""

POLL_S = 0.02


# Overhead


def data(*, train_images: int, val_images: int) -> Manifest:
    """Generated pictures, sharded below M2F_STORAGE."""
    shapes = load_params(PROJECT / "params.yaml").dataset(load_params(PROJECT / "params.yaml").row(ROW).dataset)
    config = dataclasses.replace(shapes, generate={**shapes.generate, "train": train_images, "val": val_images})
    fetched = fetch("shapes", config, base=PROJECT)
    return build("shapes", config, open_sources(fetched), facts=fetched.sources, processes=0)


def small_row(steps: int) -> Row:
    """`shapes_tiny` for some steps: every one is logged, the last one validated and saved."""
    row = load_params(PROJECT / "params.yaml").row(ROW)
    train = dataclasses.replace(row.train, steps=steps, log_every=1, val_interval=steps, checkpoint_interval=steps)
    return dataclasses.replace(row, train=train)


def cores() -> int:
    """Of this process."""
    return len(os.sched_getaffinity(0))


def alone(workers: int) -> Resources:
    """All cores, shared among workers without loader processes."""
    return Resources(
        workers=workers,
        use_gpu=False,
        cpus_per_worker=max(1, cores() // max(1, workers)),
        loader_processes=0,
        groups_at_once=None,
    )


def step_s(form: str, row: Row, manifest: Manifest, run_dir: Path) -> float:
    """Mean seconds of a step, from the times of the curve's points."""
    import ray

    (run_dir / "checkpoints").mkdir(parents=True)
    run = Run(row=row, seed=0, run_key=run_dir.name, run_dir=run_dir, manifest=manifest)
    if form == "ray":
        connect()
        with printing() as lines:
            train_seed(run, alone(1), lines)
        ray.shutdown()
    elif form == "mlflow":
        train(dataclasses.replace(run, mlflow_run_id=open_tracked(run, 1)))
    else:
        train(run)
    times_ms = [point["time_ms"] for point in read_points(lines_of(run_dir / "curve.jsonl"))]
    counted = times_ms[min(WARM_STEPS, len(times_ms) - 3) : -1]  # the last point waits for validation
    return float(counted[-1] - counted[0]) / 1000 / (len(counted) - 1)


def point_costs(run: Run) -> dict[str, float]:
    """Seconds to log a point of the curve, for the loop and, in CPU time, for the thread that sends it to MLflow."""
    run_id = open_tracked(run, 1)
    curve = Curve(run.run_dir / "curve.jsonl", run_id, 1, run_dir=run.run_dir)
    metrics = {f"loss_{number}": number / 7 for number in range(LOSSES)}
    began_s, own_s, all_s = time.perf_counter(), time.thread_time(), time.process_time()
    for step in range(1, POINTS + 1):
        curve.log(step, metrics)
    logged_s, own_s = time.perf_counter() - began_s, time.thread_time() - own_s
    time.sleep(1.5 * SEND_EVERY_S)  # one sending is in it
    curve.close()
    sent_s = time.process_time() - all_s - own_s
    assert run_id is not None
    sent = len(mlflow_client().get_metric_history(run_id, "train/loss_0"))
    return {"log_s": logged_s / POINTS, "send_cpu_s": sent_s / max(1, sent), "sent": sent}


def checkpoint_s_per_gib(run_dir: Path, rounds: int) -> float:
    """Seconds to write a checkpoint of a network with its optimiser's state, by its size."""
    network = nn.ParameterList([nn.Parameter(torch.zeros(2**18)) for _ in range(CHECKPOINT_MIB // 3)])
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    times = []
    for step in range(1, rounds + 1):
        began_s = time.perf_counter()
        save_checkpoint(run_dir, step=step, run_key="benchmark", model=network, optimizer=optimizer, state={})
        keep_only(run_dir, {step})
        times.append(time.perf_counter() - began_s)
    return statistics.median(times) * 1024 / CHECKPOINT_MIB


def saves_per_step(row: Row) -> float:
    """Checkpoints of a step: at every validation, and at every interval of their own."""
    steps, settings = row.train.steps, row.train
    due = {*range(settings.val_interval, steps, settings.val_interval)}
    due |= {*range(settings.checkpoint_interval, steps, settings.checkpoint_interval), steps}
    return len(due) / steps


def shares(
    row: Row, *, log_s: float, checkpoint_s_per_gib: float, checkpoint_bytes: int, step_s: Sequence[float]
) -> dict[str, float]:
    """What logging and saving add to a step, as a share of it, by the step's time."""
    logging_s = log_s / row.train.log_every
    saving_s = checkpoint_s_per_gib * checkpoint_bytes / 2**30 * saves_per_step(row)
    return {f"{seconds:g} s": round((logging_s + saving_s) / seconds, 5) for seconds in step_s}


def overhead(
    folder: Path, *, forms: Sequence[str], steps: int, rounds: int, save: Callable[[Mapping[str, Any]], None]
) -> dict[str, Any]:
    """The costs of Ray, MLflow and checkpoints over the bare loop: measured, and derived for the published rows.

    save: called with what there is so far, for Ray may not start on a busy machine."""
    row, manifest = small_row(steps + WARM_STEPS + 1), data(train_images=64, val_images=2)
    runs = folder / "storage" / "runs"
    run_dir = runs / "points"
    (run_dir / "checkpoints").mkdir(parents=True)
    measured: dict[str, Any] = {
        "point": point_costs(Run(row=row, seed=1, run_key="points", run_dir=run_dir, manifest=manifest)),
        "checkpoint_s_per_gib": round(checkpoint_s_per_gib(run_dir, rounds), 3),
    }
    derived = derived_shares(measured["point"]["log_s"], measured["checkpoint_s_per_gib"])
    found = {"measured": measured, "derived": derived}
    times: dict[str, list[float]] = {form: [] for form in forms}
    for round_ in range(rounds):
        for form in forms:
            times[form].append(step_s(form, row, manifest, runs / f"{form}-{round_}"))
            measured |= compared(times)
            save(found)
    return found


def compared(times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Seconds of a step by form and round, and the median of each round's ratio to the bare loop."""
    ratios = {
        form: round(statistics.median(a / b for a, b in zip(found, times["bare"], strict=False)), 4)
        for form, found in times.items()
        if form != "bare" and found and times.get("bare")
    }
    return {"step_s": {form: [round(one, 4) for one in found] for form, found in times.items()}, "to_bare": ratios}


def derived_shares(log_s: float, checkpoint_s_per_gib: float) -> dict[str, Any]:
    """`shares` of every published row whose network is known."""
    found = {}
    for name, row in load_params(PROJECT / "params.yaml").rows.items():
        if (size := known_checkpoint_bytes(row.model)) is not None:
            by_time = shares(
                row,
                log_s=log_s,
                checkpoint_s_per_gib=checkpoint_s_per_gib,
                checkpoint_bytes=size,
                step_s=STEP_S,
            )
            found[name] = {"checkpoint_mib": round(size / 2**20), "share": by_time}
    return found


# Evaluation


def evaluation(folder: Path, *, images: int, rounds: int) -> dict[str, Any]:
    """Pictures per second with one worker, which is this process, and with two of Ray's, that share its cores."""
    if cores() < 2:
        return {"skipped": "two workers need two cores"}
    row, manifest = small_row(1), data(train_images=16, val_images=images)
    few = data(train_images=16, val_images=min(FEW_IMAGES, images // 2))
    run_dir = folder / "storage" / "runs" / "evaluated"
    (run_dir / "checkpoints").mkdir(parents=True)
    finished = train(Run(row=row, seed=0, run_key=run_dir.name, run_dir=run_dir, manifest=few))
    assert finished is not None
    checkpoint = finished.checkpoints.last

    def timed(workers: int, manifest: Manifest) -> float:
        job = Job(
            row=row,
            manifest=manifest,
            checkpoint=run_dir / checkpoint.path,
            sha256=checkpoint.sha256,
            run_key=run_dir.name,
            step=checkpoint.step,
            run_dir=run_dir,
            key=evaluation_key(row, manifest, sha256=checkpoint.sha256, device="cpu"),
            what=f"{workers} workers",
            processes=0,
        )
        began_s = time.perf_counter()
        evaluate(job, alone(workers))
        took_s = time.perf_counter() - began_s
        delete(job.folder)
        return took_s

    connect()  # Ray and its workers are started once, and not counted
    for workers in (1, 2):
        timed(workers, few)
    whole: dict[int, list[float]] = {1: [], 2: []}
    per_image: dict[int, list[float]] = {1: [], 2: []}
    more = manifest.split("val").records - few.split("val").records
    for _ in range(rounds):
        for workers in whole:
            starting_s, all_s = timed(workers, few), timed(workers, manifest)
            whole[workers].append(all_s)
            per_image[workers].append((all_s - starting_s) / more)
    return {
        "images": manifest.split("val").records,
        "s": {workers: round(statistics.median(times), 2) for workers, times in whole.items()},
        "s_per_image": {workers: round(statistics.median(times), 4) for workers, times in per_image.items()},
        "speedup": round(statistics.median(a / b for a, b in zip(per_image[1], per_image[2], strict=True)), 3),
    }


# From the command to the first step


def copied(folder: Path) -> Path:
    """A copy of the project as DVC looks at it, in which every step is logged."""
    workspace = folder / "copy"
    for name in ("m2f", "pipeline", "stages", ".dvc"):
        left_out = shutil.ignore_patterns("__pycache__", "tmp", "cache", "config.local")
        shutil.copytree(PROJECT / name, workspace / name, ignore=left_out)
    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copy(PROJECT / name, workspace / name)
    without_git(workspace)
    params = yaml.safe_load((PROJECT / "params.yaml").read_text(encoding="utf-8"))
    params["rows"][ROW]["train"]["log_every"] = 1
    (workspace / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
    return workspace


class Watched:
    """Seconds after the command's start at which its lines came, and its stages' processes were seen."""

    def __init__(self, process: subprocess.Popen[str], began_s: float) -> None:
        self.began_s = began_s
        self.lines: list[tuple[float, str]] = []
        self.stages: dict[str, list[float]] = {}
        self.cpu_s: dict[int, float] = {}
        """CPU time of every process that was seen, which other work on the machine prolongs less."""
        self.process = psutil.Process(process.pid)
        assert process.stdout is not None
        self.reader = threading.Thread(target=self._read, args=(process.stdout,), daemon=True)
        self.reader.start()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self.lines.append((time.time() - self.began_s, line.rstrip()))
            print(f"{self.lines[-1][0]:6.1f} s  {self.lines[-1][1]}", file=sys.stderr, flush=True)

    def look(self) -> None:
        """Note which stages are running now, and what all processes have used."""
        for child in [self.process, *self.process.children(recursive=True)]:
            try:
                command = " ".join(child.cmdline())
                self.cpu_s[child.pid] = sum(child.cpu_times()[:2])
            except psutil.Error:
                continue
            if match := re.search(r"python\S* -m stages\.(\w+ \w+)$", command):
                now_s = time.time() - self.began_s
                self.stages.setdefault(match[1], [now_s, now_s])[1] = now_s

    def at(self, words: str) -> float | None:
        """When the first line with these words came."""
        return next((when_s for when_s, line in self.lines if words in line), None)


def first_step(folder: Path) -> dict[str, Any]:
    """From `dvc repro evaluate@shapes_tiny` in a fresh copy to its first training step; it is stopped then."""
    workspace, storage = copied(folder), folder / "storage"
    settings = {"M2F_WORKERS": "1", "PYTHONUNBUFFERED": "1", "HOME": str(folder)}
    began_s = time.time()
    process = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", f"evaluate@{ROW}"],
        cwd=workspace,
        env={**os.environ, **settings, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        watched, points = Watched(process, began_s), list[dict[str, Any]]()
        while not points:
            if process.poll() is not None:
                raise ValueError(f"dvc repro ended before the first step: {watched.lines[-1:]}")
            watched.look()
            points = [p for path in storage.glob("runs/*/curve.jsonl") for p in read_points(lines_of(path))]
            time.sleep(POLL_S)
        came_ms = min(_first_time_ms(path.read_text()) for path in storage.glob("runs/*/worker_groups.json"))
    finally:
        end(process)
    found = split(
        watched.stages,
        trains=f"train {ROW}",
        ray_s=watched.at("starting Ray and the workers"),
        worker_s=came_ms / 1000 - began_s,
        step_s=min(point["time_ms"] for point in points) / 1000 - began_s,
    )
    return {**found, "cpu_s": round(sum(watched.cpu_s.values()), 1)}


def _first_time_ms(groups: str) -> int:
    """When the first workers wrote down, in worker_groups.json, that they are there."""
    found = re.search(r'"time_ms": (\d+)', groups)
    assert found is not None
    return int(found[1])


def split(
    stages: Mapping[str, Sequence[float]], *, trains: str, ray_s: float | None, worker_s: float, step_s: float
) -> dict[str, Any]:
    """Where the seconds to the first step went. stages: when each stage's process was first and last seen; ray_s,
    worker_s, step_s: when Ray was about to be started, the worker was there, and the first step was made."""
    before = {name: seen[1] - seen[0] for name, seen in stages.items() if name != trains}
    began_s = stages[trains][0]
    ray_s = worker_s if ray_s is None else ray_s
    parts = {
        **before,
        "DVC": began_s - sum(before.values()),
        f"{trains}: before Ray": ray_s - began_s,
        "Ray and its worker": worker_s - ray_s,
        "the first step": step_s - worker_s,
    }
    return {"s": round(step_s, 2), "parts": {name: round(seconds, 2) for name, seconds in parts.items()}}
