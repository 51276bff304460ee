"""One training run, read from top to bottom. Runs alone, in a notebook or under a debugger; Ray Train only
launches it, restarts it and tells each worker its rank. What happens in a step is pipeline.training.step.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from m2f.config import Kernels
from m2f.losses import Divergence
from m2f.weights import read_checkpoint
from m2f.weights.start import freeze, start_network
from pipeline.compute.determinism import any_algorithm, be_deterministic
from pipeline.compute.precision import allow_tf32
from pipeline.compute.resources import share
from pipeline.evaluation.task_metrics import measure, while_training
from pipeline.params.tasks import LABELS, primary
from pipeline.provenance.environment import Environment, environment
from pipeline.runs.checkpoints import (
    checkpoint_path,
    keep_only,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    step_of,
)
from pipeline.runs.curve_file import read_curve
from pipeline.runs.outcome import Diverged, Finished, LastNorm, Stopped, finished_result, note_of, write_note
from pipeline.runs.run import YIELD, Run, reported
from pipeline.storage.files import local_file, sha256
from pipeline.storage.results.rows import BelowReference, BestCheckpoint, TrainedCheckpoint, TrainedCheckpoints
from pipeline.tracking.curve import Curve
from pipeline.training.early_warning import clearly_below_reference, curve_of, described
from pipeline.training.loop_progress import NoCurve, NoProgress, TrainingProgress
from pipeline.training.step import Step, StepDiverged, Training, build, training_step, use_kernels
from pipeline.training.worker import Worker

_STEPS_TO_ESTIMATE = range(5, 20)
"""Steps since a start, counted from 0, by whose time a training is estimated. The first ones are longer: loader
processes start, libraries choose algorithms and memory is taken."""


Report = Callable[[dict[str, Any]], None]


class YieldRequested(Exception):
    """The run has yielded its workers after a checkpoint, as it was asked to: it is to go on from there on others."""


@dataclass(kw_only=True)
class RunState:
    """What a run knows of itself besides its weights; every checkpoint keeps it."""

    train_s: float = 0.0
    """Time in the loop so far, validation included."""
    best: dict[str, Any] | None = None
    """{"step": ..., "value": ...} of the best validation, by the task's first figure."""
    metrics: dict[str, float | None] | None = None
    """Of the newest validation."""
    below_reference: list[dict[str, Any]] = field(default_factory=list)
    """Validations that were clearly below their reference (pipeline.storage.results.rows.BelowReference)."""
    peak_memory_mib: float | None = None
    loss_scale: list[float] | None = None
    """Of a training in fp16 (pipeline.compute.precision.LossScale)."""


def start_from_network(run: Run, training: Training) -> None:
    """Put the whole network's initial weights, if the run has some, into the network."""
    if run.network is not None:
        with local_file(run.network, run.network.stem) as file:  # named by its digest
            start_network(training.model, read_checkpoint(file))


