"""Training logs that others publish, as points of a curve like ours.

Two formats, both JSON lines with training and validation mixed. mmengine (mmsegmentation 1, mmdetection 3): every line
has its `step`. mmcv 1 (mmdetection 2): lines have `mode`, `epoch` and `iter`; a validation's `iter` counts its batches,
so it belongs to the step of the training line before it.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.storage.stores import StoredPath

_TRAINING = {
    "loss": "loss",
    "loss_cls": "loss_class",
    "loss_mask": "loss_mask",
    "loss_dice": "loss_dice",
    "base_lr": "lr",  # mmcv's `lr` is the backbone's
    "grad_norm": "grad_norm",
    "memory": "memory_mib",
}
_PERCENT = {
    "mIoU": "val_miou",
    "mAcc": "val_mean_accuracy",
    "aAcc": "val_pixel_accuracy",
    **{f"{name}{end}": f"val_{name.lower()}{ours}" for name in ("PQ", "SQ", "RQ")
       for end, ours in (("", ""), ("_th", "_things"), ("_st", "_stuff"))},
}  # fmt: skip
_FRACTIONS = {
    "segm_mAP": "val_ap",
    "segm_mAP_50": "val_ap50",
    "segm_mAP_75": "val_ap75",
    "segm_mAP_s": "val_ap_small",
    "segm_mAP_m": "val_ap_medium",
    "segm_mAP_l": "val_ap_large",
}
"""Their names and ours, which are fractions. Of an AP, -1 says that there was nothing to count."""

_LEAVE_OUT = 'To do without it, give its entry in checkpoints.yaml: log_url: ""'


def read_log(path: StoredPath) -> dict[int, dict[str, float]]:
    """Points by step of a published training log; metrics get our names and become fractions.

    ValueError when a line is no JSON object, none has a step, or iterations are counted anew in every epoch.
    """
    points: dict[int, dict[str, float]] = {}
    step: int | None = None
    epoch, anew = 0, False
    for number, entry in _lines(path):
        last = step
        try:
            values = _values(entry)
            if "step" in entry:
                step = int(entry["step"])
            elif entry.get("mode") == "train":
                step, before, epoch = int(entry["iter"]), epoch, int(entry["epoch"])
                anew = anew or (last is not None and step <= last and epoch > before)
        except (KeyError, TypeError, ValueError) as error:
            raise _no_log(path, number) from error
        if anew:
            raise ValueError(
                f"{path} counts iterations anew in epoch {epoch} (line {number}); only a log that counts them through "
                f"can be compared with ours. {_LEAVE_OUT}"
            )
        if values and step is not None:
            points.setdefault(step, {}).update(values)
    if not points:
        raise ValueError(f"{path} is no training log: no line has a step with a loss or a metric. {_LEAVE_OUT}")
    return points


def logged_step_s(path: StoredPath) -> float | None:
    """Median seconds of a training step by a published log; None where it gives no times."""
    times = [entry["time"] for _, entry in _lines(path) if "loss" in entry and "time" in entry]  # validations have one
    return statistics.median(times) if times else None


def _values(entry: Mapping[str, Any]) -> dict[str, float]:
    """What a line says under our names. A name's beginning says of which head or metric it is."""
    values = {}
    for name, value in entry.items():
        known = name.removeprefix("decode.").rpartition("/")[2]
        if known in _TRAINING:
            values[_TRAINING[known]] = float(value)
        elif known in _PERCENT:
            values[_PERCENT[known]] = float(value) / 100
        elif known in _FRACTIONS and float(value) >= 0:
            values[_FRACTIONS[known]] = float(value)
    return values


def _lines(path: StoredPath) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, object) of every line that is not empty."""
    with path.open("rb") as file:
        lines = file.read().splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:  # not JSON, or not UTF-8
            raise _no_log(path, number) from error
        if not isinstance(entry, dict):
            raise _no_log(path, number)
        yield number, entry


def _no_log(path: StoredPath, number: int) -> ValueError:
    return ValueError(f"{path} is no training log: line {number} is not a JSON object of numbers. {_LEAVE_OUT}")
