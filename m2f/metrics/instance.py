"""Mask average precision as COCO defines it, computed by pycocotools (imported where it is used).

C classes, H x W picture, P predicted instances, T true instances
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RunLengths = Sequence[Mapping[str, Any]]
"""One {"size": [H, W], "counts": bytes or str} per mask: compressed run lengths of `pycocotools.mask`."""
Masks = Tensor | NDArray[np.bool_] | NDArray[np.uint8] | RunLengths
"""(N, H, W) bool, or the masks' run lengths."""
Values = Tensor | NDArray[Any] | Sequence[float]
"""(N,) numbers."""

_PART = 1 << 28
"""Pixels of the masks whose run lengths a GPU makes at once: a byte each, and as much again in between."""


class InstanceResult(TypedDict):
    """Fractions; None where no true instance counts."""

    ap: float | None
    """Mean over classes and over the IoU thresholds 0.5, 0.55, ..., 0.95."""
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    """Of instances of up to 32 * 32 pixels."""
    ap_medium: float | None
    ap_large: float | None
    """Of instances of 96 * 96 pixels and more."""
    per_class: list[float | None]
    """`ap` of every class, by class id."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Image:
    """What one picture gives to the result, small enough to keep and to send."""

    size: tuple[int, int]
    predicted: tuple[dict[str, Any], ...]
    """Annotations in COCO's format without ids."""
    true: tuple[dict[str, Any], ...]


