"""Training batches from memory-mapped shards.

Which picture stands at position p of a run's endless order, and how it is augmented, are functions of (seed, p) alone:
mix(seed, 1, epoch, index) sorts an epoch, mix(seed, 2, p) seeds the augmentation and mix(seed, 3, p) is handed to the
network and the losses. Where the augmentation leaves nothing to learn from, attempt k >= 1 takes the picture
mix(seed, 5, p, k) % pictures and the augmentation's seed mix(seed, 2, p, k). So workers, loader processes and restarts
do not change what is seen. pipeline.data.loader.sampling has another order, where rare classes are shown more often.

The rules for instances are mmdetection 3.3's: CocoDataset.parse_data_info says which annotations are targets,
RandomCrop which of them a crop keeps, FilterAnnotations when another picture is drawn. `augmentation.rules` detectron2
has the rules of the authors' dataset mappers instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from m2f.constants import to_device
from m2f.draws import mix
from pipeline.data.images.codecs import (
    decode_masks,
)
from pipeline.data.loader.augmentation import Distortion, seed_transform, touching, training_transform
from pipeline.data.loader.processes import load_items
from pipeline.data.loader.sampling import RepeatOrder, classes_held, repeat_factors
from pipeline.data.loader.targets import close_gaps, large_enough, merge_stuff, pad_masks, stack_segments
from pipeline.data.shards.look import MIN_SIDE
from pipeline.data.shards.reader import SplitReader, StoredRecord

if TYPE_CHECKING:
    from pipeline.params.schema import AugmentationConfig, Row, Task
    from pipeline.storage.results.data import Manifest


DRAWS = 1000
"""Pictures that are tried for one position of the order before the data set is called empty."""


@dataclass(frozen=True, eq=False)
class Batch:
    """B augmented training pictures of H x W, the crop."""

    images: Tensor
    """(B, 3, H, W) uint8 RGB; what lies right of and below a picture is arbitrary."""
    sizes: Tensor
    """(B, 2) int64, (height, width) of every picture inside the crop; by detectron2's rules the crop's."""
    segments: Tensor | None
    """(B, H, W) index into `labels[b]`; nothing and padding are 255 (uint8) or, with over 255 segments, -1 (int32).
    None for the task instance."""
    masks: tuple[Tensor, ...] | None
    """Task instance: B times (T, H, W) bool, padded with False. None otherwise."""
    labels: tuple[Tensor, ...]
    """B times (T,) int64: class of every segment or instance of the crop, by rising id; T may be 0. Classes of the task
    instance are counted among the things. With large-scale jitter a panoptic segment may have no pixel left."""
    positions: tuple[int, ...]
    """Place of every picture in the run's order."""
    seeds: tuple[int, ...]
    """mix(seed, 3, position): what the network and the losses draw from."""
    names: tuple[str, ...]

    def pin_memory(self) -> Batch:
        """The same batch in memory from which a GPU copies by itself; the loader calls it."""
        return replace(
            self,
            images=self.images.pin_memory(),
            sizes=self.sizes.pin_memory(),
            segments=None if self.segments is None else self.segments.pin_memory(),
            masks=None if self.masks is None else tuple(masks.pin_memory() for masks in self.masks),
            labels=tuple(labels.pin_memory() for labels in self.labels),
        )

    def to(self, device: torch.device) -> Batch:
        """The same batch with its `large` tensors on a device."""
        return replace(
            self,
            images=to_device(self.images, device),
            segments=None if self.segments is None else to_device(self.segments, device),
            masks=None if self.masks is None else tuple(to_device(masks, device) for masks in self.masks),
        )

    def large(self) -> Iterator[Tensor]:
        """The tensors that have all pixels."""
        yield self.images
        if self.segments is not None:
            yield self.segments
        yield from self.masks or ()


