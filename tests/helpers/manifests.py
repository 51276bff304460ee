"""Manifests of shards that never were."""

from __future__ import annotations

import dataclasses
from typing import Any

from pipeline.storage.results.data import (
    ImageSides,
    Manifest,
    Samples,
    Shard,
    SkippedRecord,
    Source,
    Split,
    manifest_digest,
)


def made_up_manifest(**fields: Any) -> Manifest:
    """Of two training pictures, of which one was skipped, and one for validation, 8 x 10 each; keywords replace
    fields. Classes after the third have nothing."""
    more = (0,) * (len(fields.get("class_names", ())) - 3)
    sizes = ImageSides(height=(8, 8, 8), width=(10, 10, 10))
    shards = {
        split: Shard(path=f"shards/5a5a/{split}-00000.arrow", records=1, bytes=512, sha256="5a" * 32)
        for split in ("train", "val")
    }
    values: dict[str, Any] = {
        "dataset": "mine",
        "digest": "",
        "class_names": ("sky", "road", "car"),
        "thing_classes": ("car",),
        "ignore_label": 255,
        "labels": ("panoptic", "semantic"),
        "pixel_layout": "encoded",
        "splits": {split: Split(records=1, shards=(shard,)) for split, shard in shards.items()},
        "pixels": {"train": (40, 30, 6, *more), "val": (40, 40, 0, *more)},
        "ignored_pixels": {"train": 4, "val": 0},
        "images": {"train": (1, 1, 1, *more), "val": (1, 1, 0, *more)},
        "instances": {"train": (0, 0, 2, *more), "val": (0, 0, 0, *more)},
        "things_per_image": {"train": {2: 1}, "val": {0: 1}},
        "image_sizes": {"train": sizes, "val": sizes},
        "bytes": {"train": 512, "val": 512},
        "skipped": {"train": (SkippedRecord(file="mine.zip: p1.jpg", reason="does not decode"),), "val": ()},
        "sources": (Source(name="mine.zip", bytes=2048, sha256="0b" * 32),),
        "samples": Samples(path="shards/5a5a/samples.png", bytes=256, sha256="c1" * 32),
        "terms": "CC0 (made up)",
    }
    made = Manifest(**{**values, **fields})
    return made if "digest" in fields else dataclasses.replace(made, digest=manifest_digest(made))
