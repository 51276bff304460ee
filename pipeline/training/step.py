"""One step of a training, which the loop makes until the end of its schedule and the benchmark a few times.

A step is the recipe's, whatever the number of workers: `groups` groups of `group_size` pictures. Every worker takes
some whole groups; its loss is the sum over them divided by the recipe's number of groups, and gradients are summed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from m2f import Target, build_model
from m2f.batch_norm import step_batch_norm
from m2f.config import Kernels
from m2f.constants import to_device
from m2f.draws import mix
from m2f.kernels.build import use
from m2f.losses import Divergence, group_totals, set_losses
from m2f.model import Mask2Former, normalise
from m2f.optim import build_optimizer, learning_rate_factor
from m2f.weights import load_backbone, read_checkpoint
from m2f.weights.start import freeze
from pipeline.compute.compiling import compile_training, keep_compiled_code
from pipeline.compute.gradients import GradientSums, flat_gradients
from pipeline.compute.host_copy import HostCopy
from pipeline.compute.precision import LossScale, in_precision
from pipeline.params.schema import needs_synchronised_norm
from pipeline.storage.files import local_file
from pipeline.training.worker import Worker

if TYPE_CHECKING:
    from pipeline.data.loader.train_batches import Batch
    from pipeline.params.schema import Row
    from pipeline.storage.stores import StoredPath

_INIT = 4
"""Tells the draws of the initial weights from other uses of a run's seed."""


class StepDiverged(Divergence):
    """A step's matching cost, loss or gradient is not finite. A retry would replay it."""

    def __init__(self, reason: str, *, step: int, batch: Batch, last_norm: tuple[int, float] | None) -> None:
        super().__init__(reason)
        self.step, self.batch = step, batch
        self.last_norm = last_norm
        """(step, norm) of the gradient before, where it was not read yet."""


class NormCheck:
    """Finds a gradient that is not finite, without waiting for the device in every step.

    The norm of a step is read after the next step's matching, when it has arrived long before; whoever shows or keeps
    something of a step reads it earlier.
    """

    def __init__(self) -> None:
        self._pending: tuple[int, Batch, HostCopy] | None = None

    def expect(self, step: int, batch: Batch, norm: Tensor) -> None:
        """Remember a step's gradient norm, and send it to the host."""
        self._pending = (step, batch, HostCopy.of(norm))

    def now(self) -> None:
        """Read the remembered norm; raises StepDiverged when it is not finite."""
        if self._pending is None:
            return
        step, batch, norm = self._pending
        self._pending = None
        if not math.isfinite(norm.item()):
            raise self.diverged(step, batch, f"the gradient's norm is {norm.item()}")

    def diverged(self, step: int, batch: Batch, reason: str) -> StepDiverged:
        """The exception to raise for a step, with the norm that is still to be read."""
        last = None if self._pending is None else (self._pending[0], self._pending[2].item())
        return StepDiverged(reason, step=step, batch=batch, last_norm=last)


@dataclass(frozen=True, kw_only=True, eq=False)
class Training:
    """The network in training, and all else that its steps have in common."""

    row: Row
    worker: Worker
    model: Mask2Former
    gradients: Tensor
    """Flat: the gradients of all trained parameters are views of it (`flat_gradients`)."""
    sums: GradientSums | None
    """Over workers; None: there is one."""
    optimizer: torch.optim.Optimizer
    base_lrs: tuple[float, ...]
    """Learning rates of the optimiser's parameter groups before the schedule."""
    groups_at_once: int | None
    """Groups per forward pass; None: all of the worker's."""
    norms: NormCheck
    loss_scale: LossScale | None
    """None: the row does not train in fp16."""


@dataclass(frozen=True, eq=False)
class Step:
    """What is known of a finished step, without waiting for the device."""

    losses: Mapping[str, Tensor]
    """This worker's share of every loss, detached."""
    grad_norm: Tensor
    """Of the gradient summed over workers, before clipping; 0: the step is left out (LossScale)."""
    lr: float
    """The largest of the parameter groups' learning rates."""


