"""Predictions for one picture as a label map, as COCO annotations, and as objects to be drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from m2f.inference import Instances
from m2f.inference.windowed_objects import CroppedInstance, cropped_instances
from pipeline.data.images.codecs import IGNORE, encode_cropped_mask, encode_masks, nothing_for
from pipeline.evaluation.predict import Predictions, WindowedPredictions

if TYPE_CHECKING:
    from m2f.inference import Segments
    from pipeline.prediction.network import TrainedNetwork

SHOWN_SCORE = 0.5
"""Instances that are less sure are not drawn, counted, or in label maps."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Objects:
    """What is drawn over a picture: every pixel belongs to one object or to none."""

    ids: np.ndarray
    """(h, w) int32 index into `labels`; -1: none."""
    labels: Sequence[int]
    """The class of every object."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Annotated:
    """One picture's predictions, in the forms that are written."""

    label_map: np.ndarray
    """(h, w) class ids, uint8 with 255 or, of more than 255 classes, uint16 with 65535 for nothing."""
    segment_ids: np.ndarray | None
    """Panoptic: (h, w) int32 ids as in `annotations`, 0: none."""
    annotations: list[dict[str, Any]]
    """COCO's: panoptic `segments_info`, else objects without `id` and `image_id`."""
    objects: Objects


def annotated(predictions: Predictions | WindowedPredictions, network: TrainedNetwork) -> Annotated:
    """A picture's predictions in the forms that are written.

    The label map is the one that evaluation takes mIoU of or, for the task instance, the surest instances' classes.
    """
    nothing = nothing_for(len(network.class_names))
    if predictions.segments is not None:
        assert predictions.labels is not None
        return _panoptic(predictions.segments, predictions.labels.cpu().numpy(), nothing)
    if predictions.instances is not None:
        found = predictions.instances
        if isinstance(found, Instances):
            size = (found.masks.shape[1], found.masks.shape[2])
            return _instances(cropped_instances(found), size, nothing)
        assert isinstance(predictions, WindowedPredictions)
        return _instances(found, predictions.size, nothing)
    assert predictions.labels is not None
    return _semantic(predictions.labels.cpu().numpy(), nothing)


def _panoptic(found: Segments, labels: np.ndarray, nothing: int) -> Annotated:
    ids, classes = found.segments.cpu().numpy(), found.labels.tolist()
    kept = zip(classes, found.is_thing.tolist(), found.scores.tolist(), _extents(ids, len(classes)), strict=True)
    infos = [
        {"id": segment, "category_id": label, "isthing": int(thing), "score": score, "iscrowd": 0, **extent}
        for segment, (label, thing, score, extent) in enumerate(kept, start=1)
    ]
    label_map = labels.astype(_map_type(nothing))
    return Annotated(
        label_map=label_map, segment_ids=ids + 1, annotations=infos, objects=Objects(ids=ids, labels=classes)
    )


def _instances(found: Sequence[CroppedInstance], size: tuple[int, int], nothing: int) -> Annotated:
    """found: best first."""
    annotations = []
    ids, label_map = np.full(size, -1, np.int32), np.full(size, nothing, _map_type(nothing))
    sure = [each for each in found if each.score >= SHOWN_SCORE]
    for place, each in reversed([*enumerate(sure)]):  # the surest on top
        inside = slice(each.top, each.top + each.size[0]), slice(each.left, each.left + each.size[1])
        ids[inside][each.mask] = place
        label_map[inside][each.mask] = each.label
    for each in found:
        run_lengths = encode_cropped_mask(each.mask, top=each.top, left=each.left, size=size)
        annotations.append(
            {
                "category_id": each.label,
                "score": each.score,
                "bbox": [each.left, each.top, each.size[1], each.size[0]],
                "area": int(each.mask.sum()),
                "iscrowd": 0,
                "segmentation": _as_text(run_lengths),
            }
        )
    objects = Objects(ids=ids, labels=[each.label for each in sure])
    return Annotated(label_map=label_map, segment_ids=None, annotations=annotations, objects=objects)


def _semantic(labels: np.ndarray, nothing: int) -> Annotated:
    present = np.unique(labels)
    lookup = np.zeros(int(present[-1]) + 1, np.int32)
    lookup[present] = np.arange(len(present))
    ids = lookup[labels]
    annotations = [
        {
            "category_id": label,
            "iscrowd": 0,
            **extent,
            "segmentation": _as_text(encode_masks((labels == label)[None])[0]),
        }
        for label, extent in zip(present.tolist(), _extents(ids, len(present)), strict=True)
    ]
    label_map = labels.astype(_map_type(nothing))
    return Annotated(
        label_map=label_map,
        segment_ids=None,
        annotations=annotations,
        objects=Objects(ids=ids, labels=present.tolist()),
    )


def _extents(ids: np.ndarray, count: int) -> list[dict[str, Any]]:
    """COCO's `area` and `bbox` (x, y, width, height in pixels) of every id below `count`."""
    from scipy.ndimage import find_objects

    areas = sum((np.bincount(row + 1, minlength=count + 1) for row in ids), np.zeros(1, np.int64))[1:].tolist()
    found = []
    for area, place in zip(areas, find_objects(ids + 1, max_label=count), strict=True):
        box = [0, 0, 0, 0]
        if place is not None:
            rows, columns = place
            box = [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start]
        found.append({"area": area, "bbox": box})
    return found


def _map_type(nothing: int) -> type[np.uint8 | np.uint16]:
    return np.uint8 if nothing == IGNORE else np.uint16


def _as_text(run_lengths: Mapping[str, Any]) -> dict[str, Any]:
    """COCO's run lengths of a mask, for JSON."""
    return {"size": list(run_lengths["size"]), "counts": run_lengths["counts"].decode("ascii")}
