"""The things of a record: checked instances or segments, and what they are counted as."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.data.images.masks import mask_pixels
from pipeline.data.records import Instance, Record


class Thing(NamedTuple):
    """An instance or a segment of a thing class."""

    class_id: int
    crowd: bool
    empty: bool
    """Without a pixel."""
    name: str
    """For messages."""


def thing_segments(row: Mapping[str, Any], record: Record, things: frozenset[int]) -> list[Thing]:
    """The segments of things in a row; none where segment ids are classes."""
    classes = row["segment_classes"] or ()
    crowd = row["segment_crowd"] or [False] * len(classes)
    boxes = np.array(row["segment_boxes"] or (), np.int64).reshape(-1, 4)
    return [
        Thing(class_id, flag, not box.any(), f"{record.label_file}: segment {place}")
        for place, (class_id, flag, box) in enumerate(zip(classes, crowd, boxes, strict=True))
        if class_id in things
    ]


def stored_instances(
    instances: Sequence[Instance], record: Record, things: frozenset[int], size: tuple[int, int]
) -> tuple[list[dict[str, Any]], list[Thing]]:
    """Checked instances as stored. ValueError names the one that is wrong."""
    rows, owners = [], []
    for place, instance in enumerate(instances):
        name = f"{record.label_file}: {instance.name or f'instance {place}'}"
        pixels = _check_instance(instance, name, things, size)
        box = np.array(instance.box, np.float32).tolist()
        rows.append(
            {
                "class": instance.class_id,
                "box": box,
                "area": float(instance.area),
                "crowd": instance.crowd,
                "counts": instance.counts,
            }
        )
        owners.append(Thing(instance.class_id, instance.crowd, pixels == 0, name))
    return rows, owners


def _check_instance(instance: Instance, name: str, things: frozenset[int], size: tuple[int, int]) -> int:
    """The pixels of an instance's mask. ValueError begins with `name`."""
    if instance.class_id not in things:
        raise ValueError(f"{name} has class {instance.class_id}, which is not a thing class")
    box = np.array(instance.box, np.float32)
    if not (np.isfinite([*box, instance.area]).all() and (box[2:] >= box[:2]).all() and instance.area >= 0):
        raise ValueError(f"{name} has the box {instance.box} (x1, y1, x2, y2) and area {instance.area}")
    try:
        return mask_pixels(instance.counts, size)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
