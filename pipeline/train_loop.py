"""One training run, read from top to bottom. Runs alone, in a notebook or under a debugger; Ray Train only
launches it, restarts it and tells each worker its rank. What happens in a step is pipeline.train_step.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m2f.losses import Divergence
from pipeline.checkpoints import (
    checkpoint_path,
    keep_only,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    step_of,
)
from pipeline.cluster import share
from pipeline.early_warning import Behind, clearly_behind, curve_of, described
from pipeline.files import read_json, sha256, write_json
from pipeline.measures import measure, while_training
from pipeline.params import Row
from pipeline.precision import allow_tf32
from pipeline.provenance import environment
from pipeline.run_folder import finished_result
from pipeline.tasks import LABELS, in_words, primary
from pipeline.tracking import Curve, read_curve, set_tags
from pipeline.train_step import StepDiverged, Training, build, training_step
from pipeline.worker import Worker

_STEPS_TO_ESTIMATE = 20


LEAVE = "leave.json"
"""A file of this name in the run folder asks the run to leave its workers after its next checkpoint."""


class Left(Exception):
    """The run has left its workers after a checkpoint, because it was asked to: it is to go on from there on others."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one training needs to know besides its row."""

    row: Row
    seed: int
    run_key: str
    run_dir: Path
    """Absolute; environment.json, checkpoints/, curve.jsonl and how it ended (pipeline.run_folder)."""
    manifest: Mapping[str, Any]
    weights: Path | None = None
    """Converted initial weights of the backbone."""
    mlflow_run_id: str | None = None
    loader_processes: int = 0
    groups_at_once: int | None = None
    """Groups per forward pass; None: all of the worker's. Less saves memory and changes nothing else."""
    published_curve: Sequence[tuple[int, float]] = ()
    """(step, the row's first figure) of the published training, which the early warning compares with."""
    sisters: tuple[Path, ...] = ()
    """Run folders of the row's other seeds, whose curves it compares with too."""


def train(run: Run) -> dict[str, Any]:
    """Train one seed of a row to its last step, from the newest checkpoint if there is one.

    Returns what `finished.json` says: steps, checkpoints with digests, metrics, time ({} but on rank 0, and where the
    early warning stopped it, which `stopped.json` says). Raises Divergence for a non-finite loss or matching cost,
    after saving step, positions and norms in `diverged.json`, and, on rank 0, Left when it was asked to leave.
    """
    from pipeline.loader import training_batches  # here: who only makes a Run does without albumentations and Arrow

    diverged = run.run_dir / "diverged.json"
    if (finished := finished_result(run.run_dir)) is not None:
        return finished
    if diverged.exists():
        raise Divergence(read_json(diverged, made_by="training this row again")["reason"])
    worker, config = Worker.here(), run.row.train
    allow_tf32(config.tf32)
    training = build(run.row, worker, seed=run.seed, weights=run.weights, groups_at_once=run.groups_at_once)
    model, optimizer = training.model, training.optimizer
    first_step, state = resume(run, training)

    group_range = share(config.groups, worker=worker.rank, workers=worker.size)
    picture_range = range(group_range.start * config.group_size, group_range.stop * config.group_size)
    batches = training_batches(
        run.manifest,
        config.augmentation,
        task=run.row.task,
        pictures=config.pictures,
        seed=run.seed,
        first_step=first_step,
        steps=config.steps - first_step,
        global_batch=config.global_batch,
        picture_range=picture_range,
        processes=run.loader_processes,
    )
    chief = worker.rank == 0
    if chief:  # here, where the GPU is: who launches the training may have none
        write_json(run.run_dir / "environment.json", environment(tf32=config.tf32))
    curve = None
    if chief:
        curve = Curve(run.run_dir / "curve.jsonl", run.mlflow_run_id, first_step + 1, run_dir=run.run_dir)
    progress = StepProgress(run, first_step, share=len(group_range) / config.groups) if chief else None
    begun_s, trained_s = time.monotonic(), state["train_s"]
    stop = False
    model.train()

    with divergence_noted(run, curve):
        for step, batch in enumerate(batches, start=first_step):
            result = training_step(training, batch, step=step)

            done = step + 1
            last = done == config.steps
            logging, validating = last or done % config.log_every == 0, last or done % config.val_interval == 0
            saving = validating or done % config.checkpoint_interval == 0
            if logging or saving:
                training.norms.now()  # nothing of a poisoned step is shown or kept
            points: dict[str, float] = {}
            if logging:
                values = worker.sum(torch.stack(list(result.losses.values())).float())
                points = dict(zip(result.losses, values.tolist(), strict=True))
                points |= {"loss": sum(points.values()), "lr": result.lr, "grad_norm": result.grad_norm.item()}
            if progress is not None:
                progress.step(done, result.losses)
            if done == first_step + _STEPS_TO_ESTIMATE and worker.device.type == "cuda":
                refuse_if_too_long(run, worker, seconds_per_step=(time.monotonic() - begun_s) / _STEPS_TO_ESTIMATE)
            if saving:
                state["peak_memory_mib"] = peak_memory_mib(worker, state["peak_memory_mib"])  # not validation's
            if validating:
                row = while_training(run.row)
                metrics = worker.figures(measure(model, run.manifest, row, worker=worker.rank, workers=worker.size))
                model.train()
                state["metrics"] = metrics
                value: float = metrics[primary(row.task)]  # type: ignore[assignment]  # never None: Measures.figures
                if state["best"] is None or value > state["best"]["value"]:
                    state["best"] = {"step": done, "value": value}
                points |= {f"val_{name}": figure for name, figure in metrics.items() if figure is not None}
                if progress is not None:
                    progress.say(f"step {done}: validation {in_words(metrics, row.task)}")
                stop = fell_behind(run, worker, done, value, state, progress) and not last
                if worker.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
            if curve is not None and points:
                curve.log(done, points)
            if saving:
                state["train_s"] = trained_s + time.monotonic() - begun_s
                if curve is not None:
                    curve.save()  # first: a run that goes on from the checkpoint has its points
                    save_checkpoint(
                        run.run_dir, step=done, run_key=run.run_key, model=model, optimizer=optimizer, state=state
                    )
                    keep_only(run.run_dir, {done, state["best"]["step"]} if state["best"] else {done})
                    if not (last or stop) and (run.run_dir / LEAVE).exists():
                        curve.close()
                        raise Left(f"left after step {done}, as it was asked to")
            if stop:
                break

    if curve is None:
        return {}
    curve.close()
    if stop:
        note = {"reason": stop_reason(run, state), "step": done, "behind": state["behind"]}
        write_json(run.run_dir / "stopped.json", note)
        return {}
    finished = summary(run, state)
    write_json(run.run_dir / "finished.json", finished)
    return finished


