"""One training run, read from top to bottom. Runs alone, in a notebook or under a debugger; Ray Train only
launches it, restarts it and tells each worker its rank.

A step is the recipe's, whatever the number of workers: `groups` groups of `group_size` pictures. Every worker takes
some whole groups; its loss is the sum over them divided by the recipe's number of groups, and gradients are summed.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from m2f import Target, build_model
from m2f.draws import mix
from m2f.losses import Divergence, group_totals, set_losses
from m2f.model import normalise
from m2f.optim import build_optimizer, learning_rate_factor
from m2f.weights import load_backbone, read_checkpoint
from pipeline.checkpoints import (
    checkpoint_path,
    keep_only,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    step_of,
)
from pipeline.cluster import needs_synchronised_norm, share
from pipeline.early_warning import clearly_behind, curve_of, described
from pipeline.files import sha256
from pipeline.measures import Measures, measure, while_training
from pipeline.params import Row
from pipeline.precision import allow_tf32
from pipeline.provenance import environment
from pipeline.results import Behind, BestCheckpoint, TrainedCheckpoint, TrainedCheckpoints
from pipeline.run_folder import Diverged, Finished, LastNorm, Stopped, finished_result, note_of, write_note
from pipeline.storage import local_file
from pipeline.tasks import LABELS, in_words, primary
from pipeline.tracking import Curve, read_curve, set_tags

if TYPE_CHECKING:
    from pipeline.loader import Batch

_INIT, _STEPS_TO_ESTIMATE = 4, 20


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


@dataclass(frozen=True, slots=True)
class Worker:
    """This process's place: rank among `size` workers, and its device."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def here(cls) -> Worker:
        """From torch.distributed when it is initialised; alone otherwise."""
        alone = not (dist.is_available() and dist.is_initialized())
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        return cls(0, 1, device) if alone else cls(dist.get_rank(), dist.get_world_size(), device)

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor summed over workers, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, value: float) -> float:
        """The largest of the workers' values, the same on every worker."""
        if self.size > 1:
            tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
            return tensor.item()
        return value

    def figures(self, measures: Measures) -> dict[str, float | None]:
        """The figures of all workers' measures together, the same on every worker."""
        if self.size == 1:
            return measures.figures()
        parts: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(measures, parts)
        for part in (parts or [])[1:]:
            measures.merge(part)
        figures: list[Any] = [measures.figures() if self.rank == 0 else None]
        dist.broadcast_object_list(figures)
        result: dict[str, float | None] = figures[0]
        return result


