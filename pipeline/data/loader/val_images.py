"""Validation pictures with their truth at the original size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.data.images.codecs import decode_segments
from pipeline.data.images.resize import network_image
from pipeline.data.loader.processes import load_items
from pipeline.data.loader.targets import close_gaps, renumber
from pipeline.data.shards.reader import SplitReader, StoredRecord, Things

if TYPE_CHECKING:
    from pipeline.params.schema import Task, TestConfig
    from pipeline.storage.results.data import Manifest


@dataclass(frozen=True, eq=False)
class TrueInstances:
    """All N annotated things of a picture, crowds included, for InstanceMetric."""

    run_lengths: list[dict[str, Any]]
    """pycocotools' {"size": [h, w], "counts": bytes} of every mask."""
    labels: Tensor
    """(N,) int64: dataset classes or, for the task instance, places among the things."""
    areas: Tensor
    """(N,) float64 pixels, as annotated."""
    crowd: Tensor
    """(N,) bool."""


@dataclass(frozen=True, eq=False)
class ValImage:
    """One validation picture, resized for the network, with its truth at the original size."""

    image: Tensor
    """(3, H, W) uint8 RGB, resized, not padded."""
    original_size: tuple[int, int]
    """(height, width) of the labels."""
    label_map: Tensor | None
    """(h, w) class ids, crowds included, of the segments or, where the dataset has them, of its own label map; uint8
    with 255 or, of more than 255 classes, int32 with -1 for nothing. None without segments."""
    segments: Tensor | None
    """(h, w) index into `labels`; uint8 with 255, or int32 with -1, for nothing. None without segments."""
    labels: Tensor
    """(T,) int64 class of every segment in the picture, by rising id; where it has a label map of its own, also of
    those without pixels."""
    crowd: Tensor
    """(T,) bool: the segment stands for many objects."""
    instances: TrueInstances | None
    """None for the task semantic."""
    original: Tensor | None
    """(3, h, w) uint8 RGB, the picture as it is. None unless `test.ms_flip` or `test.window` is set."""
    name: str
    index: int
    """Its place in the split."""
    of_no_class: Tensor | None = None
    """(h, w) bool: nothing in `segments`, but an object of none of the classes. None: the dataset does not say."""


def validation_images(
    manifest: Manifest,
    test: TestConfig,
    *,
    task: Task = "semantic",
    places: Sequence[int] | None = None,
    processes: int = 0,
) -> Iterator[ValImage]:
    """The validation pictures at these places of the shards' order; None: all. ValueError as training_batches.

    processes: 0 decodes in this process, else that many others do, or one for each picture where there are fewer.
    """
    split = SplitReader.of(manifest, "val", task)
    places = range(split.records) if places is None else places
    yield from load_items(_Validation(split, test), places, min(processes, len(places)))


class _Validation(Dataset[ValImage]):
    """Validation pictures by index."""

    def __init__(self, split: SplitReader, test: TestConfig) -> None:
        self.split, self.test = split, test
        self.needs_original = test.ms_flip is not None or test.window is not None

    def __getitem__(self, index: int) -> ValImage:
        record = self.split[index]
        image = record.image()
        label_map = ids = of_no_class = None
        labels, crowd = np.zeros(0, np.int64), np.zeros(0, bool)
        if record.has_segments():
            segments = record.segments()
            label_map = torch.from_numpy(renumber(segments.ids, segments.classes, len(self.split.thing_index)))
            count = len(segments.classes)
            own = _own_label_map(record)
            # a label map tells ADE20K's stuff that objects cover, which is missed
            kept = None if own is None else np.ones(count, bool)
            compact, present = close_gaps(segments.ids, np.arange(count), count, where=record.where, kept=kept)
            ids, labels, crowd = torch.from_numpy(compact), segments.classes[present], segments.crowd[present]
            if own is not None:
                classes = len(self.split.thing_index)
                label_map = torch.from_numpy(renumber(own, np.append(np.arange(classes), -1), classes))
                of_no_class = torch.from_numpy(own == classes)
        return ValImage(
            image=network_image(image, self.test),
            original_size=record.size,
            label_map=label_map,
            segments=ids,
            labels=torch.from_numpy(labels),
            crowd=torch.from_numpy(crowd),
            instances=None if self.split.task == "semantic" else self._instances(record.things()),
            original=torch.from_numpy(image.transpose(2, 0, 1).copy()) if self.needs_original else None,
            name=record.name,
            index=index,
            of_no_class=of_no_class,
        )

    def _instances(self, things: Things) -> TrueInstances:
        of_things = self.split.task == "instance"
        return TrueInstances(
            run_lengths=things.run_lengths,
            labels=torch.from_numpy(self.split.thing_index[things.classes] if of_things else things.classes),
            areas=torch.from_numpy(things.areas),
            crowd=torch.from_numpy(things.crowd),
        )


def _own_label_map(record: StoredRecord) -> np.ndarray | None:
    """Class ids beside the segments, as many as there are classes for an object of none; None: there are none."""
    if "label_map" not in record.batch.schema.names or (data := record.batch.column("label_map")[0].as_py()) is None:
        return None
    return decode_segments(data, record.where)
