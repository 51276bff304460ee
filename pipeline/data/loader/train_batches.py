"""Batches and validation pictures from memory-mapped shards.

Which picture stands at position p of a run's endless order, and how it is augmented, are functions of (seed, p) alone:
mix(seed, 1, epoch, index) sorts an epoch, mix(seed, 2, p) seeds the augmentation and mix(seed, 3, p) is handed to the
network and the losses. Where the augmentation leaves nothing to learn from, attempt k >= 1 takes the picture
mix(seed, 5, p, k) % pictures and the augmentation's seed mix(seed, 2, p, k). So workers, loader processes and restarts
do not change what is seen.

The rules for instances are mmdetection 3.3's: CocoDataset.parse_data_info says which annotations are targets,
RandomCrop which of them a crop keeps, FilterAnnotations when another picture is drawn.
"""

from __future__ import annotations

import bisect
import itertools
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import cv2
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from m2f.draws import mix
from pipeline.data.images.codecs import (
    IGNORE,
    decode_image,
    decode_masks,
    decode_segments,
    encode_masks,
    nothing_of,
    raw_pixels,
)
from pipeline.data.images.resize import network_picture
from pipeline.data.loader.augmentation import (
    label_counts,
    look_up,
    seed_transform,
    touching,
    training_transform,
)
from pipeline.storage.files import local_copy, local_file, sha256
from pipeline.storage.root import storage_root, stored
from pipeline.storage.stores import Expected, store_of

if TYPE_CHECKING:
    from pipeline.params.schema import AugmentationConfig, Row, Task, TestConfig
    from pipeline.storage.results import Label, Manifest

_Item = TypeVar("_Item")

PREFETCH = 3
"""Batches that every loader process keeps ready."""

DRAWS = 1000
"""Pictures that are tried for one position of the order before the data set is called empty."""

MIN_SIDE = 32
"""Pixels of the shortest side of pictures `with_things` (mmdetection's min_size)."""


@dataclass(frozen=True, eq=False)
class Batch:
    """B augmented training pictures of H x W, the crop."""

    images: Tensor
    """(B, 3, H, W) uint8 RGB; what lies right of and below a picture is arbitrary."""
    sizes: Tensor
    """(B, 2) int64, (height, width) of every picture inside the crop."""
    segments: Tensor | None
    """(B, H, W) index into `labels[b]`; nothing and padding are 255 (uint8) or, with over 255 segments, -1 (int32).
    None for the task instance."""
    masks: tuple[Tensor, ...] | None
    """Task instance: B times (T, H, W) bool, padded with False. None otherwise."""
    labels: tuple[Tensor, ...]
    """B times (T,) int64: class of every segment or instance of the crop, by rising id; T may be 0. Classes of the task
    instance are counted among the things. With large-scale jitter a panoptic thing may have no pixel left."""
    positions: tuple[int, ...]
    """Place of every picture in the run's order."""
    seeds: tuple[int, ...]
    """mix(seed, 3, position): what the network and the losses draw from."""
    names: tuple[str, ...]


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
class Picture:
    """One validation picture, resized for the network, with its truth at the original size."""

    image: Tensor
    """(3, H, W) uint8 RGB, resized, not padded."""
    original_size: tuple[int, int]
    """(height, width) of the labels."""
    label_map: Tensor | None
    """(h, w) uint8 class ids, crowds included, 255: nothing. None without segments."""
    segments: Tensor | None
    """(h, w) index into `labels`; uint8 with 255, or int32 with -1, for nothing. None without segments."""
    labels: Tensor
    """(T,) int64 class of every segment in the picture, by rising id."""
    crowd: Tensor
    """(T,) bool: the segment stands for many objects."""
    instances: TrueInstances | None
    """None for the task semantic."""
    original: Tensor | None
    """(3, h, w) uint8 RGB, the picture as it is. None unless `test.ms_flip` is set."""
    name: str
    index: int
    """Its place in the split."""


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
    pictures: Literal["all", "with_things"] = "all"
    """with_things leaves out those without an annotated thing and those with a side of less than MIN_SIDE pixels."""
    seed: int
    global_batch: int
    """Pictures of a step: step k holds the positions k * global_batch + i."""

    @classmethod
    def of(cls, row: Row, manifest: Manifest, *, seed: int) -> TrainingOrder:
        """A row's, on the manifest of its dataset."""
        train = row.train
        return cls(
            manifest=manifest,
            augmentation=train.augmentation,
            task=row.task,
            pictures=train.pictures,
            seed=seed,
            global_batch=train.global_batch,
        )