def train(run: Run) -> Finished | None:
    """Train one seed of a row to its last step, from the newest checkpoint if there is one.

    Returns what `finished.json` says: steps, checkpoints with digests, metrics, time (None but on rank 0, and where the
    early warning stopped it, which `stopped.json` says). Raises Divergence for a non-finite loss or matching cost,
    after saving step, positions and norms in `diverged.json`, and, on rank 0, Left when it was asked to leave.
    """
    from pipeline.loader import training_batches  # here: a benchmark can do without albumentations and Arrow

    if (finished := finished_result(run.run_dir)) is not None:
        return finished
    if (diverged := note_of(run.run_dir, Diverged)) is not None:
        raise Divergence(diverged.reason)
    worker, config = Worker.here(), run.row.train
    allow_tf32(config.tf32)
    model, gradients = build(run, worker)
    optimizer = build_optimizer(model, config.optimizer)
    first_step, state = resume(run, worker, model, optimizer)
    base_lrs = [group["lr"] for group in optimizer.param_groups]

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
        write_note(run.run_dir, environment(tf32=config.tf32))
    curve = None
    if chief:
        curve = Curve(run.run_dir / "curve.jsonl", run.mlflow_run_id, first_step + 1, run_dir=run.run_dir)
    progress = StepProgress(run, first_step, share=len(group_range) / config.groups) if chief else None
    begun_s, trained_s = time.monotonic(), state["train_s"]
    checked, stop = NormCheck(run, curve), False
    model.train()

    for step, batch in enumerate(batches, start=first_step):
        factor = learning_rate_factor(step, steps=config.steps, schedule=config.schedule)
        for group, lr in zip(optimizer.param_groups, base_lrs, strict=True):
            group["lr"] = lr * factor
        gradients.zero_()
        try:
            losses = backward(model, batch, run, worker)
        except Divergence as error:
            raise checked.stop(step, batch, str(error)) from None
        checked.now()  # the step before this one: its norm has long arrived
        worker.sum(gradients)
        norm = torch.linalg.vector_norm(gradients)
        checked.expect(step, batch, norm)
        gradients.mul_((config.optimizer.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        optimizer.step()

        done = step + 1
        last = done == config.steps
        logging, validating = last or done % config.log_every == 0, last or done % config.val_interval == 0
        saving = validating or done % config.checkpoint_interval == 0
        if logging or saving:
            checked.now()  # nothing of a poisoned step is shown or kept
        points: dict[str, float] = {}
        if logging:
            values = worker.sum(torch.stack(list(losses.values())).float())
            points = dict(zip(losses, values.tolist(), strict=True))
            points |= {"loss": sum(points.values()), "lr": max(base_lrs) * factor, "grad_norm": norm.item()}
        if progress is not None:
            progress.step(done, losses)
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
        return None
    curve.close()
    if stop:
        write_note(run.run_dir, Stopped(reason=stop_reason(run, state), step=done, behind=_behind(state)))
        return None
    result = summary(run, state)
    write_note(run.run_dir, result)
    return result


def build(run: Run, worker: Worker) -> tuple[nn.Module, Tensor]:
    """The network at its start and the flat buffer all its gradients are views of.

    Every worker draws the same initial weights. One buffer makes the sum over workers, the norm and the
    clipping one operation each, in the same order in every run.
    """
    torch.manual_seed(mix(run.seed, _INIT))
    model = build_model(run.row.model)
    if run.weights is not None:
        with local_file(run.weights, run.weights.stem) as file:  # named by its digest
            load_backbone(model, read_checkpoint(file))
    if worker.size > 1 and needs_synchronised_norm(run.row):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(worker.device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.zeros(sum(p.numel() for p in trained), device=worker.device)
    for parameter, view in zip(trained, gradients.split([p.numel() for p in trained]), strict=True):
        parameter.grad = view.view_as(parameter)
    return model, gradients


def resume(run: Run, worker: Worker, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, Any]]:
    """Load the newest checkpoint if there is one: finished steps, and the loop's own state.

    Rank 0 chooses, since a shared file system may show another worker an older folder.
    """
    newest = newest_checkpoint(run.run_dir) if worker.rank == 0 else None
    chosen = torch.tensor(0 if newest is None else step_of(newest), device=worker.device)
    step = int(worker.sum(chosen))
    if step == 0:
        return 0, {"train_s": 0.0, "best": None, "metrics": None, "behind": [], "peak_memory_mib": None}
    path = checkpoint_path(run.run_dir, step)
    return step, load_checkpoint(path, model=model, optimizer=optimizer, run_key=run.run_key)["state"]


def backward(model: nn.Module, batch: Batch, run: Run, worker: Worker) -> dict[str, Tensor]:
    """Add this worker's share of the step's gradient; returns its share of every loss, detached."""
    config, device = run.row.train, worker.device
    targets = make_targets(batch, device)
    size, groups = config.group_size, len(targets) // config.group_size
    totals = [
        group_totals(
            [len(target) for target in targets[g * size : (g + 1) * size]],
            queries=run.row.model.query_decoder.queries,
            config=run.row.model.loss,
        )
        for g in range(groups)
    ]
    own_masks = torch.tensor(float(sum(total.masks for total in totals)), device=device)
    num_masks = (worker.sum(own_masks) / config.groups).clamp(min=1)
    at_once = run.groups_at_once or groups
    if at_once < groups and needs_synchronised_norm(run.row):
        raise ValueError(
            f"row {run.row.name} normalises with statistics of the whole step, so its groups cannot be taken {at_once} "
            f"at a time; unset M2F_GROUPS_AT_ONCE, and use more workers if {groups} groups do not fit in memory"
        )
    sums: dict[str, Tensor] = {}
    for start in range(0, groups, at_once):
        stop = min(start + at_once, groups)
        part = slice(start * size, stop * size)
        images = normalise(batch.images[part].to(device, non_blocking=True), batch.sizes[part])
        seeds = batch.seeds[part]
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            prediction = model(images, seeds=seeds)
        losses = set_losses(
            prediction,
            targets[part],
            num_masks=num_masks,
            config=run.row.model.loss,
            seeds=seeds,
            class_weight_totals=[total.class_weight for total in totals[start:stop] for _ in range(size)],
        )
        (sum(losses.values()) / config.groups).backward()  # type: ignore[union-attr]
        for name, value in losses.items():
            sums[name] = sums.get(name, 0) + value.detach() / config.groups
    return sums


def make_targets(batch: Batch, device: torch.device) -> list[Target]:
    """One target per picture, from the batch's maps of mask indices or, where masks overlap, from the masks."""
    labels = [labels_T.to(device, non_blocking=True) for labels_T in batch.labels]
    if batch.masks is not None:
        masks = [masks_THW.to(device, non_blocking=True) for masks_THW in batch.masks]
        return [Target(labels_T, masks_THW) for labels_T, masks_THW in zip(labels, masks, strict=True)]
    assert batch.segments is not None
    segments = batch.segments.to(device, non_blocking=True)
    return [Target.from_segments(labels_T, map_HW) for labels_T, map_HW in zip(labels, segments, strict=True)]


class NormCheck:
    """Stops a run whose gradient is not finite, without waiting for the device in every step.

    The norm of a step is read after the next step's matching, which waits for the device anyway, and before
    anything is saved.
    """

    def __init__(self, run: Run, curve: Curve | None) -> None:
        self.run, self.curve = run, curve
        self.pending: tuple[int, Batch, Tensor] | None = None

    def expect(self, step: int, batch: Batch, norm: Tensor) -> None:
        """Remember a step's gradient norm."""
        self.pending = (step, batch, norm)

    def now(self) -> None:
        """Read the remembered norm; raises Divergence when it is not finite."""
        if self.pending is None:
            return
        step, batch, norm = self.pending
        self.pending = None
        if not math.isfinite(norm.item()):
            raise self.stop(step, batch, f"the gradient's norm is {norm.item()}")

    def stop(self, step: int, batch: Batch, reason: str) -> Divergence:
        """Save what is known in diverged.json; the exception to raise. A retry would replay it, so none follows."""
        norm = None if self.pending is None else LastNorm(step=self.pending[0], norm=repr(self.pending[2].item()))
        message = f"row {self.run.row.name}, seed {self.run.seed} diverged in step {step}: {reason}"
        if self.curve is not None:
            self.curve.save()
        write_note(
            self.run.run_dir,
            Diverged(
                reason=message,
                step=step,
                positions=tuple(batch.positions),
                names=tuple(batch.names),
                last_norm=norm,
            ),
        )
        return Divergence(message)


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
    first, second = _behind(state)[-2:]
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


def summary(run: Run, state: Mapping[str, Any]) -> Finished:
    """What finished.json says."""
    steps, best = run.row.train.steps, state["best"]

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
        metrics=state["metrics"],
        behind=_behind(state),
        peak_memory_mib=state["peak_memory_mib"],
        train_s=round(state["train_s"], 1),
        images_per_s=round(steps * run.row.train.global_batch / max(state["train_s"], 1e-9), 2),
    )


def _behind(state: Mapping[str, Any]) -> tuple[Behind, ...]:
    """The run's early warnings so far."""
    return tuple(Behind(**entry) for entry in state["behind"])


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
