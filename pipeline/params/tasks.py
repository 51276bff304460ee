"""What each task reports, in the order of the tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import overload

FIGURES: Mapping[str, tuple[str, ...]] = {
    "semantic": ("miou", "mean_accuracy", "pixel_accuracy"),
    "panoptic": (
        "pq",
        "sq",
        "rq",
        "pq_things",
        "sq_things",
        "rq_things",
        "pq_stuff",
        "sq_stuff",
        "rq_stuff",
        "ap",
        "miou",
    ),
    "instance": ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
}
"""By task: figures of a checkpoint, as fractions; the first chooses the best checkpoint. One that has nothing to count
(no large object, say) is None."""

MS_FLIP = "miou_ms_flip"
"""The figure of rows whose `test.ms_flip` is set, beside those of their task."""

LABELS: Mapping[str, str] = {
    "miou": "mIoU",
    "miou_ms_flip": "mIoU (ms+flip)",
    "mean_accuracy": "mean acc.",
    "pixel_accuracy": "pixel acc.",
    "pq": "PQ",
    "sq": "SQ",
    "rq": "RQ",
    "pq_things": "PQ things",
    "sq_things": "SQ things",
    "rq_things": "RQ things",
    "pq_stuff": "PQ stuff",
    "sq_stuff": "SQ stuff",
    "rq_stuff": "RQ stuff",
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "AP small",
    "ap_medium": "AP medium",
    "ap_large": "AP large",
}
"""How tables head a figure."""


def primary(task: str) -> str:
    """The figure that chooses the best checkpoint and is compared first."""
    return FIGURES[task][0]


def headline(task: str) -> tuple[str, ...]:
    """The figures that a task is known by."""
    return ("pq", "ap", "miou") if task == "panoptic" else (primary(task),)


@overload
def percent(fraction: float) -> float: ...
@overload
def percent(fraction: None) -> None: ...
@overload
def percent(fraction: float | None) -> float | None: ...
def percent(fraction: float | None) -> float | None:
    """A figure as tables, MLflow and DVC show it: 0.5 -> 50.0; code keeps fractions. Decimals that only rounding has
    made are left out."""
    return None if fraction is None else round(100 * fraction, 6)


def in_words(figures: Mapping[str, float | None], task: str) -> str:
    """The figures that a task is known by, in percent: "PQ 52.00, AP 41.80, mIoU 61.70"."""
    shown = {LABELS[name]: percent(figures[name]) for name in headline(task)}
    return ", ".join(f"{label} {'-' if value is None else f'{value:.2f}'}" for label, value in shown.items())
