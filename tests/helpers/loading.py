"""Made-up pictures with labels, and what the loader makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.data.loader.train_batches import Batch, TrainingOrder, training_batches
from pipeline.params.schema import AugmentationConfig, TestConfig
from pipeline.storage.results.data import Manifest
from tests.helpers.images import image, instance, rectangle, stored, write_shards

TEST = TestConfig(short_side=24, long_side_max=100)
LAYOUTS = ("encoded", "raw")

THINGS: dict[str, Any] = {
    "labels": ("instances", "panoptic", "semantic"),
    "classes": ("sky", "car", "person"),
    "things": ("person", "car"),
}
"""A data set with things: sky is class 0 and stuff, car is class 1 and thing 0, person is class 2 and thing 1."""


def augmentation(**changes: Any) -> AugmentationConfig:
    settings: dict[str, Any] = {"crop": (32, 32), "short_sides": (12, 24, 36), "long_side_max": 100}
    return AugmentationConfig(**{**settings, **changes})


_OF_ORDER = ("task", "images", "seed", "global_batch", "repeat_threshold")


def batches(manifest: Manifest, plan: AugmentationConfig | None = None, **changes: Any) -> list[Batch]:
    settings: dict[str, Any] = {
        "seed": 5,
        "first_step": 0,
        "steps": 4,
        "global_batch": 4,
        "image_range": range(4),
        **changes,
    }
    of_order = {name: settings.pop(name) for name in _OF_ORDER if name in settings}
    order = TrainingOrder(manifest=manifest, augmentation=plan or augmentation(), **of_order)
    return list(training_batches(order, **settings))


def images_of(items: list[Batch]) -> dict[int, tuple[Any, ...]]:
    """Everything that belongs to each position."""
    found = {}
    for batch in items:
        for place, position in enumerate(batch.positions):
            height, width = batch.sizes[place].tolist()
            found[position] = (
                batch.names[place],
                batch.seeds[place],
                (height, width),
                batch.labels[place].tolist(),
                batch.images[place, :, :height, :width].numpy().tobytes(),
                None if batch.segments is None else batch.segments[place].numpy().tobytes(),
                None if batch.masks is None else batch.masks[place].numpy().tobytes(),
            )
    return found


def many(name: str, count: int) -> dict[str, Any]:
    """`count` segments in turn over 20 x 20 pixels, of the classes 2, 1, 2, 1, ...; the last pixel is nothing."""
    ids = (np.arange(400) % count).reshape(20, 20).astype(np.uint8 if count <= 255 else np.uint16)
    ids[-1, -1] = 255 if count <= 255 else 65535
    return stored(name, image(20, 20), ids, [2 - index % 2 for index in range(count)])


def street() -> dict[str, Any]:
    """8 x 8 in columns of two: sky (id 2), a car (0), a crowd of cars (1), sky again (3); the last row is nothing."""
    ids = np.repeat(np.array([2, 0, 1, 3], np.uint8), 2)[None].repeat(8, 0)
    ids[-1] = 255
    return stored("p0", image(8, 8), ids, [1, 1, 0, 0], crowd=[False, True, False, False])


def crossing() -> dict[str, Any]:
    """8 x 8 without segments: a car and a person who overlap, a crowd, and two annotations that are no targets."""
    size = (8, 8)
    objects = [
        instance(1, rectangle(size, 0, 0, 4, 4), area=15.5),
        instance(1, rectangle(size, 0, 0, 8, 1), crowd=True),
        instance(1, rectangle(size, 5, 5, 7, 7), area=0.0),
        instance(2, rectangle(size, 6, 0, 7, 8), box=(6.0, 0.0, 6.5, 8.0)),
        instance(2, rectangle(size, 2, 2, 6, 6)),
    ]
    return stored("p0", image(8, 8), instances=objects)


def shard_path(storage: Path, manifest: Manifest) -> Path:
    return storage / manifest.splits["train"].shards[0].path


def wide(storage: Path, task: str, layout: Literal["encoded", "raw"] = "encoded") -> Manifest:
    """Two pictures of 32 x 48 for each split, of 300 classes: 255 above, 299 below, the first column is nothing."""
    lower = np.zeros((32, 48), bool)
    lower[16:] = True
    if task == "semantic":
        ids, classes = np.where(lower, 299, 255).astype(np.uint16), None
        ids[:, 0] = 65535
    else:
        ids, classes = lower.astype(np.uint8), [255, 299]
        ids[:, 0] = 255
    records = [stored(f"p{index}", image(32, 48, seed=index), ids, classes) for index in range(2)]
    names = [f"class {index}" for index in range(300)]
    labels = ("semantic",) if task == "semantic" else ("instances", "panoptic", "semantic")
    things = names[299:] if task == "panoptic" else ()
    splits = {"train": records, "val": records}
    return write_shards(storage, splits, labels=labels, classes=names, things=things, layout=layout)