def resume(run: Run, training: Training) -> tuple[int, dict[str, Any]]:
    """Load the newest checkpoint if there is one: finished steps, and the loop's own state.

    Rank 0 chooses, since a shared file system may show another worker an older folder.
    """
    worker = training.worker
    newest = newest_checkpoint(run.run_dir) if worker.rank == 0 else None
    chosen = torch.tensor(0 if newest is None else step_of(newest), device=worker.device)
    step = int(worker.sum(chosen))
    if step == 0:
        return 0, {"train_s": 0.0, "best": None, "metrics": None, "behind": [], "peak_memory_mib": None}
    path = checkpoint_path(run.run_dir, step)
    header = load_checkpoint(path, model=training.model, optimizer=training.optimizer, run_key=run.run_key)
    return step, header["state"]


@contextlib.contextmanager
def divergence_noted(run: Run, curve: Curve | None) -> Iterator[None]:
    """Save what is known of a step that diverges in diverged.json, on the worker that finds it."""
    try:
        yield
    except StepDiverged as error:
        message = f"row {run.row.name}, seed {run.seed} diverged in step {error.step}: {error}"
        if curve is not None:
            curve.save()
        last = None if error.last_norm is None else {"step": error.last_norm[0], "norm": repr(error.last_norm[1])}
        write_json(
            run.run_dir / "diverged.json",
            {
                "reason": message,
                "step": error.step,
                "positions": list(error.batch.positions),
                "names": list(error.batch.names),
                "last_norm": last,
            },
        )
        raise Divergence(message) from None


def peak_memory_mib(worker: Worker, before: float | None) -> float | None:
    """Largest GPU memory that a worker has held in training, in MiB, `before` included; None without GPUs."""
    if worker.device.type != "cuda":
        return None
    return worker.largest(max(before or 0.0, torch.cuda.max_memory_allocated() / 2**20))