def train(run: Run, report: Report | None = None) -> Finished | None:
    """Train one seed of a row to its last step, from the newest checkpoint if there is one.

    report: is told of every validation, on all workers.

    Returns what `finished.json` says: steps, checkpoints with digests, metrics, time (None but on rank 0, and where the
    early warning stopped it, which `stopped.json` says). Raises Divergence for a non-finite loss or matching cost,
    after saving step, positions and norms in `diverged.json`, and, on rank 0, YieldRequested when it was asked to.
    """
    # here: who only makes a Run does without albumentations and Arrow
    from pipeline.data.loader.device_batches import on_device
    from pipeline.data.loader.train_batches import TrainingOrder, training_batches

    if (result := finished_result(run.run_dir)) is not None:
        return result
    if (diverged := note_of(run.run_dir, Diverged)) is not None:
        raise Divergence(diverged.reason)
    worker, config = Worker.here(), run.row.train
    allow_tf32(config.tf32)
    be_deterministic(config.deterministic, worker.device)
    training = build(
        run.row,
        worker,
        seed=run.seed,
        weights=run.weights,
        groups_at_once=run.groups_at_once,
        checkpoint_activations=run.checkpoint_activations,
    )
    start_from_network(run, training)
    training.model.train()
    freeze(training.model, config.freeze)
    first_step, state = resume(run, training)
    kernels = agreed_kernels(run, training, resumed=first_step > 0)
    groups = share(config.groups, worker=worker.rank, workers=worker.size)
    batches = training_batches(
        TrainingOrder.of(run.row, run.manifest, seed=run.seed),
        first_step=first_step,
        steps=config.steps - first_step,
        image_range=range(groups.start * config.group_size, groups.stop * config.group_size),
        processes=run.loader_processes,
    )
    curve: Curve | NoCurve
    progress: TrainingProgress | NoProgress
    if worker.rank == 0:  # here, where the GPU is: who launches the training may have none
        write_note(run.run_dir, environment(tf32=config.tf32, kernels=kernels, deterministic=config.deterministic))
        curve = Curve(run.run_dir / "curve.jsonl", run.mlflow_run_id, first_step + 1, run_dir=run.run_dir)
        progress = TrainingProgress(run, first_step, share=len(groups) / config.groups)
    else:
        curve = NoCurve()
        progress = NoProgress()
    begun_s, trained_s = time.monotonic(), state.train_s
    step_time = StepTime()
    stopped = False

    with divergence_noted(run, curve):
        for step, batch in enumerate(on_device(batches, worker.device), start=first_step):
            made = training_step(training, batch, step=step)

            done = step + 1
            last = done == config.steps
            logging, validating = last or done % config.log_every == 0, last or done % config.val_interval == 0
            saving = validating or done % config.checkpoint_interval == 0
            if logging or saving:
                training.norms.now()  # nothing of a poisoned step is shown or kept
            points = summed(made, worker) if logging else {}
            progress.step(done, made.losses)
            seconds_per_step = step_time.after(done - first_step)
            if seconds_per_step is not None and worker.device.type == "cuda":
                refuse_if_too_long(run, worker, seconds_per_step=seconds_per_step)
            if saving:
                state.peak_memory_mib = peak_memory_mib(worker, state.peak_memory_mib)  # not validation's
            if validating:
                metrics = validate(run, training, state, done)
                if report is not None:
                    report(reported(run, done, metrics))
                points |= {f"val_{name}": figure for name, figure in metrics.items() if figure is not None}
                progress.validated(done, metrics)
                stopped = fell_below_reference(run, worker, state, progress, done) and not last
            curve.log(done, points)
            if saving:
                state.train_s = trained_s + time.monotonic() - begun_s
                curve.save()  # first: a run that goes on from the checkpoint has its points
                save(run, training, state, done)
                if not (last or stopped) and asked_to_yield(run, worker):
                    curve.close()
                    raise YieldRequested(f"yielded after step {done}, as it was asked to")
            if stopped:
                break

    curve.close()
    if worker.rank != 0:
        return None
    if stopped:
        write_note(run.run_dir, why_stopped(run, state))
        return None
    finished = summary(run, state)
    write_note(run.run_dir, finished)
    return finished


def resume(run: Run, training: Training) -> tuple[int, RunState]:
    """Load the newest checkpoint if there is one: finished steps, and the loop's own state.

    Rank 0 chooses, since a shared file system may show another worker an older folder.
    """
    worker = training.worker
    newest = newest_checkpoint(run.run_dir) if worker.rank == 0 else None
    chosen = torch.tensor(0 if newest is None else step_of(newest), device=worker.device)
    step = int(worker.sum(chosen))
    if step == 0:
        return 0, RunState()
    path = checkpoint_path(run.run_dir, step)
    header = load_checkpoint(path, model=training.model, optimizer=training.optimizer, run_key=run.run_key)
    state = RunState(**header["state"])
    if training.loss_scale is not None and state.loss_scale is not None:
        training.loss_scale.load(state.loss_scale)
    return step, state


