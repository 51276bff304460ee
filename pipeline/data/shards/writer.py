"""One shard: verified records in an uncompressed Arrow IPC file, and facts about them in a JSON file beside it.

A shard has one record per batch, so that any record is read from the memory map without touching its neighbours.
The same records and settings give the same bytes, wherever and whenever it is made.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.data.images.codecs import IGNORE, encode_segments, nothing_for
from pipeline.data.images.image_files import (
    AS_FILES_SAY,
    ImageReading,
    image_size,
    loaded_image,
    memory_said,
    stored_image,
    turned_hint,
)
from pipeline.data.records import Labelled, Record
from pipeline.data.shards.things import stored_instances, thing_segments
from pipeline.params.parse import parse
from pipeline.storage.digests import known_digest
from pipeline.storage.files import read_json, sha256, whole_file, write_json
from pipeline.storage.results.data import EmptyThings, Label, SkippedRecord
from pipeline.storage.root import storage_root
from pipeline.storage.stores import StoredPath, store_of

Pixels = Literal["encoded", "raw"]
"""How a shard holds pictures and segment ids: as files, small, or decoded, so that a crop touches only its own rows."""

NAMED = 5
"""Things without a pixel that are named."""

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
        # encoded: the file as published, or a PNG where decode_image would not read it as the dataset's settings say;
        # raw: height * width * 3 bytes, RGB rows from the top
        pa.field("image", pa.binary(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        # segment ids, uint8 with 255 or, with over 255 ids, uint16 (little-endian) with 65535 for nothing; encoded: a
        # PNG, raw: their height * width values from the top; null: instances only
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

LABEL_MAP = pa.field("label_map", pa.binary())
"""One more column, of datasets with label maps beside their segments: a PNG of Labelled.label_map; null: none."""


class Stored(NamedTuple):
    """One verified record, ready to be written."""

    row: dict[str, Any]
    pixels: np.ndarray
    """(classes + 1,) pixels of every class, crowds included, then of none; zeros where there are no segments."""
    instances: np.ndarray
    """(classes,) things of every class that are no crowd."""
    held: np.ndarray
    """(classes,) bool: the classes that the picture holds, by its segments or, without segments, by its instances."""
    labels: tuple[Label, ...]
    """Sorted."""
    targets: int
    """Things that are no crowd and have a pixel."""
    empty: tuple[str, ...]
    """Names of the things whose mask has no pixel."""
    left_out: tuple[str, ...]
    """Categories of the picture that the dataset leaves out."""
    image_digest: str
    """Of the image's file as published, 16 hexadecimal digits."""


def verify(
    record: Record,
    num_classes: int,
    things: frozenset[int] = frozenset(),
    *,
    pixels: Pixels = "encoded",
    reading: ImageReading = AS_FILES_SAY,
    label_maps: bool = False,
) -> Stored:
    """Read a record and check all of it: the picture decodes to its end, sizes agree, ids are known, masks are whole.

    things: classes with countable instances. label_maps: whether the row has LABEL_MAP. ValueError names the file that
    is wrong.
    """
    labelled = record.read()
    image = stored_image(labelled.image, record.image_file, reading)
    decoded = loaded_image(image, record.image_file)
    height, width = decoded.shape[:2]
    _check_size((height, width), labelled, record, reading)
    data = decoded.tobytes() if pixels == "raw" else image
    row: dict[str, Any] = {"name": record.name, "image": data, "height": height, "width": width}
    segments, counts = _segments(labelled, record, num_classes, pixels)
    row |= segments
    if label_maps:
        row[LABEL_MAP.name] = _label_map(labelled, record, num_classes)
    if labelled.instances is None:
        row["instances"], owners = None, thing_segments(row, record, things)
    else:
        row["instances"], owners = stored_instances(labelled.instances, record, things, (height, width))
    row["things"] = len(owners)
    instances = np.bincount([thing.class_id for thing in owners if not thing.crowd], minlength=num_classes)
    held = counts[:-1] > 0
    if labelled.segments is None:
        held = np.bincount([thing.class_id for thing in owners], minlength=num_classes) > 0
    given: dict[Label, bool] = {
        "instances": labelled.instances is not None or (row["segment_classes"] is not None and bool(things)),
        "panoptic": row["segment_classes"] is not None,
        "semantic": labelled.segments is not None,
    }
    labels = tuple(label_type for label_type, there in given.items() if there)
    return Stored(
        row={**row, "digest": _record_digest(row)},
        pixels=counts,
        instances=instances,
        held=held,
        labels=labels,
        targets=sum(not (thing.crowd or thing.empty) for thing in owners),
        empty=tuple(f"{thing.name}, image {record.name}" for thing in owners if thing.empty),
        left_out=labelled.left_out,
        image_digest=hashlib.sha256(labelled.image).hexdigest()[:16],
    )


