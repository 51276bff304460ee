"""Mask average precision as Cityscapes defines it (cityscapesScripts, evaluation/evalInstanceLevelSemanticLabeling.py).

It differs from COCO's: crowds and void excuse a prediction by their share of it, objects of fewer than MIN_REGION
pixels do not count, IoU must be over a threshold, any number of predictions of an image counts, and the
precision-recall curve is summed as it is, step by step.

C classes, H x W image, P predicted instances, T true segments
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m2f.counting import clipped, counts
from m2f.metrics.instance import InstanceResult, Values, numbers_of, on_host
from m2f.metrics.panoptic import Integers
from m2f.metrics.semantic import as_integers

THRESHOLDS = np.arange(0.5, 1.0, 0.05)
"""IoU that a match must be over: cityscapesScripts' `overlaps`, made in the same way, for the same doubles."""

MIN_REGION = 100
"""Pixels of the smallest true instance that counts: cityscapesScripts' first of `minRegionSizes`."""


@dataclass(frozen=True, slots=True)
class _Predicted:
    """A predicted instance with pixels."""

    class_id: int
    score: float
    pixels: int
    void: int
    """Pixels on void truth."""
    overlaps: Sequence[Sequence[int]]
    """[true instance, pixels on it] of its class, where there are any."""


@dataclass(frozen=True, slots=True)
class _True:
    """A true instance, or a group of them."""

    class_id: int
    crowd: bool
    pixels: int


class _Image(NamedTuple):
    """What one image gives to the result, small enough to keep and to send."""

    predicted: tuple[_Predicted, ...]
    true: tuple[_True, ...]


