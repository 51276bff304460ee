"""Arrow files of verified records, and the manifest that says what is in them.

A shard is an uncompressed Arrow IPC file with one record per batch, so that any record is read from the memory map
without touching its neighbours. Shards lie under shards/<digest of their contents>/ in the storage root.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.datasets import cityscapes, coco, folder, shapes
from pipeline.datasets.source import Instance, Labelled, Record, check_picture, check_run_lengths
from pipeline.files import sha256
from pipeline.pictures import IGNORE, IGNORE_WIDE, decode_image
from pipeline.progress import Progress
from pipeline.storage import storage_root

if TYPE_CHECKING:
    from pipeline.params import DatasetConfig

LAYOUTS: Mapping[str, ModuleType] = {"folder": folder, "cityscapes": cityscapes, "coco": coco, "shapes": shapes}
"""Modules whose `records(config, sources, split)` lists the records of a split."""

_INSTANCE = pa.struct(
    [
        pa.field("class", pa.int32(), nullable=False),
        pa.field("box", pa.list_(pa.float32()), nullable=False),  # x1, y1, x2, y2 as annotated
        pa.field("area", pa.float64(), nullable=False),  # as annotated
        pa.field("crowd", pa.bool_(), nullable=False),
        pa.field("counts", pa.binary(), nullable=False),  # pycocotools' compressed run lengths
    ]
)

SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),  # the file as published
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        # PNG of segment ids: uint8 with 255, uint16 with 65535 = nothing; null: instances only
        pa.field("segments", pa.binary()),
        pa.field("segment_classes", pa.list_(pa.int32())),  # class by segment id; null: ids are class ids
        pa.field("segment_crowd", pa.list_(pa.bool_())),  # by segment id; null: none is a crowd
        # x1, y1, x2, y2 (exclusive) around every segment, one after the other, 0 without pixels; null like the classes
        pa.field("segment_boxes", pa.list_(pa.int32())),
        pa.field("instances", pa.list_(_INSTANCE)),  # null: none of its own, the segments of things are the instances
        pa.field("things", pa.int32(), nullable=False),  # annotated things, crowds included
        pa.field("digest", pa.string(), nullable=False),  # of all the above
    ]
)

_MIB = 1 << 20

FEW_RECORDS = 1500
"""Below this many records, starting processes takes longer than they save."""


class Stored(NamedTuple):
    """One verified record, ready to be written."""

    row: dict[str, Any]
    pixels: np.ndarray
    """(classes + 1,) pixels of every class, crowds included, then of none; zeros where there are no segments."""
    instances: np.ndarray
    """(classes,) things of every class that are no crowd."""
    held: np.ndarray
    """(classes,) bool: the classes that the picture holds, by its segments or, without segments, by its instances."""
    labels: tuple[str, ...]
    """Sorted, out of `instances`, `panoptic`, `semantic`."""


def build(
    dataset: str,
    config: DatasetConfig,
    sources: Sequence[Path],
    *,
    facts: Sequence[Mapping[str, Any]],
    processes: int = 0,
) -> dict[str, Any]:
    """Verify every record of every split and write the shards; returns the manifest (results/shard/<dataset>.json).

    facts: name, bytes and sha256 of each source. processes: 0 works in this process. The same input gives the same
    bytes. ValueError names the first file that is wrong, or the first record that is not labelled as the others are;
    nothing half-written is left behind.
    """
    if not config.class_names or len(config.class_names) >= IGNORE:
        raise ValueError(
            f"datasets.{dataset}.class_names lists {len(config.class_names)} classes; 1 to 254 are possible"
        )
    unknown = set(config.thing_classes) - set(config.class_names)
    if unknown:
        raise ValueError(f"datasets.{dataset}.thing_classes: {', '.join(sorted(unknown))} is not among class_names")
    listed = {split: LAYOUTS[config.layout].records(config, sources, split) for split in config.splits}
    shards_root = storage_root() / "shards"
    shards_root.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".building.", suffix=".part", dir=shards_root))
    try:
        splits: dict[str, dict[str, Any]] = {}
        pixels, pictures, ignored, sizes, instances = {}, {}, {}, {}, {}
        first: tuple[Record, tuple[str, ...]] | None = None
        things = frozenset(config.class_names.index(name) for name in config.thing_classes)
        for split, records in listed.items():
            progress = Progress(f"{dataset}: sharding {split}", len(records), unit="pictures")
            num_classes = len(config.class_names)
            checked = _verified(records, num_classes, things, processes if len(records) >= FEW_RECORDS else 0)
            total = np.zeros(num_classes + 1, np.int64)
            holding, counted = np.zeros(num_classes, np.int64), np.zeros(num_classes, np.int64)
            found: Counter[tuple[int, int]] = Counter()
            with _shard_writer(partial, split, config.shard_mib * _MIB) as writer:
                for record, stored_record in zip(records, checked, strict=True):
                    first = first or (record, stored_record.labels)
                    if stored_record.labels != first[1]:
                        kinds = [" and ".join(labels) for labels in (stored_record.labels, first[1])]
                        raise ValueError(
                            f"{record.image_file} has {kinds[0]} labels, but {first[0].image_file} has {kinds[1]} "
                            "labels; all pictures of a dataset need the same kinds"
                        )
                    writer.write(stored_record.row)
                    total += stored_record.pixels
                    holding += stored_record.held
                    counted += stored_record.instances
                    found[stored_record.row["height"], stored_record.row["width"]] += 1
                    progress.add()
            progress.done()
            splits[split] = {"records": len(records), "shards": writer.shards}
            pixels[split], ignored[split], pictures[split] = total[:-1].tolist(), int(total[-1]), holding.tolist()
            instances[split] = counted.tolist()
            heights, widths = [size[0] for size in found], [size[1] for size in found]
            sizes[split] = {"height": [min(heights), max(heights)], "width": [min(widths), max(widths)]}
        content = hashlib.sha256(json.dumps(splits, sort_keys=True).encode()).hexdigest()
        folder_name = f"shards/{content[:16]}"
        _settle(partial, storage_root() / folder_name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for entry in splits.values():
        for shard in entry["shards"]:
            shard["path"] = f"{folder_name}/{shard['path']}"
    manifest: dict[str, Any] = {
        "dataset": dataset,
        "class_names": list(config.class_names),
        "thing_classes": list(config.thing_classes),
        "ignore_label": IGNORE,
        "labels": list(first[1]) if first else [],
        "splits": splits,
        "pixels": pixels,
        "ignored_pixels": ignored,
        "pictures": pictures,
        "instances": instances,
        "picture_sizes": sizes,
        "sources": [
            {key: source[key] for key in ("name", "bytes", "sha256")} for source in facts
        ],  # paths say where, not what
    }
    return {"dataset": dataset, "digest": manifest_digest(manifest), **manifest}


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of everything in a manifest but its digest."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def verify(record: Record, num_classes: int, things: frozenset[int] = frozenset()) -> Stored:
    """Read a record and check all of it: the picture decodes to its end, sizes agree, ids are known, masks are whole.

    things: classes with countable instances.
    """
    labelled = record.read()
    check_picture(labelled.image, record.image_file)
    height, width = decode_image(labelled.image, record.image_file).shape[:2]
    row: dict[str, Any] = {"name": record.name, "image": labelled.image, "height": height, "width": width}
    segments, pixels = _segments(labelled, record, num_classes, (height, width))
    row |= segments
    row["instances"] = None
    classes = row["segment_classes"]
    crowd = row["segment_crowd"] or [False] * len(classes or ())
    owners = [(kind, flag) for kind, flag in zip(classes or (), crowd, strict=True) if kind in things]
    if labelled.instances is not None:
        row["instances"] = [
            _instance(instance, f"{record.label_file}: instance {index}", things, (height, width))
            for index, instance in enumerate(labelled.instances)
        ]
        owners = [(instance["class"], instance["crowd"]) for instance in row["instances"]]
    row["things"] = len(owners)
    instances = np.bincount([kind for kind, flag in owners if not flag], minlength=num_classes)
    held = pixels[:-1] > 0
    if labelled.segments is None:
        held = np.bincount([kind for kind, _ in owners], minlength=num_classes) > 0
    given = {
        "instances": labelled.instances is not None or (classes is not None and bool(things)),
        "panoptic": classes is not None,
        "semantic": labelled.segments is not None,
    }
    labels = tuple(kind for kind, there in given.items() if there)
    return Stored({**row, "digest": _record_digest(row)}, pixels, instances, held, labels)


def _segments(
    labelled: Labelled, record: Record, num_classes: int, size: tuple[int, int]
) -> tuple[dict[str, Any], np.ndarray]:
    """The fields of a row that hold checked segments, and their pixels by class, then of none."""
    import cv2

    ids, classes, crowd = labelled.segments, labelled.segment_classes, labelled.segment_crowd
    pixels = np.zeros(num_classes + 1, np.int64)
    if ids is None:
        if labelled.instances is None:
            raise ValueError(f"{record.label_file} has neither segments nor instances")
        return dict.fromkeys(("segments", "segment_classes", "segment_crowd", "segment_boxes")), pixels
    if ids.shape != size:
        raise ValueError(
            f"{record.label_file} is {ids.shape[0]} x {ids.shape[1]} (height x width), but its picture "
            f"{record.image_file} is {size[0]} x {size[1]}"
        )
    known = num_classes if classes is None else len(classes)
    nothing = IGNORE if known <= IGNORE else IGNORE_WIDE
    ids = ids.astype(np.uint8 if known <= IGNORE else np.uint16)
    counts = np.bincount(ids.ravel(), minlength=nothing + 1)
    wrong = np.flatnonzero(counts[known:nothing]) + known
    if len(wrong):
        raise ValueError(f"{record.label_file} holds segment {wrong[0]} on {counts[wrong[0]]} pixels; it has {known}")
    if classes is not None and not all(0 <= kind < num_classes for kind in classes):
        raise ValueError(f"{record.label_file} names a class outside 0 to {num_classes - 1}")
    if len(crowd) not in (0, len(classes or ())):
        raise ValueError(f"{record.label_file} has {len(crowd)} crowd flags for {len(classes or ())} segments")
    np.add.at(pixels, np.arange(known) if classes is None else np.array(classes, np.int64), counts[:known])
    pixels[-1] = counts[nothing]
    done, png = cv2.imencode(".png", ids)
    assert done
    fields = {
        "segments": png.tobytes(),
        "segment_classes": None if classes is None else list(classes),
        "segment_crowd": list(crowd) if any(crowd) else None,
        "segment_boxes": None if classes is None else _boxes(ids, known, nothing),
    }
    return fields, pixels


def _boxes(ids: np.ndarray, known: int, nothing: int) -> list[int]:
    """x1, y1, x2, y2 (exclusive) around every segment id below `known`, one after the other; 0 without pixels."""
    from scipy import ndimage

    if not known:
        return []
    found = ndimage.find_objects(np.where(ids == nothing, 0, ids.astype(np.int32) + 1), max_label=known)
    boxes = [(0, 0, 0, 0) if at is None else (at[1].start, at[0].start, at[1].stop, at[0].stop) for at in found]
    return [edge for box in boxes for edge in box]


def _instance(instance: Instance, what: str, things: frozenset[int], size: tuple[int, int]) -> dict[str, Any]:
    """A checked instance as stored. ValueError names `what`."""
    if instance.class_id not in things:
        raise ValueError(f"{what} has class {instance.class_id}, which is not a thing class")
    box = np.array(instance.box, np.float32)
    if not (np.isfinite([*box, instance.area]).all() and (box[2:] >= box[:2]).all() and instance.area >= 0):
        raise ValueError(f"{what} has the box {instance.box} (x1, y1, x2, y2) and area {instance.area}")
    try:
        check_run_lengths(instance.counts, size)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    return {
        "class": instance.class_id,
        "box": box.tolist(),
        "area": float(instance.area),
        "crowd": instance.crowd,
        "counts": instance.counts,
    }


def _record_digest(row: Mapping[str, Any]) -> str:
    """SHA-256 over all fields of a row."""
    pictures = {key: row[key] and hashlib.sha256(row[key]).hexdigest() for key in ("image", "segments")}
    instances = row["instances"] and [{**each, "counts": each["counts"].decode("ascii")} for each in row["instances"]]
    return hashlib.sha256(json.dumps({**row, **pictures, "instances": instances}, sort_keys=True).encode()).hexdigest()


def _one_thread() -> None:
    import cv2

    cv2.setNumThreads(1)


def _verified(records: Sequence[Record], num_classes: int, things: frozenset[int], processes: int) -> Iterator[Stored]:
    """Verified records in order; with processes, a bounded number is in flight."""
    if not processes:
        for record in records:
            yield verify(record, num_classes, things)
        return
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_one_thread)
    waiting: deque[Future[Stored]] = deque()
    try:
        for record in records:
            waiting.append(pool.submit(verify, record, num_classes, things))
            if len(waiting) >= 8 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise ValueError("a sharding process was killed, perhaps for memory; run the command again") from None
    finally:
        pool.shutdown(cancel_futures=True)


class _ShardWriter:
    """Writes rows to numbered shards of a split, a new one when the current one is full."""

    def __init__(self, folder: Path, split: str, shard_bytes: int) -> None:
        self.folder, self.split, self.shard_bytes = folder, split, shard_bytes
        self.shards: list[dict[str, Any]] = []
        self.writer: pa.RecordBatchFileWriter | None = None
        self.path, self.records, self.bytes = folder, 0, 0

    def write(self, row: dict[str, Any]) -> None:
        """Append one record."""
        masks = sum(len(instance["counts"]) for instance in row["instances"] or ())
        size = len(row["image"]) + len(row["segments"] or b"") + masks
        if self.writer is not None and self.bytes + size > self.shard_bytes:
            self.close()
        if self.writer is None:
            self.path = self.folder / f"{self.split}-{len(self.shards):05d}.arrow"
            self.writer = pa.ipc.new_file(self.path, SCHEMA, options=pa.ipc.IpcWriteOptions(compression=None))
            self.records = self.bytes = 0
        self.writer.write_batch(pa.RecordBatch.from_pylist([row], schema=SCHEMA))
        self.records += 1
        self.bytes += size

    def close(self) -> None:
        """Finish the current shard: on the disk, with its digest."""
        if self.writer is None:
            return
        self.writer.close()
        self.writer = None
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())
        facts = {"path": self.path.name, "records": self.records, "bytes": self.path.stat().st_size}
        self.shards.append({**facts, "sha256": sha256(self.path)})


@contextmanager
def _shard_writer(folder: Path, split: str, shard_bytes: int) -> Iterator[_ShardWriter]:
    writer = _ShardWriter(folder, split, shard_bytes)
    try:
        yield writer
    finally:
        writer.close()


def _settle(partial: Path, target: Path) -> None:
    """Move finished shards to their place; files of an earlier identical run are replaced by themselves."""
    mask = os.umask(0)
    os.umask(mask)
    partial.chmod(0o777 & ~mask)
    if not target.exists():
        partial.rename(target)
        return
    for path in partial.iterdir():
        path.replace(target / path.name)
