"""Records of memory-mapped shards, by their place in a split."""

from __future__ import annotations

import bisect
import itertools
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipeline.data.images.codecs import (
    IGNORE,
    decode_image,
    decode_segments,
    encode_masks,
    raw_pixels,
)
from pipeline.data.images.label_maps import label_counts
from pipeline.data.shards.look import LABELS_OF, lacks_labels
from pipeline.storage.files import local_copy, local_file, sha256
from pipeline.storage.root import storage_root, stored
from pipeline.storage.stores import Expected, store_of

if TYPE_CHECKING:
    from pipeline.params.schema import Task
    from pipeline.storage.results.data import Manifest


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


@dataclass(frozen=True)
class Segments:
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
class Things:
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
class StoredRecord:
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

    def segments(self) -> Segments:
        """The segment map; where ids are classes, one segment for every class of the dataset."""
        data, class_ids = self._bytes("segments"), self._value("segment_classes").as_py()
        classes = np.arange(len(self.thing_index)) if class_ids is None else np.array(class_ids, np.int64)
        if self.raw:
            ids = raw_pixels(data, self.size, np.uint8 if len(classes) <= IGNORE else np.uint16, self.where)
        else:
            ids = self._checked(decode_segments(data, self.where))
        crowd, boxes = self._value("segment_crowd").as_py(), self._value("segment_boxes").as_py()
        return Segments(
            ids=ids,
            classes=classes,
            crowd=np.zeros(len(classes), bool) if crowd is None else np.array(crowd, bool),
            boxes=np.zeros((len(classes), 4)) if boxes is None else np.array(boxes, np.float64).reshape(-1, 4),
        )

    def classes_shown(self, task: Task) -> np.ndarray:
        """The dataset classes that a task can learn here, rising: of segments with a pixel, or of things that are no
        crowd."""
        if task == "instance":
            things = self.things()
            return np.unique(things.classes[(things.areas > 0) & ~things.crowd])
        segments = self.segments()
        counts = label_counts(segments.ids)[: len(segments.classes)]
        return np.unique(segments.classes[: len(counts)][counts > 0])

    def things(self) -> Things:
        """The record's own instances; where it has none, its segments of things that have pixels."""
        annotated = self._value("instances").as_py()
        if annotated is None:
            return self._thing_segments()
        return Things(
            run_lengths=[{"size": list(self.size), "counts": each["counts"]} for each in annotated],
            classes=np.array([each["class"] for each in annotated], np.int64),
            boxes=np.array([each["box"] for each in annotated], np.float64).reshape(-1, 4),
            areas=np.array([each["area"] for each in annotated], np.float64),
            crowd=np.array([each["crowd"] for each in annotated], bool),
        )

    def _thing_segments(self) -> Things:
        segments = self.segments()
        areas = np.zeros(len(segments.classes))
        counts = label_counts(segments.ids)[: len(areas)]
        areas[: len(counts)] = counts
        chosen = np.flatnonzero((self.thing_index[segments.classes] >= 0) & (areas > 0))
        return Things(
            run_lengths=encode_masks(segments.ids == chosen[:, None, None]),
            classes=segments.classes[chosen],
            boxes=segments.boxes[chosen],
            areas=areas[chosen],
            crowd=segments.crowd[chosen],
        )


@dataclass
class SplitReader:
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
    def of(cls, manifest: Manifest, split: str, task: Task) -> SplitReader:
        """A verified split of a manifest, for a task."""
        records, shards = manifest.split(split).records, manifest.split(split).shards
        if LABELS_OF[task] not in manifest.labels:
            raise ValueError(lacks_labels(manifest, task))
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

    def __getitem__(self, index: int) -> StoredRecord:
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
        return StoredRecord(batch, self.paths[shard], self.raw, self.thing_index)

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