class CityscapesInstanceMetric:
    """Keeps how predicted and true instances of any number of images overlap, under the images' ids.

    The result does not depend on the order of images: merged parts equal the whole exactly.
    """

    def __init__(self, *, num_classes: int) -> None:
        self.num_classes = num_classes
        self._images: dict[int, _Image] = {}

    def update(
        self,
        masks: Tensor | NDArray[np.bool_],
        labels: Values,
        scores: Values,
        truth: Integers,
        true_labels: Integers,
        *,
        image_id: int,
        crowd: Sequence[bool] | Tensor | NDArray[np.bool_] | None = None,
        of_no_class: Tensor | NDArray[np.bool_] | None = None,
    ) -> None:
        """Add one image: `masks` (P, H, W) bool, `labels` and `scores` of P predictions, counted on the masks' device.

        `truth`: (H, W) map of segment indices; values outside [0, T) are void, unless `of_no_class`, (H, W) bool, says
        that there is an object of none of the classes. `true_labels`: (T,) class of every segment; outside [0, C): it
        is no instance (stuff). `crowd`: (T,) flags of segments that stand for many objects (None: none does).
        Predictions without a pixel are left out.

        ValueError when shapes differ, a predicted label is no class, a score is not finite, or the image was added
        before.
        """
        if image_id in self._images:
            raise ValueError(f"image {image_id} was added before")
        masks_PHW = torch.as_tensor(masks)
        true = as_integers(truth, "truth", device=masks_PHW.device)
        if masks_PHW.dtype != torch.bool or masks_PHW.dim() != 3 or masks_PHW.shape[1:] != true.shape:
            raise ValueError(
                f"masks must be bool of shape (P, {', '.join(map(str, true.shape))}) as the truth, got "
                f"{masks_PHW.dtype} of shape {tuple(masks_PHW.shape)}"
            )
        labels, scores = on_host(labels, scores)
        label_P, score_P = [int(label) for label in numbers_of(labels)], [float(s) for s in numbers_of(scores)]
        label_T = [int(label) for label in numbers_of(true_labels)]
        crowd_T = [False] * len(label_T) if crowd is None else [bool(flag) for flag in numbers_of(crowd)]
        self._check(image_id, len(masks_PHW), label_P, score_P, label_T, crowd_T)
        true = clipped(true, len(label_T))
        if of_no_class is not None:  # neither an instance nor void
            true = torch.where(torch.as_tensor(of_no_class, device=true.device), len(label_T) + 1, true)
        *overlap_PT, pixels_T = _overlaps(masks_PHW, true, len(label_T) + 2)
        instances = [t for t, label in enumerate(label_T) if 0 <= label < self.num_classes and pixels_T[t]]
        place = {t: number for number, t in enumerate(instances)}
        predicted = []
        for label, score, overlap_T in zip(label_P, score_P, overlap_PT, strict=True):
            overlaps = [[place[t], overlap_T[t]] for t in instances if label_T[t] == label and overlap_T[t]]
            if pixels := sum(overlap_T):
                predicted.append(_Predicted(label, score, pixels, void=overlap_T[-2], overlaps=overlaps))
        self._images[image_id] = _Image(
            tuple(predicted), tuple(_True(label_T[t], crowd_T[t], pixels_T[t]) for t in instances)
        )

    def _check(
        self,
        image_id: int,
        masks: int,
        label_P: list[int],
        score_P: list[float],
        label_T: list[int],
        crowd_T: list[bool],
    ) -> None:
        """ValueError unless they fit one another, labels are classes and scores finite."""
        if not len(label_P) == len(score_P) == masks or len(crowd_T) != len(label_T):
            raise ValueError(
                f"image {image_id} has {masks} masks, {len(label_P)} labels and {len(score_P)} scores, "
                f"{len(label_T)} true labels and {len(crowd_T)} crowd flags"
            )
        if outside := [label for label in label_P if not 0 <= label < self.num_classes]:
            raise ValueError(
                f"predicted label {outside[0]} of image {image_id} is outside the classes 0 to {self.num_classes - 1}"
            )
        if not all(map(math.isfinite, score_P)):
            raise ValueError(f"scores of image {image_id} are not all finite")

    def merge(self, other: CityscapesInstanceMetric) -> None:
        """Add the images of another metric of the same classes, in place; ValueError when one is in both."""
        if self.num_classes != other.num_classes:
            raise ValueError(
                f"cannot merge a metric of {other.num_classes} classes into one of {self.num_classes} classes"
            )
        if twice := self._images.keys() & other._images.keys():
            raise ValueError(f"cannot merge: both metrics hold image {min(twice)} ({len(twice)} in all)")
        self._images |= other._images

    def state(self) -> dict[str, Any]:
        """The images so far, as JSON values."""
        return {
            "overlaps": [
                [image_id, [asdict(each) for each in image.predicted], [asdict(each) for each in image.true]]
                for image_id, image in self._images.items()
            ]
        }

    def add_state(self, state: Mapping[str, Any]) -> None:
        """Add the images that the `state` of another metric holds, in place; ValueError when one is in both."""
        other = CityscapesInstanceMetric(num_classes=self.num_classes)
        for image_id, predicted, true in state["overlaps"]:
            other._images[image_id] = _Image(
                tuple(_Predicted(**each) for each in predicted), tuple(_True(**each) for each in true)
            )
        self.merge(other)

    def alone(self) -> Iterator[tuple[int, dict[str, float | None]]]:
        """Every image's own AP, and its numbers of true and predicted instances, by id."""
        for image_id, image in self._images.items():
            own = CityscapesInstanceMetric(num_classes=self.num_classes)
            own._images[image_id] = image
            yield (
                image_id,
                {
                    "ap": own.result()["ap"],
                    "instances": len(image.true),
                    "predicted_instances": len(image.predicted),
                },
            )

    def result(self) -> InstanceResult:
        """AP of the images so far. A class without a true instance that counts has None and is in no mean; nor is there
        AP by size, which Cityscapes does not define."""
        ap_CI = [_Curves.of(self._images.values(), class_id).precisions() for class_id in range(self.num_classes)]
        known = np.array([ap_I for ap_I in ap_CI if ap_I is not None], np.float64).reshape(-1, len(THRESHOLDS))
        return {
            "ap": float(known.mean()) if known.size else None,
            "ap50": float(known[:, 0].mean()) if known.size else None,
            "ap75": float(known[:, 5].mean()) if known.size else None,
            "ap_small": None,
            "ap_medium": None,
            "ap_large": None,
            "per_class": [None if ap_I is None else float(np.mean(ap_I)) for ap_I in ap_CI],
        }


def _overlaps(masks_PHW: Tensor, true_HW: Tensor, segments: int) -> list[list[int]]:
    """Pixels of every mask, and last of all pixels, by true segment; the host waits for the device once."""
    rows = [counts(torch.where(mask_HW, true_HW, segments), segments + 1) for mask_HW in masks_PHW]
    found: list[list[int]] = torch.stack([*rows, counts(true_HW, segments + 1)])[:, :-1].tolist()
    return found