def training_batches(
    order: TrainingOrder, *, first_step: int, steps: int, picture_range: range, processes: int = 0
) -> Iterator[Batch]:
    """One Batch for each of `steps` steps from `first_step` on.

    picture_range: this worker's part of a step, as places in its global batch. processes: 0 decodes in this process,
    else that many others do, with the same batches.

    ValueError names labels that the task needs and the dataset lacks, a shard that is missing or altered, or the record
    that failed.
    """
    split = _Split.of(order.manifest, "train", order.task)
    chosen = _chosen(split, order.pictures)
    source = _Training(split, chosen, order.augmentation, order.seed, order.global_batch, picture_range)
    yield from _load(source, range(first_step, first_step + steps), processes)


def validation_pictures(
    manifest: Manifest,
    test: TestConfig,
    *,
    task: Task = "semantic",
    places: Sequence[int] | None = None,
    processes: int = 0,
) -> Iterator[Picture]:
    """The validation pictures at these places of the shards' order; None: all. ValueError as training_batches."""
    split = _Split.of(manifest, "val", task)
    yield from _load(_Validation(split, test), range(split.records) if places is None else places, processes)


def epoch_order(seed: int, epoch: int, count: int) -> list[int]:
    """The order of `count` records in an epoch: sorted by a hash of (seed, epoch, index)."""
    return sorted(range(count), key=lambda index: mix(seed, 1, epoch, index))


_epoch_order = lru_cache(maxsize=2)(epoch_order)  # a step may straddle two epochs


def verify_shards(manifest: Manifest, split: str) -> None:
    """Check a split's shards before they are read: their digests, once per host, where they are read in place; of those
    that every host copies, which verifies them, that they are there in their lengths.

    ValueError names a missing or altered shard.
    """
    shards = {shard.path: Expected(shard.bytes, shard.sha256) for shard in manifest.split(split).shards}
    wrong = store_of(storage_root()).first_wrong(
        shards,
        note=f"{manifest.digest[:16]}-{split}",
        digest=sha256,
        doing=f"verifying shards of {manifest.dataset}",
    )
    if wrong is not None:
        path = stored(wrong[0], made_by=_made_by(manifest))
        raise ValueError(f"shard {path} is truncated or altered: {wrong[1]}; make it again with: {_made_by(manifest)}")


def _made_by(manifest: Manifest) -> str:
    return f"python -m stages.shard {manifest.dataset}"


_LABELS: Mapping[Task, Label] = {"semantic": "semantic", "panoptic": "panoptic", "instance": "instances"}
"""What a manifest's `labels` must list for a task."""


@dataclass(frozen=True)
class _Segments:
    """The S segments of a picture."""

    ids: np.ndarray
    """(h, w) uint8 with 255, or uint16 with 65535, for nothing; raw ones lie in the memory map."""
    classes: np.ndarray
    """(S,) int64."""
    crowd: np.ndarray
    """(S,) bool."""
    boxes: np.ndarray
    """(S, 4) float64 x1, y1, x2, y2; zeros where a segment has no pixel or is a class."""


@dataclass(frozen=True)
class _Things:
    """The N annotated things of a picture, crowds included."""

    run_lengths: list[dict[str, Any]]
    classes: np.ndarray
    """(N,) int64 dataset classes."""
    boxes: np.ndarray
    """(N, 4) float64 x1, y1, x2, y2, as annotated."""
    areas: np.ndarray
    """(N,) float64 pixels, as annotated."""
    crowd: np.ndarray
    """(N,) bool."""


