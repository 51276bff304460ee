"""Mean intersection over union and its kin, from one confusion matrix.

C classes
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m2f.constants import to_device
from m2f.counting import clipped, counts

Labels = Tensor | NDArray[np.integer]
"""Class ids, any integer type and shape."""


class PerClass(TypedDict):
    """One fraction per class, by class id; None where the class gives no number."""

    iou: list[float | None]
    accuracy: list[float | None]
    dice: list[float | None]


class SemanticResult(TypedDict):
    """Fractions; None where nothing was counted."""

    miou: float | None
    mean_accuracy: float | None
    pixel_accuracy: float | None
    per_class: PerClass


class SemanticMetric:
    """Counts pixels by true and predicted class over any number of pictures.

    The state is `confusion`: (C, C) int64, rows the true class, columns the predicted one, on the predictions' device.
    Counts are exact, so states of parts of a data set add up to the whole's, in any order:
    `merge` them, or sum `confusion` over workers and build a metric from the sum.
    """

    def __init__(self, *, num_classes: int, ignore_label: int = 255, confusion: Tensor | None = None) -> None:
        if confusion is None:
            confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        if confusion.shape != (num_classes, num_classes) or confusion.dtype != torch.int64:
            raise ValueError(
                f"confusion must be int64 of shape {(num_classes, num_classes)}, "
                f"got {confusion.dtype} of shape {tuple(confusion.shape)}"
            )
        self.num_classes = num_classes
        self.ignore_label = ignore_label
        self.confusion = confusion.clone()

    def update(self, prediction: Labels, label: Labels) -> None:
        """Count pictures, on the prediction's device. Pixels whose label is `ignore_label` do not count, whatever was
        predicted there. The host waits for the device once.

        ValueError when shapes differ, when a value is no integer, or when a label or a prediction that
        counts is not a class.
        """
        predicted = as_integers(prediction, "prediction")
        true = as_integers(label, "label", device=predicted.device)
        if predicted.shape != true.shape:
            raise ValueError(
                f"prediction and label must have one shape, got {tuple(predicted.shape)} and {tuple(true.shape)}"
            )
        # One place more for each side's values that are no class, and one row for labels that do not count.
        classes, side = self.num_classes, self.num_classes + 1
        row = clipped(true, classes).masked_fill_(true == self.ignore_label, side)
        cells = counts(row.mul_(side).add_(clipped(predicted, classes)), (side + 1) * side).view(side + 1, side)
        confusion = cells[:classes, :classes]
        if int(cells[:side].sum() - confusion.sum()):
            self._refuse(predicted, true)
        if confusion.device != self.confusion.device:
            self.confusion = to_device(self.confusion, confusion.device)
        self.confusion += confusion

    def _refuse(self, predicted: Tensor, true: Tensor) -> NoReturn:
        """The ValueError for a label or a prediction that counts and is not a class."""
        counted = true != self.ignore_label
        for name, ids in (("label", true[counted]), ("prediction", predicted[counted])):
            outside = ids[(ids < 0) | (ids >= self.num_classes)]
            if len(outside):
                raise ValueError(
                    f"{name} {int(outside[0])} is outside the classes 0 to {self.num_classes - 1} "
                    f"({len(outside)} of {len(ids)} pixels that count)"
                )
        raise AssertionError("every value is a class")

    def __getstate__(self) -> dict[str, Any]:
        """To be sent to another process, which may not have the device."""
        return {**self.__dict__, "confusion": self.confusion.cpu()}

    def merge(self, other: SemanticMetric) -> None:
        """Add the counts of another metric of the same classes, in place."""
        if (self.num_classes, self.ignore_label) != (other.num_classes, other.ignore_label):
            raise ValueError(
                f"cannot merge a metric of {other.num_classes} classes ignoring {other.ignore_label} into one of "
                f"{self.num_classes} classes ignoring {self.ignore_label}"
            )
        self.confusion += other.confusion.to(self.confusion.device)

    def state(self) -> dict[str, Any]:
        """What was counted so far, as JSON values."""
        return {"confusion": self.confusion.tolist()}

    def add_state(self, state: Mapping[str, Any]) -> None:
        """Add what the `state` of another metric holds, in place; ValueError when it is of other classes."""
        confusion = torch.tensor(state["confusion"], dtype=torch.int64)
        self.merge(SemanticMetric(num_classes=self.num_classes, ignore_label=self.ignore_label, confusion=confusion))

    def result(self) -> SemanticResult:
        """Metrics of what was counted so far.

        IoU is intersection / union of true and predicted pixels; a class predicted but never true has IoU 0
        and counts in the mean, a class that is neither has None and does not. Accuracy is the share of a
        class's true pixels that were predicted so; `mean_accuracy` is its mean over the classes that occur.
        """
        confusion = self.confusion.to("cpu")
        both = confusion.diagonal().tolist()
        true = confusion.sum(1).tolist()
        predicted = confusion.sum(0).tolist()
        iou = [_ratio(b, t + p - b) for b, t, p in zip(both, true, predicted, strict=True)]
        accuracy = [_ratio(b, t) for b, t in zip(both, true, strict=True)]
        dice = [_ratio(2 * b, t + p) for b, t, p in zip(both, true, predicted, strict=True)]
        return {
            "miou": _mean(iou),
            "mean_accuracy": _mean(accuracy),
            "pixel_accuracy": _ratio(sum(both), sum(true)),
            "per_class": {"iou": iou, "accuracy": accuracy, "dice": dice},
        }


def as_integers(values: Labels | Sequence[int], name: str, *, device: torch.device | None = None) -> Tensor:
    """As an int64 tensor on a device (None: on its own); ValueError, naming the values, for anything but integers."""
    if isinstance(values, Tensor):
        tensor = values
    else:
        array = np.asarray(values)
        if array.dtype.kind not in "iu" and array.size:
            raise ValueError(f"{name} must hold integers, got {array.dtype}")
        tensor = torch.from_numpy(array.astype(np.int64))
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} must hold integers, got {tensor.dtype}")
    if device is not None and tensor.device != device:
        tensor = to_device(tensor, device)  # as it is: int64 would be up to eight times as much to copy
    return tensor.long()


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