def _check_size(size: tuple[int, int], labelled: Labelled, record: Record, reading: ImageReading) -> None:
    """ValueError unless labels and picture have the same height and width."""
    for made_for in (labelled.size, None if labelled.segments is None else labelled.segments.shape):
        if made_for not in (None, size):
            raise ValueError(
                f"{record.label_file} is {made_for[0]} x {made_for[1]} (height x width), but its image "
                f"{record.image_file} is {size[0]} x {size[1]}{turned_hint(size, made_for, reading.exif)}"
            )


def _segments(
    labelled: Labelled, record: Record, num_classes: int, layout: Pixels
) -> tuple[dict[str, Any], np.ndarray]:
    """The fields of a row that hold checked segments, and their pixels by class, then of none."""

    ids, classes, crowd = labelled.segments, labelled.segment_classes, labelled.segment_crowd
    pixels = np.zeros(num_classes + 1, np.int64)
    if ids is None:
        if labelled.instances is None:
            raise ValueError(f"{record.label_file} has neither segments nor instances")
        return dict.fromkeys(("segments", "segment_classes", "segment_crowd", "segment_boxes")), pixels
    known = num_classes if classes is None else len(classes)
    nothing = nothing_for(known)
    if ids.min() < 0 or ids.max() > nothing:
        raise ValueError(f"{record.label_file} holds segments {ids.min()} to {ids.max()}; it has {known}")
    ids = ids.astype(np.uint8 if nothing == IGNORE else "<u2")
    counts = np.bincount(ids.ravel(), minlength=nothing + 1)
    wrong = np.flatnonzero(counts[known:nothing]) + known
    if len(wrong):
        raise ValueError(f"{record.label_file} holds segment {wrong[0]} on {counts[wrong[0]]} pixels; it has {known}")
    if classes is not None and not all(0 <= class_id < num_classes for class_id in classes):
        raise ValueError(f"{record.label_file} names a class outside 0 to {num_classes - 1}")
    if len(crowd) not in (0, len(classes or ())):
        raise ValueError(f"{record.label_file} has {len(crowd)} crowd flags for {len(classes or ())} segments")
    np.add.at(pixels, np.arange(known) if classes is None else np.array(classes, np.int64), counts[:known])
    pixels[-1] = counts[nothing]
    fields = {
        "segments": encode_segments(ids) if layout == "encoded" else ids.tobytes(),
        "segment_classes": None if classes is None else list(classes),
        "segment_crowd": list(crowd) if any(crowd) else None,
        "segment_boxes": None if classes is None else _boxes(ids, known, nothing),
    }
    return fields, pixels


def _label_map(labelled: Labelled, record: Record, num_classes: int) -> bytes | None:
    """A checked label map as it is stored."""
    if (labels := labelled.label_map) is None:
        return None
    nothing = nothing_for(num_classes + 1)
    wrong = labels[(labels < 0) | ((labels > num_classes) & (labels != nothing))]
    if len(wrong) or labelled.segments is None or labels.shape != labelled.segments.shape:
        raise ValueError(
            f"{record.label_file} has a label map of {' x '.join(map(str, labels.shape))} (height x width) with class "
            f"{int(wrong[0]) if len(wrong) else '-'}, for {num_classes} classes"
        )
    return encode_segments(labels.astype(np.uint8 if nothing == IGNORE else np.uint16))


def _boxes(ids: np.ndarray, known: int, nothing: int) -> list[int]:
    """x1, y1, x2, y2 (exclusive) around every segment id below `known`, one after the other; 0 without pixels."""
    from scipy import ndimage

    if not known:
        return []
    found = ndimage.find_objects(np.where(ids == nothing, 0, ids.astype(np.int32) + 1), max_label=known)
    boxes = [(0, 0, 0, 0) if at is None else (at[1].start, at[0].start, at[1].stop, at[0].stop) for at in found]
    return [edge for box in boxes for edge in box]