@dataclass(frozen=True)
class _Curves:
    """One class over all images: N predictions, M true instances that count, K overlaps of the two."""

    score_N: NDArray[np.float64]
    excused_N: NDArray[np.float64]
    """Share of a prediction that lies on void, crowds, and true instances too small to count."""
    iou_K: NDArray[np.float64]
    of_K: NDArray[np.int64]
    """The prediction of an overlap."""
    with_K: NDArray[np.int64]
    """The true instance of an overlap, -1: one that does not count."""
    true: int

    @classmethod
    def of(cls, images: Iterator[_Image] | Any, class_id: int) -> _Curves:
        scores, excused, overlaps, true = list[float](), list[float](), list[tuple[float, int, int]](), 0
        for image in images:
            counting = {
                place: number
                for number, place in enumerate(
                    (
                        place
                        for place, each in enumerate(image.true)
                        if each.class_id == class_id and not each.crowd and each.pixels >= MIN_REGION
                    ),
                    true,
                )
            }
            true += len(counting)
            for each in image.predicted:
                if each.class_id != class_id:
                    continue
                ignored = each.void
                for place, both in each.overlaps:
                    known = image.true[place]
                    # a crowd of less than MIN_REGION pixels counts twice, as in cityscapesScripts
                    ignored += both * (known.crowd + (known.pixels < MIN_REGION))
                    iou = both / (known.pixels + each.pixels - both)
                    overlaps.append((iou, len(scores), counting.get(place, -1)))
                scores.append(each.score)
                excused.append(ignored / each.pixels)
        iou, of, with_ = zip(*overlaps, strict=True) if overlaps else ((), (), ())
        return cls(
            np.array(scores, np.float64),
            np.array(excused, np.float64),
            np.array(iou, np.float64),
            np.array(of, np.int64),
            np.array(with_, np.int64),
            true,
        )

    def precisions(self) -> list[float] | None:
        """AP at every threshold; None without a true instance that counts."""
        return [self._precision(threshold) for threshold in THRESHOLDS.tolist()] if self.true else None

    def _precision(self, threshold: float) -> float:
        """AP at an IoU threshold of at least 1/2, over which a prediction lies with one true instance at most.

        Of the predictions over it with one true instance the best is right, and the others are wrong. One that is over
        it with an instance that does not count, or that is excused, is neither.
        """
        over_K = self.iou_K > threshold
        met = np.zeros(len(self.score_N), bool)
        met[self.of_K[over_K]] = True
        wrong_N = ~met & (self.excused_N <= threshold)
        counts_K = over_K & (self.with_K >= 0)
        best = np.full(self.true, -np.inf)
        np.maximum.at(best, self.with_K[counts_K], self.score_N[self.of_K[counts_K]])
        right = best[best > -np.inf]
        order = np.lexsort((-self.score_N[self.of_K[counts_K]], self.with_K[counts_K]))
        with_, scores = self.with_K[counts_K][order], self.score_N[self.of_K[counts_K]][order]
        again = scores[1:][with_[1:] == with_[:-1]]  # after the best of the same true instance
        return _area(right, np.concatenate((again, self.score_N[wrong_N])), self.true - len(right))


def _area(right: NDArray[np.float64], wrong: NDArray[np.float64], missed: int) -> float:
    """Area under the precision-recall curve of these scores: precision at every score and 1 at no recall, each times
    half of the way between the recalls before and after it."""
    scores = np.concatenate((right, wrong))
    if not len(scores):
        return 0.0  # where cityscapesScripts has an IndexError: all predictions are excused
    order = np.argsort(scores, kind="stable")
    below = np.concatenate(([0], np.cumsum(np.arange(len(scores))[order] < len(right))))  # right ones among the lowest
    first = np.unique(scores[order], return_index=True)[1]
    tp = len(right) - below[first]
    precision = np.append(tp / (len(scores) - first), 1.0)
    recall = np.append(tp / (len(right) + missed), 0.0)
    around = np.concatenate((recall[:1], recall, [0.0]))
    return float(precision @ ((around[:-2] - around[2:]) / 2))