def build(
    row: Row,
    worker: Worker,
    *,
    seed: int,
    weights: StoredPath | None = None,
    groups_at_once: int | None = None,
    checkpoint_activations: bool = False,
) -> Training:
    """A training before its first step; `weights`: converted initial weights of the backbone.

    Every worker draws the same initial weights. One flat buffer of gradients makes the norm and the clipping one
    operation each, and the sum over workers a few large ones, in the same order in every run.
    """
    torch.manual_seed(mix(seed, _INIT))
    model = build_model(row.model)
    if weights is not None:
        with local_file(weights, weights.stem) as file:  # named by its digest
            load_backbone(model, read_checkpoint(file))
    if worker.size > 1 and needs_synchronised_norm(row):
        step_batch_norm(model, worker.sum)
    model.to(worker.device)
    if checkpoint_activations:
        model.checkpoint_activations()
    freeze(model, row.train.freeze)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = flat_gradients(parameters)
    optimizer = build_optimizer(model, row.train.optimizer)
    return Training(
        row=row,
        worker=worker,
        model=model,
        gradients=gradients,
        sums=GradientSums(parameters, gradients) if worker.size > 1 else None,
        optimizer=optimizer,
        base_lrs=tuple(group["lr"] for group in optimizer.param_groups),
        groups_at_once=groups_at_once,
        norms=NormCheck(),
        loss_scale=LossScale(worker.device) if row.train.precision == "fp16" else None,
    )


def use_kernels(training: Training, choice: Kernels, groups: int) -> Literal["plain", "compiled"]:
    """Use the same kernels on all workers, and compile the network for steps of so many groups on this one; what is
    used. All workers call it. ValueError where `choice` is compiled and that cannot be.

    auto is plain where a worker has no C compiler, or no Triton for its GPU, or cannot compile its network.
    """
    worker = training.worker
    device = worker.device.type

    def all_can(this: bool) -> bool:
        return worker.largest(float(not this)) == 0

    try:
        if device == "cuda":
            keep_compiled_code()
        compiled = all_can(use(choice, device=device) == "compiled")
        if compiled and device == "cuda":
            reason = _compile(training, groups)
            compiled = all_can(not reason)
            if reason and choice == "compiled":
                raise ValueError(f"kernels is compiled, but {reason}; set it to plain, or to auto")
    except ValueError as error:
        raise ValueError(f"rows.{training.row.name}.train.{error}") from None
    if not compiled:
        training.model.uncompile()
        use("plain", device=device)
    return "compiled" if compiled else "plain"


def _compile(training: Training, groups: int) -> str:
    """Compile the network for steps of so many groups on this worker; why that cannot be, empty: it is done.

    In a row whose norms are synchronised, it is to fail on all workers or on none: they would wait for sums of one that
    fails alone.
    """
    row, worker, device = training.row, training.worker, training.worker.device
    count = (training.groups_at_once or groups) * row.train.group_size
    images = torch.zeros(count, 3, *row.train.augmentation.crop, device=device)
    if worker.rank == 0:
        said = f"{row.name}: compiling the network, which takes longest the first time on a sort of GPU"
        print(said, file=sys.stderr, flush=True)
    try:
        with in_precision(row.train.precision, device):
            compile_training(training.model, images, range(count))
    except RuntimeError as error:
        print(f"{error}: PyTorch's own operations are used, which are slower", file=sys.stderr, flush=True)
        return str(error)
    return ""


