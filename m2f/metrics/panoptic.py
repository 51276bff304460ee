"""Panoptic quality, from counts of matched and unmatched segments (Kirillov et al., Panoptic Segmentation, 2019).

C classes, H x W picture, P predicted segments, T true segments
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m2f.counting import clipped, counts
from m2f.metrics.semantic import as_integers

Integers = Tensor | NDArray[np.integer] | Sequence[int]
"""Any integer type."""

_IOU_UNIT = 2.0**-40
"""What a sum of IoUs is counted in: 8 million matches of one class fit into 63 bits, each exact to 5e-13."""


class Quality(TypedDict):
    """Means over classes, as fractions; None where no class has a segment."""

    pq: float | None
    sq: float | None
    rq: float | None


class PerClass(TypedDict):
    """One entry per class, by class id. Fractions are None where the class has no segment."""

    pq: list[float | None]
    sq: list[float | None]
    rq: list[float | None]
    tp: list[int]
    fp: list[int]
    fn: list[int]


class PanopticResult(Quality):
    """Over all classes, over things and over stuff."""

    things: Quality
    stuff: Quality
    per_class: PerClass


class PanopticMetric:
    """Counts matched, wrong and missed segments by class over any number of pictures.

    The state is `counts`: (C, 4) int64, columns matched (TP), wrong (FP), missed (FN), and the sum of the
    matches' IoUs in units of 2^-40. All are integers, so states of parts of a data set add up to the
    whole's exactly, in any order: `merge` them, or sum `counts` over workers and build a metric from the sum.
    """

    def __init__(self, *, num_classes: int, thing_ids: Collection[int], counts: Tensor | None = None) -> None:
        """`thing_ids`: the classes that are things; `range(80)` for COCO."""
        things = frozenset(thing_ids)
        outside = sorted(c for c in things if not 0 <= c < num_classes)
        if outside:
            raise ValueError(f"thing_ids names {outside[0]}, which is outside the classes 0 to {num_classes - 1}")
        if counts is None:
            counts = torch.zeros(num_classes, 4, dtype=torch.int64)
        if counts.shape != (num_classes, 4) or counts.dtype != torch.int64:
            raise ValueError(
                f"counts must be int64 of shape {(num_classes, 4)}, got {counts.dtype} of shape {tuple(counts.shape)}"
            )
        self.num_classes = num_classes
        self.thing_ids = things
        self.counts = counts.clone()

    def update(
        self,
        prediction: Integers,
        predicted_labels: Integers,
        truth: Integers,
        true_labels: Integers,
        *,
        crowd: Sequence[bool] | Tensor | NDArray[np.bool_] | None = None,
    ) -> None:
        """Count one picture: pixels on the prediction's device, segments on the host, which waits for the device once.

        `prediction` and `truth`: (H, W) maps of segment indices; values outside [0, P) and [0, T) are void.
        `predicted_labels`, `true_labels`: (P,) and (T,) classes. `crowd`: (T,) flags of true segments that
        stand for many objects (None: no such segment).

        As in the official evaluator: segments of one class match when their IoU is over 1/2, the prediction's
        pixels on void truth left out of the union. A crowd segment is neither matched nor missed. An
        unmatched prediction is wrong unless over half of it lies on void truth and on the crowd segment of
        its class (where a class has several, the last). A true segment without pixels is missed.

        ValueError when shapes differ, when a value is no integer, when a label is no class, or when a predicted
        segment has no pixels.
        """
        predicted = as_integers(prediction, "prediction")
        true = as_integers(truth, "truth", device=predicted.device)
        if predicted.shape != true.shape or true.dim() != 2:
            raise ValueError(
                f"prediction and truth must have one shape (H, W), got {tuple(predicted.shape)} and {tuple(true.shape)}"
            )
        label_P = _labels(predicted_labels, "predicted_labels")
        label_T = _labels(true_labels, "true_labels").cpu()
        overlap_TP, label_P = _on_host(_overlaps(true, len(label_T), predicted, len(label_P)), label_P)
        self._check(label_P, "predicted_labels")
        self._check(label_T, "true_labels")
        crowd_T = torch.zeros(len(label_T), dtype=torch.bool) if crowd is None else torch.as_tensor(crowd).cpu().bool()
        if crowd_T.shape != label_T.shape:
            raise ValueError(f"crowd must hold one flag for each of {len(label_T)} true segments, got {len(crowd_T)}")

        area_T, area_P = overlap_TP.sum(1)[:-1], overlap_TP.sum(0)[:-1]
        if not area_P.all():
            raise ValueError(f"predicted segment {int((area_P == 0).nonzero()[0])} of {len(area_P)} has no pixels")
        void_P, both_TP = overlap_TP[-1, :-1], overlap_TP[:-1, :-1]
        union_TP = (area_P - void_P) + area_T[:, None] - both_TP

        same_TP = label_T[:, None] == label_P
        match_TP = same_TP & ~crowd_T[:, None] & (2 * both_TP > union_TP)  # at most one in a row and a column
        iou = both_TP[match_TP].double() / union_TP[match_TP]
        excused_P = void_P.clone()
        crowd_of_class = {int(label_T[t]): t for t in crowd_T.nonzero()[:, 0].tolist()}
        for p, label in enumerate(label_P.tolist()):
            if label in crowd_of_class:
                excused_P[p] += both_TP[crowd_of_class[label], p]
        wrong_P = ~match_TP.any(0) & (2 * excused_P <= area_P)
        missed_T = ~match_TP.any(1) & ~crowd_T

        matched_label = label_T[match_TP.nonzero()[:, 0]]
        counted = torch.zeros(self.num_classes, 4, dtype=torch.int64)
        for column, labels in enumerate((matched_label, label_P[wrong_P], label_T[missed_T])):
            counted[:, column] = labels.bincount(minlength=self.num_classes)
        counted[:, 3].index_add_(0, matched_label, (iou / _IOU_UNIT).round().long())
        self.counts += counted.to(self.counts.device)

    def merge(self, other: PanopticMetric) -> None:
        """Add the counts of another metric of the same classes, in place."""
        if (self.num_classes, self.thing_ids) != (other.num_classes, other.thing_ids):
            raise ValueError(
                f"cannot merge a metric of {other.num_classes} classes with the things {sorted(other.thing_ids)} "
                f"into one of {self.num_classes} classes with the things {sorted(self.thing_ids)}"
            )
        self.counts += other.counts.to(self.counts.device)

    def state(self) -> dict[str, Any]:
        """What was counted so far, as JSON values."""
        return {"counts": self.counts.tolist()}

    def add_state(self, state: Mapping[str, Any]) -> None:
        """Add what the `state` of another metric holds, in place; ValueError when it is of other classes."""
        counts = torch.tensor(state["counts"], dtype=torch.int64)
        self.merge(PanopticMetric(num_classes=self.num_classes, thing_ids=self.thing_ids, counts=counts))

    def result(self) -> PanopticResult:
        """Metrics of what was counted so far.

        Of a class, SQ is the mean IoU of the matches (0 without any), RQ = TP / (TP + FP/2 + FN/2) and
        PQ = SQ * RQ. A class without any of the three has None and does not count in the means.
        """
        tp, fp, fn, iou_units = self.counts.cpu().T.tolist()
        pq: list[float | None] = []
        sq: list[float | None] = []
        rq: list[float | None] = []
        for t, p, n, units in zip(tp, fp, fn, iou_units, strict=True):
            segments = t + p / 2 + n / 2
            pq.append(units * _IOU_UNIT / segments if segments else None)
            sq.append((units * _IOU_UNIT / t if t else 0.0) if segments else None)
            rq.append(t / segments if segments else None)

        def means(classes: Collection[int]) -> Quality:
            return {"pq": _mean(pq, classes), "sq": _mean(sq, classes), "rq": _mean(rq, classes)}

        everything = range(self.num_classes)
        return {
            **means(everything),
            "things": means(self.thing_ids),
            "stuff": means([c for c in everything if c not in self.thing_ids]),
            "per_class": {"pq": pq, "sq": sq, "rq": rq, "tp": tp, "fp": fp, "fn": fn},
        }

    def _check(self, labels: Tensor, name: str) -> None:
        """ValueError when one of the labels is no class."""
        outside = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(outside):
            raise ValueError(f"{name}: {int(outside[0])} is outside the classes 0 to {self.num_classes - 1}")


def _labels(labels: Integers, name: str) -> Tensor:
    """As (segments,) int64."""
    ids = as_integers(labels, name)
    if ids.dim() != 1:
        raise ValueError(f"{name} must hold one class per segment, got shape {tuple(ids.shape)}")
    return ids


def _overlaps(true: Tensor, true_segments: int, predicted: Tensor, predicted_segments: int) -> Tensor:
    """Pixels by true and predicted segment, (T + 1, P + 1) int64; void is last."""
    rows, columns = true_segments + 1, predicted_segments + 1
    true, predicted = clipped(true, true_segments), clipped(predicted, predicted_segments)
    return counts(true.mul_(columns).add_(predicted), rows * columns).view(rows, columns)


def _on_host(overlap_TP: Tensor, label_P: Tensor) -> tuple[Tensor, Tensor]:
    """Both on the CPU; in one copy, so that the host waits once, if they lie on one device."""
    if label_P.device != overlap_TP.device:
        return overlap_TP.cpu(), label_P.cpu()
    overlaps, labels = torch.cat((overlap_TP.flatten(), label_P)).cpu().split((overlap_TP.numel(), len(label_P)))
    return overlaps.view(overlap_TP.shape), labels


def _mean(values: list[float | None], classes: Collection[int]) -> float | None:
    known = [value for c in sorted(classes) if (value := values[c]) is not None]
    return sum(known) / len(known) if known else None