class InstanceMetric:
    """Keeps predicted and true instances of any number of pictures, as run lengths, under the pictures' ids.

    AP ranks all predictions of a class together, so it is made only when the result is asked for. The
    result does not depend on the order of pictures: merged parts equal the whole exactly.
    """

    def __init__(self, *, num_classes: int, max_instances: int = 100) -> None:
        """`max_instances`: best predictions of a picture and class that count (COCO: 100)."""
        self.num_classes = num_classes
        self.max_instances = max_instances
        self._images: dict[int, _Image] = {}

    def __len__(self) -> int:
        """Pictures so far."""
        return len(self._images)

    def update(
        self,
        masks: Masks,
        labels: Values,
        scores: Values,
        true_masks: Masks,
        true_labels: Values,
        *,
        image_id: int,
        size: tuple[int, int] | None = None,
        crowd: Sequence[bool] | Tensor | NDArray[np.bool_] | None = None,
        true_areas: Values | None = None,
    ) -> None:
        """Add one picture: `masks`, `labels`, `scores` of P predictions, `true_masks`, `true_labels` of T true ones.

        `size`: (H, W) of the picture, needed only when neither side has a mask. `crowd`: (T,) flags of true
        instances that stand for many objects (None: no such instance); predictions on them do not count.
        `true_areas`: (T,) pixels that decide which are small, medium and large (None: of the masks; COCO's
        annotations bring their own, which differ a little).

        ValueError when lengths or sizes differ, when a label is no class, when a score is not finite, or when the
        picture was added before.
        """
        if image_id in self._images:
            raise ValueError(f"image {image_id} was added before")
        predicted_runs, true_runs = _run_lengths(masks, "masks"), _run_lengths(true_masks, "true_masks")
        labels, scores = on_host(labels, scores)
        sizes = {(int(run["size"][0]), int(run["size"][1])) for run in (*predicted_runs, *true_runs)}
        sizes |= {tuple(dense.shape[1:]) for dense in (masks, true_masks) if isinstance(dense, Tensor | np.ndarray)}
        sizes |= set() if size is None else {(size[0], size[1])}
        if len(sizes) != 1:
            raise ValueError(f"masks of image {image_id} must have one size, got {sorted(sizes) or 'none'}")
        predicted = self._annotations(
            predicted_runs, labels, image_id, "predicted", area=_areas(predicted_runs), score=numbers_of(scores)
        )
        if not all(math.isfinite(annotation["score"]) for annotation in predicted):
            raise ValueError(f"scores of image {image_id} are not all finite")
        areas = _areas(true_runs) if true_areas is None else numbers_of(true_areas)
        flags = [0] * len(true_runs) if crowd is None else [int(flag) for flag in numbers_of(crowd)]
        true = self._annotations(true_runs, true_labels, image_id, "true", area=areas, iscrowd=flags)
        self._images[image_id] = _Image(size=sizes.pop(), predicted=predicted, true=true)

    def merge(self, other: InstanceMetric) -> None:
        """Add the pictures of another metric of the same classes, in place; ValueError when one is in both."""
        if (self.num_classes, self.max_instances) != (other.num_classes, other.max_instances):
            raise ValueError(
                f"cannot merge a metric of {other.num_classes} classes and {other.max_instances} instances into one of "
                f"{self.num_classes} classes and {self.max_instances} instances"
            )
        twice = self._images.keys() & other._images.keys()
        if twice:
            raise ValueError(f"cannot merge: both metrics hold image {min(twice)} ({len(twice)} in all)")
        self._images |= other._images

    def state(self) -> dict[str, Any]:
        """The pictures so far, as JSON values."""
        return {
            "images": [
                [image_id, list(image.size), _as_json(image.predicted), _as_json(image.true)]
                for image_id, image in self._images.items()
            ]
        }

    def add_state(self, state: Mapping[str, Any]) -> None:
        """Add the pictures that the `state` of another metric holds, in place; ValueError when one is in both."""
        other = InstanceMetric(num_classes=self.num_classes, max_instances=self.max_instances)
        for image_id, (height, width), predicted, true in state["images"]:
            other._images[image_id] = _Image(
                size=(height, width), predicted=_from_json(predicted), true=_from_json(true)
            )
        self.merge(other)

    def alone(self) -> Iterator[tuple[int, dict[str, float | None]]]:
        """Every picture's own AP, and its numbers of true and predicted instances, by id."""
        for image_id, image in self._images.items():
            numbers = {"instances": len(image.true), "predicted_instances": len(image.predicted)}
            yield image_id, {"ap": self._ap_of(image) if image.true else None, **numbers}

    def _ap_of(self, image: _Image) -> float | None:
        """AP of one picture: with its own classes alone, as the time that it takes grows with them."""
        classes = sorted({each["category_id"] for each in (*image.predicted, *image.true)})
        place = {class_id: number for number, class_id in enumerate(classes)}
        own = InstanceMetric(num_classes=len(classes), max_instances=self.max_instances)
        predicted, true = (
            tuple({**each, "category_id": place[each["category_id"]]} for each in side)
            for side in (image.predicted, image.true)
        )
        own._images[0] = _Image(size=image.size, predicted=predicted, true=true)
        return own.result()["ap"]

    def result(self) -> InstanceResult:
        """AP of the pictures so far. A class without a true instance that counts has None and is in no mean."""
        from pycocotools.cocoeval import COCOeval

        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            evaluation = COCOeval(self._dataset("true"), self._dataset("predicted"), "segm")
            evaluation.params.maxDets = [self.max_instances]
            evaluation.evaluate()
            evaluation.accumulate()
        precision = evaluation.eval["precision"][..., 0]
        everything, small, medium, large = np.moveaxis(precision, 3, 0)  # each (10 thresholds, 101 recalls, C)
        return {
            "ap": _mean(everything),
            "ap50": _mean(everything[0]),
            "ap75": _mean(everything[5]),
            "ap_small": _mean(small),
            "ap_medium": _mean(medium),
            "ap_large": _mean(large),
            "per_class": [_mean(everything[:, :, c]) for c in range(self.num_classes)],
        }

    def _annotations(
        self, runs: list[dict[str, Any]], labels: Values, image_id: int, name: str, **columns: list[Any]
    ) -> tuple[dict[str, Any], ...]:
        classes = [int(label) for label in numbers_of(labels)]
        lengths = {"labels": len(classes)} | {column: len(values) for column, values in columns.items()}
        wrong = {column: length for column, length in lengths.items() if length != len(runs)}
        if wrong:
            raise ValueError(f"image {image_id} has {len(runs)} {name} masks, but {wrong}")
        outside = [label for label in classes if not 0 <= label < self.num_classes]
        if outside:
            raise ValueError(
                f"{name} label {outside[0]} of image {image_id} is outside the classes 0 to {self.num_classes - 1}"
            )
        return tuple(
            {"segmentation": run, "category_id": label, **dict(zip(columns, values, strict=True))}
            for run, label, *values in zip(runs, classes, *columns.values(), strict=True)
        )

    def _dataset(self, side: Literal["true", "predicted"]) -> Any:
        """The pictures by id, with one side's annotations, as pycocotools wants them."""
        from pycocotools.coco import COCO

        annotations: list[dict[str, Any]] = []
        for image_id, image in sorted(self._images.items()):
            for annotation in image.true if side == "true" else image.predicted:
                # from 1: pycocotools takes a match with id 0 for none
                annotations.append({**annotation, "id": len(annotations) + 1, "image_id": image_id})
        dataset = COCO()
        dataset.dataset = {
            "images": [
                {"id": image_id, "height": image.size[0], "width": image.size[1]}
                for image_id, image in sorted(self._images.items())
            ],
            "annotations": annotations,
            "categories": [{"id": c} for c in range(self.num_classes)],
        }
        dataset.createIndex()
        return dataset