def agreed_kernels(run: Run, training: Training, *, resumed: bool) -> str:
    """Use the same kernels on all workers from first to last step: plain or compiled. ValueError where that cannot be.

    A run that goes on keeps what it began with. One that begins takes the row's choice.
    """
    worker, row = training.worker, run.row
    names: tuple[Kernels, ...] = ("auto", "plain", "compiled")
    known = note_of(run.run_dir, Environment) if resumed and worker.rank == 0 else None
    begun_with = names.index(known.kernels or "auto") if known else 0
    begun_with = int(worker.sum(torch.tensor(begun_with, device=worker.device)))
    own = share(row.train.groups, worker=worker.rank, workers=worker.size)
    try:
        return use_kernels(training, names[begun_with] if begun_with else row.train.kernels, len(own))
    except ValueError as error:
        if not begun_with:
            raise
        reason, _, _ = str(error).rpartition(";")  # its advice is for a run that begins
        raise ValueError(
            f"{reason}; the run began with them and keeps them: go on where they can be had, or delete "
            f"{run.run_dir} to begin anew"
        ) from None


def summed(made: Step, worker: Worker) -> dict[str, float]:
    """The curve's point of a step: every loss and their sum, over all workers, learning rate and gradient norm."""
    values = worker.sum(torch.stack(list(made.losses.values())).float())
    losses: dict[str, float] = dict(zip(made.losses, values.tolist(), strict=True))
    return losses | {"loss": sum(losses.values()), "lr": made.lr, "grad_norm": made.grad_norm.item()}


def validate(run: Run, training: Training, state: RunState, done: int) -> dict[str, float | None]:
    """Measure the network on the validation pictures, shared over the workers; the figures, which `state` notes too."""
    worker, row = training.worker, while_training(run.row)
    processes = run.loader_processes if worker.device.type == "cuda" else 0  # a CPU has nothing to do meanwhile
    with any_algorithm():
        part = measure(training.model, run.manifest, row, worker=worker.rank, workers=worker.size, processes=processes)
    metrics = worker.figures(part)
    training.model.train()
    freeze(training.model, row.train.freeze)
    state.metrics = metrics
    value = first_figure(run, state)
    if state.best is None or value > state.best["value"]:
        state.best = {"step": done, "value": value}
    if worker.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return metrics


def first_figure(run: Run, state: RunState) -> float:
    """What the newest validation says of the task's first figure."""
    assert state.metrics is not None
    value = state.metrics[primary(run.row.task)]
    assert value is not None  # TaskMetrics.figures
    return value


def save(run: Run, training: Training, state: RunState, done: int) -> None:
    """Write a checkpoint, on rank 0, and delete those that are neither the newest nor the best."""
    if training.worker.rank != 0:
        return
    save_checkpoint(
        run.run_dir,
        step=done,
        run_key=run.run_key,
        model=training.model,
        optimizer=training.optimizer,
        state=asdict(state) | {"loss_scale": training.loss_scale.state() if training.loss_scale else None},
    )
    keep_only(run.run_dir, {done, state.best["step"]} if state.best else {done})


def asked_to_yield(run: Run, worker: Worker) -> bool:
    """Whether the run is to yield its workers, which rank 0 finds out; the others' connections break when it does."""
    return worker.rank == 0 and (run.run_dir / YIELD).exists()


@contextlib.contextmanager
def divergence_noted(run: Run, curve: Curve | NoCurve) -> Iterator[None]:
    """Save what is known of a step that diverges in diverged.json, on the worker that finds it."""
    try:
        yield
    except StepDiverged as error:
        curve.save()
        message = f"row {run.row.name}, seed {run.seed} diverged in step {error.step}: {error}"
        last = None
        if error.last_norm is not None:
            last = LastNorm(step=error.last_norm[0], norm=repr(error.last_norm[1]))
        write_note(
            run.run_dir,
            Diverged(
                reason=message,
                step=error.step,
                positions=tuple(error.batch.positions),
                names=tuple(error.batch.names),
                last_norm=last,
            ),
        )
        raise Divergence(message) from None


def peak_memory_mib(worker: Worker, before: float | None) -> float | None:
    """Largest GPU memory that a worker has held in training, in MiB, `before` included; None without GPUs."""
    if worker.device.type != "cuda":
        return None
    return worker.largest(max(before or 0.0, torch.cuda.max_memory_allocated() / 2**20))