@dataclass(frozen=True)
class _Record:
    """One record as stored; its parts are read and decoded when they are asked for."""

    batch: pa.RecordBatch
    shard: str
    raw: bool
    """Whether pixels are stored decoded."""
    thing_index: np.ndarray
    """(C,) int64 place of every class among the things, -1: stuff."""

    def _value(self, column: str) -> Any:
        return self.batch.column(column)[0]

    def _bytes(self, column: str) -> pa.Buffer:
        """Where the record's bytes lie; a value of the column would be a copy."""
        array = self.batch.column(column)
        _, places, data = array.buffers()
        start, end = np.frombuffer(places, np.int32, 2, array.offset * 4).tolist()
        return data.slice(start, end - start)

    @cached_property
    def name(self) -> str:
        """Unique in its split."""
        name: str = self._value("name").as_py()
        return name

    @cached_property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self._value("height").as_py(), self._value("width").as_py()

    @property
    def where(self) -> str:
        """Shard and record, for messages."""
        return f"{self.shard}: {self.name}"

    def image(self) -> np.ndarray:
        """(h, w, 3) uint8 RGB; raw ones lie in the memory map, where nothing can be written."""
        data = self._bytes("image")
        if self.raw:
            return raw_pixels(data, (*self.size, 3), np.uint8, self.where)
        return self._checked(decode_image(data, self.where))

    def _checked(self, pixels: np.ndarray) -> np.ndarray:
        if pixels.shape[:2] != self.size:
            found, said = (" x ".join(map(str, size)) for size in (pixels.shape[:2], self.size))
            raise ValueError(f"{self.where} decodes to {found} pixels instead of {said}; the shard is altered")
        return pixels

    def has_segments(self) -> bool:
        """Whether there is a segment map."""
        return bool(self._value("segments").is_valid)

    def segments(self) -> _Segments:
        """The segment map; where ids are classes, one segment for every class of the dataset."""
        data, kinds = self._bytes("segments"), self._value("segment_classes").as_py()
        classes = np.arange(len(self.thing_index)) if kinds is None else np.array(kinds, np.int64)
        if self.raw:
            ids = raw_pixels(data, self.size, np.uint8 if len(classes) <= IGNORE else np.uint16, self.where)
        else:
            ids = self._checked(decode_segments(data, self.where))
        crowd, boxes = self._value("segment_crowd").as_py(), self._value("segment_boxes").as_py()
        return _Segments(
            ids=ids,
            classes=classes,
            crowd=np.zeros(len(classes), bool) if crowd is None else np.array(crowd, bool),
            boxes=np.zeros((len(classes), 4)) if boxes is None else np.array(boxes, np.float64).reshape(-1, 4),
        )

    def things(self) -> _Things:
        """The record's own instances; where it has none, its segments of things that have pixels."""
        annotated = self._value("instances").as_py()
        if annotated is None:
            return self._thing_segments()
        return _Things(
            run_lengths=[{"size": list(self.size), "counts": each["counts"]} for each in annotated],
            classes=np.array([each["class"] for each in annotated], np.int64),
            boxes=np.array([each["box"] for each in annotated], np.float64).reshape(-1, 4),
            areas=np.array([each["area"] for each in annotated], np.float64),
            crowd=np.array([each["crowd"] for each in annotated], bool),
        )

    def _thing_segments(self) -> _Things:
        segments = self.segments()
        areas = np.zeros(len(segments.classes))
        counts = label_counts(segments.ids)[: len(areas)]
        areas[: len(counts)] = counts
        chosen = np.flatnonzero((self.thing_index[segments.classes] >= 0) & (areas > 0))
        return _Things(
            run_lengths=encode_masks(segments.ids == chosen[:, None, None]),
            classes=segments.classes[chosen],
            boxes=segments.boxes[chosen],
            areas=areas[chosen],
            crowd=segments.crowd[chosen],
        )


