"""Is a training clearly below where it should be by now? Judged at each validation, against curves that are known."""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.params.schema import EarlyWarningConfig
from pipeline.storage.results.rows import BelowReference

Curve = Sequence[tuple[int, float]]
"""(step, figure as a fraction), steps rising."""

OTHER_SEEDS_NEEDED = 2
"""With one other seed nobody could say which of the two is the odd one."""


def clearly_below_reference(
    step: int,
    value: float,
    *,
    steps: int,
    published: Curve,
    other_seeds: Sequence[Curve],
    config: EarlyWarningConfig,
) -> BelowReference | None:
    """Whether `value` after `step` of `steps` steps is more than `config.points` percent points below a reference.

    References are the published curve, between whose points a straight line is drawn, and the median of the row's
    other seeds that were validated at the same step. The published curve comes first when both say so. None: not below,
    or too early to say (`config.after`).
    """
    if step < config.after * steps:
        return None
    at_step = [figure for curve in other_seeds for at, figure in curve if at == step]
    expected = {
        "published": _between(published, step),
        "other seeds": statistics.median(at_step) if len(at_step) >= OTHER_SEEDS_NEEDED else None,
    }
    for reference, figure in expected.items():
        if figure is not None and 100 * (figure - value) > config.points:
            return BelowReference(step, value, reference, figure)  # type: ignore[arg-type]
    return None


def _between(curve: Curve, step: int) -> float | None:
    """The curve's figure at a step; None before its first point, the last one's figure behind its last."""
    if not curve or step < curve[0][0]:
        return None
    after = bisect_left(curve, step, key=lambda point: point[0])
    if after == len(curve):
        return curve[-1][1]
    (step_1, figure_1) = curve[after]
    if step_1 == step:
        return figure_1
    (step_0, figure_0) = curve[after - 1]
    return figure_0 + (figure_1 - figure_0) * (step - step_0) / (step_1 - step_0)


def curve_of(points: Iterable[Mapping[str, Any]], figure: str) -> list[tuple[int, float]]:
    """One figure's curve from the points of a curve file."""
    return [(point["step"], point[figure]) for point in points if point.get(figure) is not None]


def described(below_reference: BelowReference, label: str) -> str:
    """'mIoU 31.20 is 9.3 points below the published curve (40.50)'."""
    reference = {"published": "the published curve", "other seeds": "the other seeds' median"}[
        below_reference.reference
    ]
    value, expected = 100 * below_reference.value, 100 * below_reference.expected
    return f"{label} {value:.2f} is {expected - value:.1f} points below {reference} ({expected:.2f})"


def warning(below_reference: BelowReference, label: str) -> str:
    """'step 4000: mIoU 31.20 is ...', as it is said and tagged (m2f.below_reference)."""
    return f"step {below_reference.step}: {described(below_reference, label)}"
