"""Training batches to measure: of a dataset's shards, or generated."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from pipeline.params.schema import Row

if TYPE_CHECKING:
    from pipeline.data.loader.train_batches import Batch
    from pipeline.storage.results.data import Manifest
    from pipeline.training.worker import Worker

MASKS = 10
"""True masks of a generated training picture. ADE20K's pictures hold 10.5 classes on average, COCO's 7.3 objects."""


def batches_of(row: Row, manifest: Manifest | None, groups: int, worker: Worker, *, steps: int) -> Iterator[Batch]:
    """Batches of this many groups, this worker's part of the steps; of `steps` steps if they are read from shards."""
    count = groups * row.train.group_size
    places = range(worker.rank * count, (worker.rank + 1) * count)
    if manifest is None:
        for step in itertools.count(worker.rank, worker.size):
            yield cast("Batch", _Generated.of(row, count, step))
        return
    from pipeline.data.loader.train_batches import TrainingOrder, training_batches

    order = TrainingOrder.of(row, manifest, seed=0)
    yield from training_batches(order, first_step=0, steps=steps, image_range=places)


def masks_of(row: Row) -> int:
    """True masks of a generated picture."""
    return min(MASKS, row.model.num_classes)


@dataclass(frozen=True)
class _Generated:
    """A batch of noise, with horizontal bands for masks; the fields of pipeline.data.loader.train_batches.Batch that a
    step reads."""

    images: Tensor
    sizes: Tensor
    segments: Tensor | None
    masks: tuple[Tensor, ...] | None
    labels: tuple[Tensor, ...]
    seeds: tuple[int, ...]

    @classmethod
    def of(cls, row: Row, count: int, step: int) -> _Generated:
        height, width = row.train.augmentation.crop
        draws = torch.Generator().manual_seed(step)
        masks = masks_of(row)
        bands_HW = (torch.arange(height) * masks // height).to(torch.uint8)[:, None].expand(height, width).contiguous()
        labels = tuple(torch.randperm(row.model.num_classes, generator=draws)[:masks] for _ in range(count))
        apart_THW = bands_HW == torch.arange(masks)[:, None, None]
        return cls(
            images=torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=draws),
            sizes=torch.tensor([[height, width]] * count),
            segments=None if row.task == "instance" else bands_HW.repeat(count, 1, 1),
            masks=(apart_THW,) * count if row.task == "instance" else None,
            labels=labels,
            seeds=tuple(step * count + place for place in range(count)),
        )