def run_lengths(masks: Tensor | NDArray[np.bool_] | NDArray[np.uint8]) -> list[dict[str, Any]]:
    """Compressed run lengths of (N, H, W) masks, as pycocotools writes them: counts are bytes."""
    from pycocotools import mask as coco

    on_gpu = isinstance(masks, Tensor) and masks.is_cuda
    array = masks if on_gpu else np.asarray(masks)
    if array.ndim != 3 or array.dtype not in (np.bool_, np.uint8, torch.bool, torch.uint8):
        raise ValueError(f"masks must be bool of shape (N, H, W), got {array.dtype} of shape {tuple(array.shape)}")
    if isinstance(array, Tensor):
        parts = array.split(max(1, _PART // max(1, array.shape[1] * array.shape[2])))
        return [run for part_NHW in parts for run in _runs_of_changes(part_NHW)]
    # one by one: a Fortran-ordered copy of all would double what a picture needs
    return [coco.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in array]


def _runs_of_changes(masks_NHW: Tensor) -> list[dict[str, Any]]:
    """`run_lengths` on a GPU: only the places where a mask's pixels, column by column, change go to the host."""
    from pycocotools import mask as coco

    masks, height, width = masks_NHW.shape
    if not masks:
        return []
    pixels = height * width
    before_NP = masks_NHW.bool().transpose(1, 2).reshape(masks, pixels)
    change_NP = before_NP.clone()
    change_NP[:, 1:] ^= before_NP[:, :-1]
    places = change_NP.flatten().nonzero()[:, 0].cpu().numpy()
    bounds = np.searchsorted(places, np.arange(masks + 1) * pixels)
    runs = [
        {
            "size": [height, width],
            "counts": np.diff(places[first:last] - n * pixels, prepend=0, append=pixels).tolist(),
        }
        for n, (first, last) in enumerate(itertools.pairwise(bounds))
    ]
    return coco.frPyObjects(runs, height, width)


def _run_lengths(masks: Masks, name: str) -> list[dict[str, Any]]:
    if isinstance(masks, Tensor | np.ndarray):
        return run_lengths(masks)
    if not all(isinstance(run, Mapping) and isinstance(run.get("counts"), bytes | str) for run in masks):
        raise ValueError(f"{name} must be (N, H, W) bool, or a list of compressed run lengths")
    return [
        {**run, "counts": run["counts"].encode("ascii") if isinstance(run["counts"], str) else run["counts"]}
        for run in masks
    ]


def _as_json(annotations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Annotations with the run lengths' bytes, which are ASCII, as text."""
    return [_with_run(each, counts=each["segmentation"]["counts"].decode("ascii")) for each in annotations]


def _from_json(annotations: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    return tuple(_with_run(each, counts=each["segmentation"]["counts"].encode("ascii")) for each in annotations)


def _with_run(annotation: Mapping[str, Any], **run: Any) -> dict[str, Any]:
    return {**annotation, "segmentation": {**annotation["segmentation"], **run}}


def on_host(labels: Values, scores: Values) -> tuple[Values, Values]:
    """Both on the CPU; in one copy, so that the host waits once, if they lie on one GPU. Doubles hold both exactly."""
    if not (isinstance(labels, Tensor) and isinstance(scores, Tensor) and labels.is_cuda and scores.is_cuda):
        return labels, scores
    if labels.shape != scores.shape:  # refused by who compares them with the masks
        return labels.cpu(), scores.cpu()
    labels, scores = torch.stack((labels.double(), scores.double())).cpu()
    return labels, scores


def _areas(runs: list[dict[str, Any]]) -> list[float]:
    from pycocotools import mask as coco

    return [float(area) for area in coco.area(runs)] if runs else []


def numbers_of(values: Values) -> list[Any]:
    """As a list."""
    return values.tolist() if isinstance(values, Tensor | np.ndarray) else list(values)


def _mean(precision: NDArray[np.float64]) -> float | None:
    """Mean over what is known: pycocotools writes -1 for classes without true instances."""
    known = precision[precision > -1]
    return float(known.mean()) if known.size else None