@dataclass
class _Split:
    """Random access to a split's records. Memory maps are opened by the process that reads them."""

    dataset: str
    task: Task
    paths: tuple[str, ...]
    digests: tuple[str, ...]
    """SHA-256 of every shard."""
    starts: tuple[int, ...]
    """Index of every shard's first record."""
    records: int
    thing_index: np.ndarray
    """(C,) int64 place of every class among the things, in the classes' order, -1: stuff."""
    made_by: str
    raw: bool
    """Whether pixels are stored decoded (the manifest's pixel_layout)."""
    readers: dict[tuple[int, int], pa.RecordBatchFileReader] = field(default_factory=dict)

    @classmethod
    def of(cls, manifest: Manifest, split: str, task: Task) -> _Split:
        """A verified split of a manifest, for a task."""
        records, shards = manifest.split(split).records, manifest.split(split).shards
        if _LABELS[task] not in manifest.labels:
            raise ValueError(
                f"dataset {manifest.dataset} has no {_LABELS[task]} labels, which the task {task} needs, but "
                f"{' and '.join(manifest.labels)}; give the row another `task` or another dataset"
            )
        verify_shards(manifest, split)
        starts = itertools.accumulate((shard.records for shard in shards[:-1]), initial=0)
        thing = np.array([name in manifest.thing_classes for name in manifest.class_names])
        return cls(
            dataset=manifest.dataset,
            task=task,
            paths=tuple(shard.path for shard in shards),
            digests=tuple(shard.sha256 for shard in shards),
            starts=tuple(starts),
            records=records,
            thing_index=np.where(thing, thing.cumsum() - 1, -1),
            made_by=_made_by(manifest),
            raw=manifest.pixel_layout == "raw",
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "readers": {}}

    def __getitem__(self, index: int) -> _Record:
        shard = bisect.bisect_right(self.starts, index) - 1
        key = (os.getpid(), shard)
        if key not in self.readers:
            self.readers[key] = self._open(shard)
        place = index - self.starts[shard]
        try:
            batch = self.readers[key].get_batch(place)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(
                f"{self.paths[shard]}: record {place} is not readable ({error}); make it again with: {self.made_by}"
            ) from None
        return _Record(batch, self.paths[shard], self.raw, self.thing_index)

    def _open(self, shard: int, columns: Sequence[str] = ()) -> pa.RecordBatchFileReader:
        """A shard or this host's copy, memory-mapped; or some columns, read without what lies between them."""
        path = stored(self.paths[shard], made_by=self.made_by)
        try:
            if not columns:
                return _mapped(local_copy(path, self.digests[shard]))
            with local_file(path, self.digests[shard]) as file:
                reader = _mapped(file)
                places = [reader.schema.get_field_index(name) for name in columns]
                return pa.ipc.open_file(pa.OSFile(str(file)), options=pa.ipc.IpcReadOptions(included_fields=places))
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"shard {path} is not readable ({error}); make it again with: {self.made_by}") from None

    def columns(self, *names: str) -> list[np.ndarray]:
        """Columns of numbers, of all records."""
        tables = [self._open(shard, names).read_all() for shard in range(len(self.paths))]
        return [np.concatenate([table[name].to_numpy() for table in tables]) for name in names]


def _mapped(path: Path) -> pa.RecordBatchFileReader:
    """A shard's records, none of which is read; pa.memory_map would ask the system for all of a record's pages."""
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise pa.ArrowInvalid("it is empty")
        return pa.ipc.open_file(pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))


def _chosen(split: _Split, pictures: Literal["all", "with_things"]) -> np.ndarray:
    """Indices of the records that are trained on."""
    if pictures == "all":
        return np.arange(split.records)
    things, height, width = split.columns("things", "height", "width")
    chosen = np.flatnonzero((things > 0) & (np.minimum(height, width) >= MIN_SIDE))
    if not len(chosen):
        raise ValueError(
            f"dataset {split.dataset} has no training picture with things and sides of at least {MIN_SIDE} px; "
            f"set `pictures: all` in the row's train settings"
        )
    return chosen


def _renumber(ids: np.ndarray, new: np.ndarray, count: int) -> np.ndarray:
    """Ids of S segments, uint8 or uint16, with new[id], (S,), -1 for nothing, in their place.

    Gives uint8 with 255 or, where there are over 255 (`count`) new ids, int32 with -1, for nothing.
    """
    kind, nothing = (np.uint8, IGNORE) if count <= IGNORE else (np.int32, -1)
    lookup = np.full(nothing_of(ids) + 1, nothing, kind)
    lookup[: len(new)] = np.where(new < 0, nothing, new)
    return look_up(ids, lookup) if ids.dtype == kind == np.uint8 else lookup.take(ids)


