"""Pictures of a dataset with their labels: as shards hold them, and as the loader gives them to a training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.data.images.codecs import decode_masks, nothing_of
from pipeline.data.images.draw import stacked
from pipeline.data.loader.train_batches import TrainingOrder, training_batches
from pipeline.data.shards.reader import SplitReader
from pipeline.prediction.annotations import Objects

if TYPE_CHECKING:
    from pipeline.data.loader.train_batches import Batch
    from pipeline.data.shards.reader import StoredRecord
    from pipeline.params.schema import Row, Task
    from pipeline.storage.results.data import Manifest


@dataclass(frozen=True, eq=False, kw_only=True)
class Sample:
    """A picture with its labels."""

    name: str
    image: np.ndarray
    """(h, w, 3) uint8 RGB."""
    objects: Objects
    boxes: np.ndarray
    """(N, 4) x1, y1, x2, y2 in pixels, of the things."""
    box_labels: Sequence[int]
    """The class of every box."""

    @property
    def counts(self) -> Mapping[int, int]:
        """Objects of every class that is there; of a class without objects, 1."""
        present = np.unique(self.objects.ids)
        classes = {self.objects.labels[index]: 1 for index in present[present >= 0].tolist()}
        return dict(sorted({**classes, **Counter(self.box_labels)}.items()))


@dataclass(frozen=True, kw_only=True)
class StoredSamples:
    """Records of a split, each of the kinds with the most telling first."""

    crowded: Sequence[Sample]
    smallest: Sequence[Sample]
    spread: Sequence[Sample]


def stored_samples(manifest: Manifest, split: str, *, task: Task, count: int) -> StoredSamples:
    """The `count` records with the most things, those of the fewest pixels, and some spread evenly over the split."""
    reader = SplitReader.of(manifest, split, task)
    things, height, width = reader.columns("things", "height", "width")
    crowded = np.argsort(-things.astype(np.int64), kind="stable")
    crowded = crowded[things[crowded] > 0]
    smallest = np.argsort(height.astype(np.int64) * width, kind="stable")
    spread = np.unique(np.linspace(0, reader.records - 1, min(count, reader.records)).round().astype(int))
    chosen = [[_stored(reader[place]) for place in places[:count].tolist()] for places in (crowded, smallest, spread)]
    return StoredSamples(crowded=chosen[0], smallest=chosen[1], spread=chosen[2])


def _stored(record: StoredRecord) -> Sample:
    things = record.things()
    if record.has_segments():
        segments = record.segments()
        ids = np.where(segments.ids == nothing_of(segments.ids), -1, segments.ids.astype(np.int32))
        objects = Objects(ids=ids, labels=segments.classes.tolist())
    else:
        by_size = np.argsort(things.areas, kind="stable")  # the smallest on top
        masks = decode_masks([things.run_lengths[place] for place in by_size], record.size)
        objects = Objects(ids=stacked(masks, record.size), labels=things.classes[by_size].tolist())
    return Sample(
        name=record.name,
        image=np.array(record.image()),
        objects=objects,
        boxes=things.boxes,
        box_labels=things.classes.tolist(),
    )


def training_samples(manifest: Manifest, row: Row, *, seed: int, count: int) -> list[Sample]:
    """The first `count` pictures of a training, resized, cropped, flipped and distorted as it sees them; the smallest
    first, and of equal ones the most crowded. Padding is cut off."""
    order = TrainingOrder.of(row, manifest, seed=seed)
    batch = row.train.global_batch
    found: list[Sample] = []
    for step_batch in training_batches(order, first_step=0, steps=-(-count // batch), image_range=range(batch)):
        found += _augmented(step_batch, manifest, row)
    return sorted(found[:count], key=lambda each: (each.image.shape[0] * each.image.shape[1], -len(each.boxes)))


def _augmented(batch: Batch, manifest: Manifest, row: Row) -> list[Sample]:
    things = {place for place, name in enumerate(manifest.class_names_of(row.task)) if name in manifest.thing_classes}
    found = []
    for place, (height, width) in enumerate(batch.sizes.tolist()):
        labels = batch.labels[place].tolist()
        if batch.masks is not None:
            masks = batch.masks[place][:, :height, :width].numpy().astype(np.uint8)
            ids = stacked(masks, (height, width))
        else:
            assert batch.segments is not None
            stored = batch.segments[place, :height, :width].numpy()
            ids = np.where(stored < len(labels), stored.astype(np.int32), -1)
            masks = ids[None] == np.arange(len(labels))[:, None, None]
        kept = [index for index, label in enumerate(labels) if label in things and masks[index].any()]
        kept = kept if row.task != "semantic" else []  # a class is no object
        found.append(
            Sample(
                name=f"{batch.names[place]}, position {batch.positions[place]}",
                image=batch.images[place, :, :height, :width].permute(1, 2, 0).numpy(),
                objects=Objects(ids=ids, labels=labels),
                boxes=np.array([_box(masks[index]) for index in kept], np.float64).reshape(-1, 4),
                box_labels=[labels[index] for index in kept],
            )
        )
    return found


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """x1, y1, x2, y2 around a mask that has a pixel."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
