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

from pipeline.datasets import cityscapes, folder, shapes
from pipeline.datasets.source import Record, check_picture
from pipeline.files import sha256
from pipeline.pictures import IGNORE, IGNORE_WIDE, decode_image
from pipeline.progress import Progress
from pipeline.storage import storage_root

if TYPE_CHECKING:
    from pipeline.params import DatasetConfig

LAYOUTS: Mapping[str, ModuleType] = {"folder": folder, "cityscapes": cityscapes, "shapes": shapes}
"""Modules whose `records(config, sources, split)` lists the records of a split."""

SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),  # the file as published
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field(
            "segments", pa.binary(), nullable=False
        ),  # PNG of segment ids: uint8 with 255, uint16 with 65535 = none
        pa.field("segment_classes", pa.list_(pa.int32())),  # class by segment id; null: ids are class ids
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
    """(classes + 1,) pixels of every class, then of none."""


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
    bytes. ValueError names the first file that is wrong; nothing half-written is left behind.
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
        pixels, pictures, ignored, sizes = {}, {}, {}, {}
        for split, records in listed.items():
            progress = Progress(f"{dataset}: sharding {split}", len(records), unit="pictures")
            checked = _verified(records, len(config.class_names), processes if len(records) >= FEW_RECORDS else 0)
            total = np.zeros(len(config.class_names) + 1, np.int64)
            holding = np.zeros(len(config.class_names), np.int64)
            found: Counter[tuple[int, int]] = Counter()
            with _shard_writer(partial, split, config.shard_mib * _MIB) as writer:
                for stored_record in checked:
                    writer.write(stored_record.row)
                    total += stored_record.pixels
                    holding += stored_record.pixels[:-1] > 0
                    found[stored_record.row["height"], stored_record.row["width"]] += 1
                    progress.add()
            progress.done()
            splits[split] = {"records": len(records), "shards": writer.shards}
            pixels[split], ignored[split], pictures[split] = total[:-1].tolist(), int(total[-1]), holding.tolist()
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
        "splits": splits,
        "pixels": pixels,
        "ignored_pixels": ignored,
        "pictures": pictures,
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


def verify(record: Record, num_classes: int) -> Stored:
    """Read a record and check all of it: the picture decodes to its end, sizes agree, ids are known."""
    import cv2

    labelled = record.read()
    check_picture(labelled.image, record.image_file)
    height, width = decode_image(labelled.image, record.image_file).shape[:2]
    ids, classes = labelled.segments, labelled.segment_classes
    if ids is None:
        raise ValueError(f"{record.label_file} has no segments")
    if ids.shape != (height, width):
        raise ValueError(
            f"{record.label_file} is {ids.shape[0]} x {ids.shape[1]} (height x width), but its picture "
            f"{record.image_file} is {height} x {width}"
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
    pixels = np.zeros(num_classes + 1, np.int64)
    np.add.at(pixels, np.arange(known) if classes is None else np.array(classes, np.int64), counts[:known])
    pixels[-1] = counts[nothing]
    done, png = cv2.imencode(".png", ids)
    assert done
    row = {
        "name": record.name,
        "image": labelled.image,
        "height": height,
        "width": width,
        "segments": png.tobytes(),
        "segment_classes": None if classes is None else list(classes),
    }
    return Stored({**row, "digest": _record_digest(row)}, pixels)


def _record_digest(row: Mapping[str, Any]) -> str:
    head = json.dumps([row["name"], row["height"], row["width"], row["segment_classes"]])
    parts = (head.encode(), hashlib.sha256(row["image"]).digest(), hashlib.sha256(row["segments"]).digest())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _one_thread() -> None:
    import cv2

    cv2.setNumThreads(1)


def _verified(records: Sequence[Record], num_classes: int, processes: int) -> Iterator[Stored]:
    """Verified records in order; with processes, a bounded number is in flight."""
    if not processes:
        for record in records:
            yield verify(record, num_classes)
        return
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_one_thread)
    waiting: deque[Future[Stored]] = deque()
    try:
        for record in records:
            waiting.append(pool.submit(verify, record, num_classes))
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
        size = len(row["image"]) + len(row["segments"])
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