@dataclass(frozen=True, kw_only=True)
class TrainingOrder:
    """The endless order of a run's augmented pictures: epoch after epoch, each in an order of its own."""

    manifest: Manifest
    """Of the dataset's shards."""
    augmentation: AugmentationConfig
    task: Task = "semantic"
    """semantic: one segment for every class. panoptic: crowds are nothing, stuff of one class is one segment. instance:
    masks of things that are no crowds; where a crop leaves no pixel of all things that it should still show, another
    picture is drawn."""
    images: Literal["all", "with_things"] = "all"
    """with_things leaves out those without an annotated thing and those with a side of less than MIN_SIDE pixels."""
    seed: int
    global_batch: int
    """Pictures of a step: step k holds the positions k * global_batch + i."""
    repeat_threshold: float | None = None
    """SamplingConfig's; None: all pictures equally often."""

    @classmethod
    def of(cls, row: Row, manifest: Manifest, *, seed: int) -> TrainingOrder:
        """A row's, on the manifest of its dataset."""
        train = row.train
        return cls(
            manifest=manifest,
            augmentation=train.augmentation,
            task=row.task,
            images=train.images,
            seed=seed,
            global_batch=train.global_batch,
            repeat_threshold=None if train.sampling is None else train.sampling.repeat_threshold,
        )


def training_batches(
    order: TrainingOrder, *, first_step: int, steps: int, image_range: range, processes: int = 0
) -> Iterator[Batch]:
    """One Batch for each of `steps` steps from `first_step` on.

    image_range: this worker's part of a step, as places in its global batch. processes: 0 decodes in this process,
    else that many others do, with the same batches, in pinned memory where there is a GPU.

    ValueError names labels that the task needs and the dataset lacks, a shard that is missing or altered, or the record
    that failed.
    """
    split = SplitReader.of(order.manifest, "train", order.task)
    chosen = _chosen(split, order.images)
    repeats = None
    if order.repeat_threshold is not None:
        repeats = RepeatOrder(order.seed, repeat_factors(classes_held(split, chosen), order.repeat_threshold))
    source = _Training(split, chosen, order.augmentation, order.seed, order.global_batch, image_range, repeats)
    yield from load_items(source, range(first_step, first_step + steps), processes, pin=True)


def epoch_order(seed: int, epoch: int, count: int) -> list[int]:
    """The order of `count` records in an epoch: sorted by a hash of (seed, epoch, index)."""
    return sorted(range(count), key=lambda index: mix(seed, 1, epoch, index))


_epoch_order = lru_cache(maxsize=2)(epoch_order)  # a step may straddle two epochs


def _chosen(split: SplitReader, images: Literal["all", "with_things"]) -> np.ndarray:
    """Indices of the records that are trained on."""
    if images == "all":
        return np.arange(split.records)
    things, height, width = split.columns("things", "height", "width")
    chosen = np.flatnonzero((things > 0) & (np.minimum(height, width) >= MIN_SIDE))
    if not len(chosen):
        raise ValueError(
            f"dataset {split.dataset} has no training image with things and sides of at least {MIN_SIDE} px; "
            f"set `images: all` in the row's train settings"
        )
    return chosen


class _Example(NamedTuple):
    """One augmented training picture of h x w, at most the crop."""

    image: np.ndarray
    """(h, w, 3) uint8 RGB."""
    truth: np.ndarray
    """(h, w) index into `labels`, or, for the task instance, (T, h, w) uint8 masks."""
    labels: np.ndarray
    """(T,) int64."""
    name: str
    distortion: Distortion | None
    """Of the picture, yet to come."""


