"""Small data sets for the tests of the data stages, in the layouts that users bring."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pyarrow as pa
from pycocotools import mask as coco_mask

from pipeline.data.images.codecs import decode_image, decode_segments
from pipeline.data.records import Instance
from pipeline.params.schema import DatasetConfig
from pipeline.storage.results.data import Manifest, Shard, Split
from tests.helpers.manifests import made_up_manifest


def config(**changes: Any) -> DatasetConfig:
    """A folder data set of three classes with ignore label 9."""
    settings: dict[str, Any] = {"layout": "folder", "class_names": ("sky", "road", "car"), "ignore_label": 9}
    return DatasetConfig(**{**settings, **changes})


def labels(height: int = 12, width: int = 16) -> np.ndarray:
    """Upper half class 0, lower half class 1, a 4 x 4 car (class 2) on the border, first column ignored."""
    ids = np.zeros((height, width), np.uint8)
    ids[height // 2 :] = 1
    ids[height // 2 - 2 : height // 2 + 2, 6:10] = 2
    ids[:, 0] = 9
    return ids


def image(height: int = 12, width: int = 16, seed: int = 0) -> np.ndarray:
    """Random colours."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encoded(pixels: np.ndarray, suffix: str = ".png") -> bytes:
    """A picture file's bytes; colours are RGB."""
    done, data = cv2.imencode(suffix, pixels[..., ::-1] if pixels.ndim == 3 else pixels)
    assert done
    return bytes(data.tobytes())


JPEG = encoded(image(), ".jpg")


def mirror(pixels: np.ndarray, mirrored: bool) -> np.ndarray:
    return np.ascontiguousarray(pixels[:, ::-1]) if mirrored else pixels


def write_folder(folder: Path, *, train: int = 3, val: int = 2, top: str = "") -> Path:
    """A data set in ADE20K's layout below `folder/top`; returns `folder`."""
    for split, count in (("training", train), ("validation", val)):
        for index in range(count):
            put(folder / top / f"images/{split}/p{index}.jpg", encoded(image(seed=index), ".jpg"))
            put(folder / top / f"annotations/{split}/p{index}.png", encoded(labels()))
    return folder


def put(path: Path, data: bytes) -> None:
    """Write a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def zipped(folder: Path, archive: Path) -> Path:
    """The folder's files as a zip archive."""
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                file.write(path, path.relative_to(folder).as_posix())
    return archive


STORED = pa.schema(
    [
        pa.field("name", pa.string()),
        pa.field("image", pa.binary()),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("segments", pa.binary()),
        pa.field("segment_classes", pa.list_(pa.int32())),
        pa.field("segment_crowd", pa.list_(pa.bool_())),
        pa.field("segment_boxes", pa.list_(pa.int32())),
        pa.field(
            "instances",
            pa.list_(
                pa.struct(
                    {
                        "class": pa.int32(),
                        "box": pa.list_(pa.float32()),
                        "area": pa.float64(),
                        "crowd": pa.bool_(),
                        "counts": pa.binary(),
                    }
                )
            ),
        ),
        pa.field("things", pa.int32()),
        pa.field("digest", pa.string()),
    ]
)
"""A shard's columns, written out here so that the loader's tests need no sharding."""


def stored(
    name: str,
    pixels: np.ndarray,
    segments: np.ndarray | None = None,
    classes: Sequence[int] | None = None,
    *,
    crowd: Sequence[bool] | None = None,
    instances: Sequence[Instance] | None = None,
    things: int = 0,
) -> dict[str, Any]:
    """A record as a shard holds it; `segments` of dtype uint8 with 255, or uint16 with 65535, for nothing."""
    boxes = None
    if segments is not None and classes is not None:
        boxes = [edge for segment in range(len(classes)) for edge in box_of(segments == segment)]
    return {
        "name": name,
        "image": encoded(pixels),
        "height": pixels.shape[0],
        "width": pixels.shape[1],
        "segments": None if segments is None else encoded(segments),
        "segment_classes": None if classes is None else list(classes),
        "segment_crowd": crowd,
        "segment_boxes": boxes,
        "instances": None if instances is None else [_instance(instance) for instance in instances],
        "things": things if instances is None else len(instances),
        "digest": name,
    }


def raw(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of `stored` in the layout raw."""
    image, segments = decode_image(record["image"], ""), record["segments"]
    segments = None if segments is None else decode_segments(segments, "").tobytes()
    return {**record, "image": image.tobytes(), "segments": segments}


def _instance(instance: Instance) -> dict[str, Any]:
    return {**instance._asdict(), "class": instance.class_id, "box": list(instance.box)}


def instance(class_id: int, mask: np.ndarray, **changes: Any) -> Instance:
    """An object with this mask, (h, w) bool; box and area are the mask's."""
    counts = coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"]
    box = tuple(float(edge) for edge in box_of(mask))
    return Instance(class_id, box, float(mask.sum()), False, counts)._replace(**changes)  # type: ignore[arg-type]


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """x1, y1, x2, y2 (exclusive) around a mask; zeros without pixels."""
    rows, columns = np.nonzero(mask)
    if not len(rows):
        return 0, 0, 0, 0
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def rectangle(size: tuple[int, int], x1: int, y1: int, x2: int, y2: int) -> np.ndarray:
    """(h, w) bool, true inside."""
    mask = np.zeros(size, bool)
    mask[y1:y2, x1:x2] = True
    return mask


def write_shards(
    storage: Path,
    splits: Mapping[str, Sequence[dict[str, Any]]],
    *,
    labels: Sequence[str] = ("semantic",),
    classes: Sequence[str] = ("sky", "road", "car"),
    things: Sequence[str] = (),
    per_shard: int = 100,
    layout: Literal["encoded", "raw"] = "encoded",
) -> Manifest:
    """Shards of records under the storage root; their manifest, whose counts are made up."""
    written: dict[str, Split] = {}
    for split, records in splits.items():
        shards = []
        for start in range(0, len(records), per_shard):
            part = [raw(each) if layout == "raw" else each for each in records[start : start + per_shard]]
            path = f"shards/mine/{split}-{len(shards):05d}.arrow"
            (storage / path).parent.mkdir(parents=True, exist_ok=True)
            with pa.ipc.new_file(storage / path, STORED) as writer:
                for record in part:
                    writer.write_batch(pa.RecordBatch.from_pylist([record], schema=STORED))
            data = (storage / path).read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            shards.append(Shard(path=path, records=len(part), bytes=len(data), sha256=digest))
        written[split] = Split(records=len(records), shards=tuple(shards))
    return made_up_manifest(
        digest=hashlib.sha256(repr(written).encode()).hexdigest(),
        class_names=tuple(classes),
        thing_classes=tuple(things),
        labels=tuple(labels),
        pixel_layout=layout,
        splits=written,
    )