def _compact(
    ids: np.ndarray,
    new: np.ndarray,
    count: int,
    *,
    where: str,
    counts: np.ndarray | None = None,
    kept: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of S segments as those of `count` others, new[id], -1 for none, and these numbered again without gaps.

    Gives (h, w) uint8 or int32, and which of the `count` are left, (T,), by rising number. counts: label_counts of the
    ids, where they are known. kept: (count,) bool, those that have a number also without pixels. ValueError names
    `where` there is an id that is no segment's.
    """
    held = np.flatnonzero(label_counts(ids) if counts is None else counts)
    if len(held) and held[-1] >= len(new):
        raise ValueError(f"{where} holds segment {held[-1]}, but has {len(new)}; the shard is altered")
    there = np.zeros(count + 1, bool)  # the last one is read through -1
    if kept is not None:
        there[:-1] = kept
    there[new[held]] = True
    present = np.flatnonzero(there[:-1])
    number = np.full(count + 1, -1)
    number[present] = np.arange(len(present))
    return _renumber(ids, number[new], len(present)), present


def _merged(segments: _Segments, thing_index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Panoptic segments: none for crowds, and one for all stuff of a class, in the place of its first.

    Gives the new id of every segment, (S,), -1: none, and the first segment of every new one, (M,).
    """
    new, firsts, stuff = np.full(len(segments.classes), -1), list[int](), dict[int, int]()
    for segment, (kind, crowd) in enumerate(zip(segments.classes.tolist(), segments.crowd.tolist(), strict=True)):
        if crowd:
            continue
        if kind in stuff:
            new[segment] = stuff[kind]
            continue
        new[segment] = len(firsts)
        firsts.append(segment)
        if thing_index[kind] < 0:
            stuff[kind] = new[segment]
    return new, np.array(firsts, np.int64)


def _large_enough(boxes: np.ndarray) -> np.ndarray:
    """(N,) bool: annotated boxes of at least a pixel's width and height; others are no targets.

    Boxes are stored in float32, so that a side of 1 may have become a little less (COCO gives hundredths of pixels).
    """
    return np.asarray((boxes[:, 2:] - boxes[:, :2] >= 0.999).all(axis=1))


class _Example(NamedTuple):
    """One augmented training picture of h x w, at most the crop."""

    image: np.ndarray
    """(h, w, 3) uint8 RGB."""
    truth: np.ndarray
    """(h, w) index into `labels`, or, for the task instance, (T, h, w) uint8 masks."""
    labels: np.ndarray
    """(T,) int64."""
    name: str


class _Training(Dataset[Batch]):
    """Batches by step."""

    def __init__(
        self,
        split: _Split,
        chosen: np.ndarray,
        augmentation: AugmentationConfig,
        seed: int,
        global_batch: int,
        picture_range: range,
    ) -> None:
        self.split, self.chosen, self.augmentation = split, chosen, augmentation
        self.seed, self.global_batch, self.picture_range = seed, global_batch, picture_range
        self.transform = training_transform(augmentation)

    def __getitem__(self, step: int) -> Batch:
        positions = [step * self.global_batch + picture for picture in self.picture_range]
        height, width = crop = self.augmentation.crop
        images = torch.empty(len(positions), 3, height, width, dtype=torch.uint8)
        examples = [self._example(position) for position in positions]
        for place, example in enumerate(examples):
            _put(example.image, images[place].numpy())
        truths, instance = [example.truth for example in examples], self.split.task == "instance"
        return Batch(
            images=images,
            sizes=torch.tensor([example.image.shape[:2] for example in examples]),
            segments=None if instance else _stack(truths, crop),
            masks=tuple(_padded(masks, crop) for masks in truths) if instance else None,
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
            f"dataset {self.split.dataset}: {DRAWS} training pictures were drawn for position {position}, and none "
            f"shows a pixel of its instances, the last one {record.where}; check the masks"
        )

    def _place(self, position: int, attempt: int) -> int:
        """Which of the chosen pictures an attempt at a position takes."""
        count = len(self.chosen)
        if attempt:
            return mix(self.seed, 5, position, attempt) % count
        epoch, place = divmod(position, count)
        return _epoch_order(self.seed, epoch, count)[place]

    def _semantic(self, record: _Record) -> _Example:
        segments, num_classes = record.segments(), len(self.split.thing_index)
        drawn = self.transform(image=record.image(), mask=segments.ids, label_of=segments.classes)
        ids, counts = drawn["mask"], drawn["counts"]
        truth, labels = _compact(ids, segments.classes, num_classes, where=record.where, counts=counts)
        return _Example(drawn["image"], truth, labels, record.name)

    def _panoptic(self, record: _Record) -> _Example:
        segments = record.segments()
        new, firsts = _merged(segments, self.split.thing_index)
        classes = segments.classes[firsts]
        boxes = segments.boxes[firsts] * (self.split.thing_index[classes] >= 0)[:, None]  # stuff has none
        drawn = self.transform(image=record.image(), mask=segments.ids, label_of=new, boxes=boxes)
        ids, counts, kept = drawn["mask"], drawn["counts"], None
        if self.augmentation.jitter is not None:
            kept = _large_enough(boxes) & touching(drawn["boxes"], *ids.shape)
        truth, present = _compact(ids, new, len(firsts), where=record.where, counts=counts, kept=kept)
        return _Example(drawn["image"], truth, classes[present], record.name)

    def _instance(self, record: _Record) -> _Example | None:
        """None when the crop shows no pixel of all things, crowds among them, whose boxes it touches."""
        things = record.things()
        masks = decode_masks(things.run_lengths, record.size)
        drawn = self.transform(image=record.image(), masks=masks, boxes=things.boxes)
        height, width = drawn["image"].shape[:2]
        kept = (things.areas > 0) & _large_enough(things.boxes) & touching(drawn["boxes"], height, width)
        seen = kept & np.array([mask.any() for mask in drawn["masks"]], bool)
        if kept.any() and not seen.any():
            return None
        targets = seen & ~things.crowd
        labels = self.split.thing_index[things.classes[targets]]
        return _Example(drawn["image"], drawn["masks"][targets], labels, record.name)


def _put(image: np.ndarray, planes: np.ndarray) -> None:
    """An (h, w, 3) picture into (3, H, W), zeros right and below."""
    height, width = image.shape[:2]
    cv2.split(image, [plane[:height, :width] for plane in planes])
    planes[:, height:] = 0
    planes[:, :height, width:] = 0


def _padded(masks: np.ndarray, crop: tuple[int, int]) -> Tensor:
    """(T, h, w) uint8 masks padded to the crop, (T, H, W) bool."""
    padded = torch.zeros(len(masks), *crop, dtype=torch.bool)
    padded.numpy()[:, : masks.shape[1], : masks.shape[2]] = masks
    return padded


def _stack(maps: Sequence[np.ndarray], crop: tuple[int, int]) -> Tensor:
    """Segment maps padded to the crop, (B, H, W): uint8 with 255, or int32 with -1 as soon as one needs it."""
    wide = any(segments.dtype != np.uint8 for segments in maps)
    stacked = np.full((len(maps), *crop), -1 if wide else IGNORE, np.int32 if wide else np.uint8)
    for place, segments in enumerate(maps):
        part = stacked[place, : segments.shape[0], : segments.shape[1]]
        part[:] = segments
        if wide and segments.dtype == np.uint8:
            part[segments == IGNORE] = -1
    return torch.from_numpy(stacked)


class _Validation(Dataset[Picture]):
    """Validation pictures by index."""

    def __init__(self, split: _Split, test: TestConfig) -> None:
        self.split, self.test = split, test

    def __getitem__(self, index: int) -> Picture:
        record = self.split[index]
        image = record.image()
        label_map = ids = None
        labels, crowd = np.zeros(0, np.int64), np.zeros(0, bool)
        if record.has_segments():
            segments = record.segments()
            label_map = torch.from_numpy(_renumber(segments.ids, segments.classes, len(self.split.thing_index)))
            count = len(segments.classes)
            compact, present = _compact(segments.ids, np.arange(count), count, where=record.where)
            ids, labels, crowd = torch.from_numpy(compact), segments.classes[present], segments.crowd[present]
        return Picture(
            image=network_picture(image, self.test),
            original_size=record.size,
            label_map=label_map,
            segments=ids,
            labels=torch.from_numpy(labels),
            crowd=torch.from_numpy(crowd),
            instances=None if self.split.task == "semantic" else self._instances(record.things()),
            original=None if self.test.ms_flip is None else torch.from_numpy(image.transpose(2, 0, 1).copy()),
            name=record.name,
            index=index,
        )

    def _instances(self, things: _Things) -> TrueInstances:
        of_things = self.split.task == "instance"
        return TrueInstances(
            run_lengths=things.run_lengths,
            labels=torch.from_numpy(self.split.thing_index[things.classes] if of_things else things.classes),
            areas=torch.from_numpy(things.areas),
            crowd=torch.from_numpy(things.crowd),
        )


@dataclass(frozen=True)
class _Failed:
    """What went wrong in a loader process: exceptions sent by torch would bring the other process's traceback."""

    message: str


class _Guarded(Dataset[Any]):
    """A dataset that gives its errors back."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except (ValueError, OSError) as error:
            return _Failed(str(error))


def _load(dataset: Dataset[_Item], indices: Iterable[int], processes: int) -> Iterator[_Item]:
    """dataset[index] for every index, in order."""
    if not processes:
        for index in indices:
            yield dataset[index]
        return
    cv2.setNumThreads(1)  # a forked process would wait forever for the threads that OpenCV has started in this one
    loader: DataLoader[Any] = DataLoader(
        _Guarded(dataset),
        batch_size=None,
        sampler=indices,
        num_workers=processes,
        prefetch_factor=PREFETCH,
        collate_fn=_as_it_is,
        worker_init_fn=_one_thread,
    )
    for item in loader:
        if isinstance(item, _Failed):
            raise ValueError(item.message)
        yield item


def _as_it_is(item: _Item) -> _Item:
    return item


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