def _record_digest(row: Mapping[str, Any]) -> str:
    """SHA-256 over all fields of a row."""
    columns = [key for key in ("image", "segments", LABEL_MAP.name) if key in row]
    images = {key: row[key] and hashlib.sha256(row[key]).hexdigest() for key in columns}
    instances = row["instances"] and [{**each, "counts": each["counts"].decode("ascii")} for each in row["instances"]]
    return hashlib.sha256(json.dumps({**row, **images, "instances": instances}, sort_keys=True).encode()).hexdigest()


def expected_bytes(record: Record, pixels: Pixels, reading: ImageReading = AS_FILES_SAY) -> int:
    """About the bytes that a record will take in a shard, without decoding its picture. ValueError as `verify`."""
    labelled = record.read()
    height, width = image_size(labelled.image, record.image_file, reading)
    size = 1024 + (3 * height * width if pixels == "raw" else len(labelled.image))  # 1024: frame and other columns
    if labelled.segments is not None:
        wide = len(labelled.segment_classes or ()) > IGNORE or bool(labelled.segments.max(initial=0) > IGNORE)
        ids = labelled.segments.astype(np.uint16 if wide else np.uint8)
        size += ids.nbytes if pixels == "raw" else len(encode_segments(ids))
        size += 20 * len(labelled.segment_classes or ())  # class and box
    if labelled.label_map is not None:
        size += len(encode_segments(labelled.label_map))
    return size + sum(len(instance.counts) + 64 for instance in labelled.instances or ())


# One shard


@dataclass(frozen=True)
class ShardJob:
    """A shard to be made: all that a process needs. Can be sent to another process."""

    name: str
    """<split>-<number>: the name of its files, without suffix."""
    split: str
    records: Sequence[Record]
    num_classes: int
    things: frozenset[int]
    pixels: Pixels
    on_error: Literal["stop", "skip"]
    sources: tuple[Path, ...]
    """The dataset's archives and folders, as files of this host."""
    archives: tuple[tuple[str, str], ...] = ()
    """Path under the storage root and SHA-256 of the archives that `sources` are, or are this host's copies of."""
    reading: ImageReading = AS_FILES_SAY
    label_maps: bool = False
    """Whether there are label maps beside segments."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageLabels:
    """What labels a picture has."""

    label_types: tuple[Label, ...]
    file: str
    """The picture's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardFacts:
    """<name>.json beside a shard: what it holds. It needs no version: a folder of shards is taken up only where the
    code of this module was the same (pipeline.data.shards.build)."""

    records: int
    bytes: int
    sha256: str
    pixels: tuple[int, ...]
    """Of every class, crowds included, then of none."""
    images: tuple[int, ...]
    """That hold a class, for every class."""
    instances: tuple[int, ...]
    """Things that are no crowd, of every class."""
    things_per_image: Mapping[int, int]
    """Number of things that are no crowd -> pictures with as many."""
    things: int
    """All, crowds included."""
    targets: int
    """Things that are no crowd and have a pixel."""
    empty: EmptyThings
    left_out: tuple[str, ...]
    """Categories that the dataset leaves out, sorted."""
    sizes: tuple[tuple[int, int, int], ...]
    """Height, width, pictures of that size."""
    labels: ImageLabels | None
    """Of its first picture; None: every record was skipped."""
    skipped: tuple[SkippedRecord, ...]
    image_digests: Mapping[str, str]
    """Of every image's file as published, by the record's name."""


def make_shard(job: ShardJob, folder: StoredPath, on_record: Callable[[], None] | None = None) -> ShardFacts:
    """Read and verify the records of a shard, write <name>.arrow and then <name>.json; returns what the latter holds.

    One record is in memory at a time: less than 40 bytes for every pixel of the largest picture, however many
    records and whichever size the shard has, beside the job itself. ValueError is the first wrong record's, unless
    wrong records are skipped. OSError when this host does not see the sources or the folder.
    """
    import cv2

    for path, digest in job.archives:
        store_of(storage_root() / path).local(digest)  # which makes the copy
    for place in (folder, *job.sources):
        if not store_of(place).is_visible():
            raise OSError(
                f"host {socket.gethostname()} does not see {place}; on a cluster the storage root and the sources must "
                "be on a file system that all hosts share, under the same path"
            )
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # there is a process for every core
    try:
        with whole_file(folder / f"{job.name}.arrow") as partial:
            facts = _write(job, partial, on_record)
    finally:
        cv2.setNumThreads(threads)
    write_json(folder / f"{job.name}.json", asdict(facts))
    return facts