def training_step(training: Training, batch: Batch, *, step: int) -> Step:
    """Make step `step` of the row's schedule, counted from 0, with this worker's part of the batch.

    Raises StepDiverged for a matching cost that is not finite, or for the gradient's norm of the step before.
    """
    config, gradients = training.row.train, training.gradients
    factor = learning_rate_factor(step, steps=config.steps, schedule=config.schedule)
    for group, lr in zip(training.optimizer.param_groups, training.base_lrs, strict=True):
        group["lr"] = lr * factor
    gradients.zero_()
    try:
        losses = backward(training, batch)
    except Divergence as error:
        raise training.norms.diverged(step, batch, str(error)) from None
    if training.sums is not None:
        training.sums.wait()
    training.norms.now()  # the step before this one: the device has finished it
    norm = to_check = torch.linalg.vector_norm(gradients)
    left_out = None
    if training.loss_scale is not None:
        norm, to_check, left_out = training.loss_scale.norm(norm)
    training.norms.expect(step, batch, to_check)
    clip = (config.optimizer.clip_norm / (norm + 1e-6)).clamp(max=1.0)
    gradients.mul_(clip if training.loss_scale is None else training.loss_scale.factor(clip))
    if training.loss_scale is not None and left_out is not None:
        training.optimizer.found_inf = left_out  # type: ignore[attr-defined]  # the fused AdamW leaves the step out
        training.loss_scale.update(left_out)
    training.optimizer.step()
    return Step(losses, grad_norm=norm, lr=max(training.base_lrs) * factor)


def backward(training: Training, batch: Batch) -> dict[str, Tensor]:
    """Add this worker's share of the step's gradient; returns its share of every loss, detached."""
    row, config, worker, device = training.row, training.row.train, training.worker, training.worker.device
    targets = make_targets(batch, device)
    size, groups = config.group_size, len(targets) // config.group_size
    totals = [
        group_totals(
            [len(target) for target in targets[g * size : (g + 1) * size]],
            queries=row.model.query_decoder.queries,
            config=row.model.loss,
            labels=batch.labels[g * size : (g + 1) * size],
        )
        for g in range(groups)
    ]
    own_masks = to_device(torch.tensor(float(sum(total.masks for total in totals))), device)
    num_masks = (worker.sum(own_masks) / config.groups).clamp(min=1)
    at_once = training.groups_at_once or groups
    if at_once < groups and needs_synchronised_norm(row):
        raise ValueError(
            f"row {row.name} normalises with statistics of the whole step, so its groups cannot be taken {at_once} "
            f"at a time; unset M2F_GROUPS_AT_ONCE, and use more workers if {groups} groups do not fit in memory"
        )
    sums: dict[str, Tensor] = {}
    for start in range(0, groups, at_once):
        stop = min(start + at_once, groups)
        part = slice(start * size, stop * size)
        images = normalise(to_device(batch.images[part], device), to_device(batch.sizes[part], device))
        seeds = batch.seeds[part]
        with in_precision(config.precision, device):
            prediction = training.model(images, seeds=seeds)
        losses = set_losses(
            prediction,
            targets[part],
            num_masks=num_masks,
            config=row.model.loss,
            seeds=seeds,
            class_weight_totals=[total.class_weight for total in totals[start:stop] for _ in range(size)],
        )
        if training.sums is not None and stop == groups:
            training.sums.begin()
        loss: Tensor = sum(losses.values()) / config.groups  # type: ignore[assignment]
        (training.loss_scale.scaled(loss) if training.loss_scale else loss).backward()
        for name, value in losses.items():
            sums[name] = sums.get(name, 0) + value.detach() / config.groups
    return sums


def make_targets(batch: Batch, device: torch.device) -> list[Target]:
    """One target per picture, from the batch's maps of mask indices or, where masks overlap, from the masks."""
    labels = [to_device(labels_T, device) for labels_T in batch.labels]
    if batch.masks is not None:
        masks = [to_device(masks_THW, device) for masks_THW in batch.masks]
        return [Target(labels_T, masks_THW) for labels_T, masks_THW in zip(labels, masks, strict=True)]
    assert batch.segments is not None
    segments = to_device(batch.segments, device)
    return [Target.from_segments(labels_T, map_HW) for labels_T, map_HW in zip(labels, segments, strict=True)]