def fell_behind(
    run: Run, worker: Worker, done: int, value: float, state: dict[str, Any], progress: StepProgress | None
) -> bool:
    """Say, note and tag a validation that is clearly behind; whether the run is to stop, the same on every worker."""
    config, task, twice = run.row.early_warning, run.row.task, False
    if progress is not None:
        figure = f"val_{primary(task)}"
        behind = clearly_behind(
            done,
            value,
            steps=run.row.train.steps,
            published=run.published_curve,
            sisters=[curve_of(read_curve(folder / "curve.jsonl"), figure) for folder in run.sisters],
            config=config,
        )
        if behind is not None:
            before = state["behind"][-1]["step"] if state["behind"] else None
            twice = before == done - run.row.train.val_interval
            state["behind"].append(asdict(behind))
            words = f"step {done}: {described(behind, LABELS[primary(task)])}"
            progress.say(f"warning: {words}")
            set_tags(run.mlflow_run_id, {"m2f.behind": words})
    return config.stop and bool(worker.sum(torch.tensor(int(twice), device=worker.device)))


def stop_reason(run: Run, state: Mapping[str, Any]) -> str:
    """Why the early warning stopped a run, and how it goes on."""
    first, second = (Behind(**entry) for entry in state["behind"][-2:])
    return (
        f"row {run.row.name}, seed {run.seed} was clearly behind at steps {first.step} and {second.step} "
        f"({described(second, LABELS[primary(run.row.task)])}); to go on, set "
        f"rows.{run.row.name}.early_warning.stop to false and run dvc repro -f train@{run.row.name}"
    )


def refuse_if_too_long(run: Run, worker: Worker, *, seconds_per_step: float) -> None:
    """ValueError when the whole run would cost more GPU-hours than the row allows."""
    hours = seconds_per_step * run.row.train.steps * worker.size / 3600
    if hours > run.row.max_gpu_hours:
        raise ValueError(
            f"row {run.row.name}, seed {run.seed} would take about {hours:.1f} GPU-hours "
            f"({seconds_per_step:.2f} s a step on {worker.size} GPUs); set rows.{run.row.name}.max_gpu_hours "
            f"(now {run.row.max_gpu_hours:g}) above that to allow it"
        )


def summary(run: Run, state: Mapping[str, Any]) -> dict[str, Any]:
    """What finished.json says."""
    steps, best = run.row.train.steps, state["best"]

    def checkpoint(step: int) -> dict[str, Any]:
        path = checkpoint_path(run.run_dir, step)
        return {"step": step, "path": f"{path.parent.name}/{path.name}", "sha256": sha256(path)}

    return {
        "run_key": run.run_key,
        "seed": run.seed,
        "steps": steps,
        "checkpoints": {
            "last": checkpoint(steps),
            "best": {**checkpoint(best["step"]), "figure": primary(run.row.task), "value": best["value"]},
        },
        "metrics": state["metrics"],
        "behind": state["behind"],
        "peak_memory_mib": state["peak_memory_mib"],
        "train_s": round(state["train_s"], 1),
        "images_per_s": round(steps * run.row.train.global_batch / max(state["train_s"], 1e-9), 2),
    }


class StepProgress:
    """Step, loss, images/s and time left on stderr: renewed in place on a terminal, a line every 10 s elsewhere."""

    def __init__(self, run: Run, first_step: int, *, share: float, interval_s: float = 10.0) -> None:
        self.config, self.name = run.row.train, f"{run.row.name} seed {run.seed}"
        self.share = share  # of the step's groups that this worker sees
        self.terminal = sys.stderr.isatty()
        self.interval_s = 0.5 if self.terminal else interval_s
        self.begun = self.said = (first_step, time.monotonic())
        if first_step:
            self.say(f"going on from step {first_step}")

    def step(self, done: int, losses: Mapping[str, Tensor]) -> None:
        """Say where the run is if the interval has passed."""
        now_s = time.monotonic()
        if now_s - self.said[1] < self.interval_s and done != self.config.steps:
            return
        rate = (done - self.said[0]) / max(now_s - self.said[1], 1e-9)
        overall = (done - self.begun[0]) / max(now_s - self.begun[1], 1e-9)
        left_s = (self.config.steps - done) / overall
        loss = float(torch.stack(list(losses.values())).sum()) / self.share
        self.said = (done, now_s)
        self.say(
            f"step {done}/{self.config.steps}, loss {loss:.3f}, {rate * self.config.global_batch:.1f} images/s, "
            f"{_duration(left_s)} left",
            end="\r" if self.terminal and done < self.config.steps else "\n",
        )

    def say(self, text: str, end: str = "\n") -> None:
        """One line."""
        line = f"{self.name}: {text}"
        print(f"{line:<79}" if self.terminal else line, end=end, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