def _write(job: ShardJob, path: Path, on_record: Callable[[], None] | None) -> ShardFacts:
    """Write the shard's records to `path`; its facts."""
    pixels = np.zeros(job.num_classes + 1, np.int64)
    images, instances = np.zeros(job.num_classes, np.int64), np.zeros(job.num_classes, np.int64)
    things: Counter[int] = Counter()
    sizes: Counter[tuple[int, int]] = Counter()
    labels: ImageLabels | None = None
    skipped: list[SkippedRecord] = []
    every, targets, empty, left_out = 0, 0, list[str](), set[str]()
    image_digests: dict[str, str] = {}
    schema = SCHEMA.append(LABEL_MAP) if job.label_maps else SCHEMA
    with pa.ipc.new_file(path, schema, options=pa.ipc.IpcWriteOptions(compression=None)) as writer:
        for record in job.records:
            try:
                with memory_said(record.image_file):
                    stored = verify(
                        record,
                        job.num_classes,
                        job.things,
                        pixels=job.pixels,
                        reading=job.reading,
                        label_maps=job.label_maps,
                    )
            except ValueError as error:
                if job.on_error == "stop":
                    raise
                skipped.append(SkippedRecord(file=record.image_file, reason=" ".join(str(error).split())))
            else:
                writer.write_batch(pa.RecordBatch.from_pylist([stored.row], schema=schema))
                pixels += stored.pixels
                images += stored.held
                instances += stored.instances
                things[int(stored.instances.sum())] += 1
                sizes[stored.row["height"], stored.row["width"]] += 1
                image_digests[record.name] = stored.image_digest
                labels = same_labels(labels, ImageLabels(label_types=stored.labels, file=record.image_file))
                every, targets = every + stored.row["things"], targets + stored.targets
                empty += stored.empty
                left_out.update(stored.left_out)
                del stored  # before the next one is read
                pa.default_memory_pool().release_unused()
            if on_record is not None:
                on_record()
    return ShardFacts(
        records=len(job.records) - len(skipped),
        bytes=path.stat().st_size,
        sha256=sha256(path),
        pixels=tuple(pixels.tolist()),
        images=tuple(images.tolist()),
        instances=tuple(instances.tolist()),
        things_per_image={count: things[count] for count in sorted(things)},
        things=every,
        targets=targets,
        empty=EmptyThings(count=len(empty), first=tuple(empty[:NAMED])),
        left_out=tuple(sorted(left_out)),
        sizes=tuple((*size, sizes[size]) for size in sorted(sizes)),
        labels=labels,
        skipped=tuple(skipped),
        image_digests=image_digests,
    )


def same_labels(known: ImageLabels | None, found: ImageLabels) -> ImageLabels:
    """The labels that all of a dataset's pictures have, with one of them. ValueError if those of `found` are others."""
    if known is None:
        return found
    if known.label_types != found.label_types:
        label_types, others = (" and ".join(labels.label_types) for labels in (known, found))
        raise ValueError(
            f"{found.file} has {others} labels, but {known.file} has {label_types} labels; all images of a dataset "
            "need the same types"
        )
    return known


def finished_shard(folder: StoredPath, name: str) -> ShardFacts | None:
    """The facts of a shard that is there and as it was written; None otherwise: it is to be made again."""
    shard, beside = folder / f"{name}.arrow", folder / f"{name}.json"
    try:
        facts = parse(ShardFacts, read_json(beside, made_by="python -m stages.shard"), str(beside), in_file=True)
        whole = shard.stat().st_size == facts.bytes and known_digest(shard, sha256) == facts.sha256
    except (OSError, ValueError):
        return None
    return facts if whole else None


def read_rows(path: StoredPath, places: Sequence[int]) -> list[dict[str, Any]]:
    """Some rows of a shard."""
    with path.open("rb") as file:
        reader = pa.ipc.open_file(file)
        return [reader.get_batch(place).to_pylist()[0] for place in places]