class _Training(Dataset[Batch]):
    """Batches by step."""

    def __init__(
        self,
        split: SplitReader,
        chosen: np.ndarray,
        augmentation: AugmentationConfig,
        seed: int,
        global_batch: int,
        image_range: range,
        repeats: RepeatOrder | None,
    ) -> None:
        self.repeats = repeats
        self.split, self.chosen, self.augmentation = split, chosen, augmentation
        self.seed, self.global_batch, self.image_range = seed, global_batch, image_range
        self.transform = training_transform(augmentation, distort_later=True)
        self.detectron2 = augmentation.rules == "detectron2"

    def __getitem__(self, step: int) -> Batch:
        positions = [step * self.global_batch + place for place in self.image_range]
        height, width = crop = self.augmentation.crop
        grey = 128 if self.detectron2 else 0
        images = torch.empty(len(positions), 3, height, width, dtype=torch.uint8)
        examples = [self._example(position) for position in positions]
        for place, example in enumerate(examples):
            planes, (h, w) = images[place].numpy(), example.image.shape[:2]
            _put(example.image, planes, padding=grey)
            if example.distortion is not None:
                example.distortion.in_place(planes[:, :h, :w])
        truths, instance = [example.truth for example in examples], self.split.task == "instance"
        return Batch(
            images=images,
            sizes=torch.tensor([crop if grey else example.image.shape[:2] for example in examples]),
            segments=None if instance else stack_segments(truths, crop),
            masks=tuple(pad_masks(masks, crop) for masks in truths) if instance else None,
            labels=tuple(torch.from_numpy(example.labels) for example in examples),
            positions=tuple(positions),
            seeds=tuple(mix(self.seed, 3, position) for position in positions),
            names=tuple(example.name for example in examples),
        )

    def _example(self, position: int) -> _Example:
        """The picture at a position of the order or, where its augmentation leaves nothing, one drawn in its place."""
        augmented = {"semantic": self._semantic, "panoptic": self._panoptic, "instance": self._instance}
        for attempt in range(DRAWS):
            record = self.split[int(self.chosen[self._place(position, attempt)])]
            again = (attempt,) if attempt else ()
            seed_transform(self.transform, mix(self.seed, 2, position, *again) % 2**32)
            example = augmented[self.split.task](record)
            if example is not None:
                return example
        raise ValueError(
            f"dataset {self.split.dataset}: {DRAWS} training images were drawn for position {position}, and none "
            f"shows a pixel of its instances, the last one {record.where}; check the masks"
        )

    def _place(self, position: int, attempt: int) -> int:
        """Which of the chosen pictures an attempt at a position takes."""
        count = len(self.chosen)
        if attempt:
            return mix(self.seed, 5, position, attempt) % count
        if self.repeats is not None:
            return self.repeats[position]
        epoch, place = divmod(position, count)
        return _epoch_order(self.seed, epoch, count)[place]

    def _semantic(self, record: StoredRecord) -> _Example:
        segments, num_classes = record.segments(), len(self.split.thing_index)
        drawn = self.transform(image=record.image(), mask=segments.ids, label_of=segments.classes)
        ids, counts = drawn["mask"], drawn["counts"]
        truth, labels = close_gaps(ids, segments.classes, num_classes, where=record.where, counts=counts)
        return _Example(drawn["image"], truth, labels, record.name, drawn.get("distortion"))

    def _panoptic(self, record: StoredRecord) -> _Example:
        segments = record.segments()
        new, firsts = merge_stuff(segments, self.split.thing_index)
        classes = segments.classes[firsts]
        boxes = segments.boxes[firsts] * (self.split.thing_index[classes] >= 0)[:, None]  # stuff has none
        drawn = self.transform(image=record.image(), mask=segments.ids, label_of=new, boxes=boxes)
        ids, counts, kept = drawn["mask"], drawn["counts"], None
        if self.detectron2:
            kept = np.ones(len(firsts), bool)
        elif self.augmentation.jitter is not None:
            kept = large_enough(boxes) & touching(drawn["boxes"], *ids.shape)
        truth, present = close_gaps(ids, new, len(firsts), where=record.where, counts=counts, kept=kept)
        return _Example(drawn["image"], truth, classes[present], record.name, drawn.get("distortion"))

    def _instance(self, record: StoredRecord) -> _Example | None:
        """None when the crop shows no pixel of all things, crowds among them, whose boxes it touches; by detectron2's
        rules it then has no target, and without jitter every thing is one."""
        things = record.things()
        masks = decode_masks(things.run_lengths, record.size)
        drawn = self.transform(image=record.image(), masks=masks, boxes=things.boxes)
        height, width = drawn["image"].shape[:2]
        kept = (things.areas > 0) & large_enough(things.boxes) & touching(drawn["boxes"], height, width)
        seen = kept & np.array([mask.any() for mask in drawn["masks"]], bool)
        if kept.any() and not seen.any() and not self.detectron2:
            return None
        if self.detectron2 and self.augmentation.jitter is None:
            seen = np.ones(len(seen), bool)
        targets = seen & ~things.crowd
        labels = self.split.thing_index[things.classes[targets]]
        return _Example(drawn["image"], drawn["masks"][targets], labels, record.name, drawn.get("distortion"))


def _put(image: np.ndarray, planes: np.ndarray, *, padding: int) -> None:
    """An (h, w, 3) picture into (3, H, W), `padding` right and below."""
    height, width = image.shape[:2]
    cv2.split(image, [plane[:height, :width] for plane in planes])
    planes[:, height:] = padding
    planes[:, :height, width:] = padding