def fell_below_reference(
    run: Run, worker: Worker, state: RunState, progress: TrainingProgress | NoProgress, done: int
) -> bool:
    """Whether the early warning stops the run after this validation, the same on every worker; notes its warnings."""
    twice = worker.rank == 0 and below_reference_again(run, state, progress, done)
    return run.row.early_warning.stop and bool(worker.sum(torch.tensor(int(twice), device=worker.device)))


def below_reference_again(run: Run, state: RunState, progress: TrainingProgress | NoProgress, done: int) -> bool:
    """Whether this validation and the one before are clearly below their reference; warns of this one if it is."""
    figure = f"val_{primary(run.row.task)}"
    below_reference = clearly_below_reference(
        done,
        first_figure(run, state),
        steps=run.row.train.steps,
        published=run.published_curve,
        other_seeds=[curve_of(read_curve(folder / "curve.jsonl"), figure) for folder in run.other_seeds],
        config=run.row.early_warning,
    )
    if below_reference is None:
        return False
    before = state.below_reference[-1]["step"] if state.below_reference else None
    state.below_reference.append(asdict(below_reference))
    progress.warned(below_reference)
    return bool(before == done - run.row.train.val_interval)


def why_stopped(run: Run, state: RunState) -> Stopped:
    """What stopped.json says: why the early warning stopped a run, and how it goes on."""
    first, second = below_reference_so_far(state)[-2:]
    reason = (
        f"row {run.row.name}, seed {run.seed} was clearly below its reference at steps {first.step} and {second.step} "
        f"({described(second, LABELS[primary(run.row.task)])}); to go on, set "
        f"rows.{run.row.name}.early_warning.stop to false and run dvc repro -f train@{run.row.name}"
    )
    return Stopped(reason=reason, step=second.step, below_reference=below_reference_so_far(state))


class StepTime:
    """Seconds of a step, by the clock: the mean of _STEPS_TO_ESTIMATE."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun_s = 0.0

    def after(self, steps: int) -> float | None:
        """To be called after every step with the number of steps since the start; the mean once it is known, and None
        before and after."""
        if steps == _STEPS_TO_ESTIMATE.start:
            self._begun_s = self._clock()
        if steps != _STEPS_TO_ESTIMATE.stop:
            return None
        return (self._clock() - self._begun_s) / len(_STEPS_TO_ESTIMATE)


def refuse_if_too_long(run: Run, worker: Worker, *, seconds_per_step: float) -> None:
    """ValueError when the whole run would cost more GPU-hours than the row allows."""
    hours = seconds_per_step * run.row.train.steps * worker.size / 3600
    if hours > run.row.max_gpu_hours:
        raise ValueError(
            f"row {run.row.name}, seed {run.seed} would take about {hours:.1f} GPU-hours "
            f"({seconds_per_step:.2f} s a step on {worker.size} GPUs); set rows.{run.row.name}.max_gpu_hours "
            f"(now {run.row.max_gpu_hours:g}) above that to allow it"
        )


def summary(run: Run, state: RunState) -> Finished:
    """What finished.json says."""
    steps, best = run.row.train.steps, state.best
    assert best is not None  # the last step is validated

    def checkpoint(step: int) -> TrainedCheckpoint:
        path = checkpoint_path(run.run_dir, step)
        return TrainedCheckpoint(step=step, path=f"{path.parent.name}/{path.name}", sha256=sha256(path))

    return Finished(
        run_key=run.run_key,
        seed=run.seed,
        steps=steps,
        checkpoints=TrainedCheckpoints(
            last=checkpoint(steps),
            best=BestCheckpoint(**asdict(checkpoint(best["step"])), figure=primary(run.row.task), value=best["value"]),
        ),
        metrics=state.metrics or {},
        below_reference=below_reference_so_far(state),
        peak_memory_mib=state.peak_memory_mib,
        train_s=round(state.train_s, 1),
        images_per_s=round(steps * run.row.train.global_batch / max(state.train_s, 1e-9), 2),
    )


def below_reference_so_far(state: RunState) -> tuple[BelowReference, ...]:
    """The run's early warnings so far."""
    return tuple(BelowReference(**entry) for entry in state.below_reference)
