"""Charts of an evaluation, to be looked at beside the figures: which classes are hard, and what they are taken for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.storage.files import whole_file
from pipeline.storage.stores import StoredPath

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMED_CLASSES = 40
"""With more classes than this, names beside the matrix would be too small to read; the table says what matters."""
CONFUSIONS = 25
"""Rows of the table of the commonest confusions."""
_SHOWN_SHARE = 0.00005
"""Of all pixels: what would be 0.00 % in the table is left out."""
_COLUMN = 50
"""Classes in one column of a per-class chart."""


def commonest_confusions(
    confusion: NDArray[np.integer], class_names: Sequence[str], count: int = CONFUSIONS
) -> list[tuple[str, str, float, float]]:
    """(true class, predicted class, share of the true class's pixels, share of all pixels), most pixels first."""
    errors = confusion.copy()
    np.fill_diagonal(errors, 0)
    order = np.argsort(-errors, axis=None, kind="stable")[:count]
    total, of_class = confusion.sum(), confusion.sum(1)
    found = []
    for true, predicted in zip(*np.unravel_index(order, errors.shape), strict=True):
        pixels = errors[true, predicted]
        if pixels:
            names = class_names[true], class_names[predicted]
            found.append((*names, float(pixels / of_class[true]), float(pixels / total)))
    return found


def draw_confusion(path: StoredPath, confusion: NDArray[np.integer], class_names: Sequence[str], title: str) -> None:
    """A PNG: for every true class the shares of the predicted ones, beside a table of the commonest confusions.

    `confusion`: (C, C) pixels, rows the true class. Classes without a pixel are grey.
    """
    from matplotlib.colors import PowerNorm

    classes = len(class_names)
    of_class = confusion.sum(1, keepdims=True)
    shares = np.where(of_class > 0, confusion / np.maximum(of_class, 1), np.nan)
    named = classes <= NAMED_CLASSES
    rows = [row for row in commonest_confusions(confusion, class_names) if row[3] >= _SHOWN_SHARE]
    side = 5.5 + (0.16 * classes if named else 3.5)
    figure = _figure(side + 6.2, max(side - 1.5, 0.26 * len(rows) + 1.2))
    axes, table = figure.subplots(1, 2, width_ratios=[side, 6.2])

    # the colour follows the root of the share, so that small confusions are seen beside a large diagonal
    image = axes.imshow(shares, cmap=_colours(), norm=PowerNorm(0.5, vmin=0, vmax=1), interpolation="nearest")
    figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, label="share of the true class's pixels")
    axes.set_xlabel("predicted class" if named else "predicted class (id)")
    axes.set_ylabel("true class" if named else "true class (id)")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    if named:
        axes.set_xticks(range(classes), [_short(name) for name in class_names], rotation=90)
        axes.set_yticks(range(classes), [_short(name) for name in class_names])
        if classes <= 20:
            for (true, predicted), share in np.ndenumerate(shares):
                if share >= 0.005:
                    colour = "white" if share > 0.4 else "black"
                    text = f"{100 * share:.0f}"
                    axes.text(predicted, true, text, ha="center", va="center", fontsize=8, color=colour)

    table.axis("off")
    table.set_title("Commonest confusions, share of the true class's pixels and of all", loc="left", fontsize=10)
    columns = (0.0, 0.40, 0.86, 1.0)
    heads = ("true", "predicted as", "of class", "of all")
    for line, cells in enumerate([heads, *((a, b, f"{100 * c:.1f} %", f"{100 * d:.2f} %") for a, b, c, d in rows)]):
        y = 1 - (line + 0.5) / (CONFUSIONS + 1)
        for x, cell, right in zip(columns, cells, (False, False, True, True), strict=True):
            colour = "0.4" if line == 0 else "black"
            place = {"ha": "right" if right else "left", "va": "center", "transform": table.transAxes}
            table.text(x, y, _short(cell, 24), fontsize=9, color=colour, **place)
    _save(figure, path)


def draw_per_class(path: StoredPath, per_class: Mapping[str, Mapping[str, float | None]], title: str) -> None:
    """A PNG with one panel of bars per metric, best class first, in percent; a class with nothing to count says so."""
    from pipeline.params.tasks import LABELS

    names = {"iou": "IoU", **LABELS}
    columns = [
        (metric, ranked[start : start + _COLUMN])
        for metric, classes in per_class.items()
        for ranked in [sorted(classes.items(), key=lambda item: -1.0 if item[1] is None else item[1], reverse=True)]
        for start in range(0, len(ranked), _COLUMN)
    ]
    tallest = max(len(ranked) for _, ranked in columns)
    figure = _figure(4.6 * len(columns), 0.2 * tallest + 1.4)
    panels = figure.subplots(1, len(columns), squeeze=False)[0]
    for axes, (metric, ranked) in zip(panels, columns, strict=True):
        values = [0.0 if value is None else 100 * value for _, value in ranked]
        places = range(len(ranked))
        axes.barh(places, values, color="tab:blue", height=0.75)
        axes.set_yticks(places, [_short(name) for name, _ in ranked])
        axes.set_ylim(tallest - 0.5, -0.5)
        axes.set_xlim(0, 112)
        axes.set_xticks(range(0, 101, 20))
        axes.set_xlabel(f"{names.get(metric, metric)} (%)")
        for place, (_, value) in enumerate(ranked):
            text = "no pixels or objects" if value is None else f"{100 * value:.1f}"
            axes.text((0 if value is None else 100 * value) + 1, place, text, va="center", fontsize=7, color="0.3")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    with rc_context({"font.size": 9}):
        return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _colours() -> Any:
    from matplotlib import colormaps

    return colormaps["Blues"].with_extremes(bad="0.85")


def _save(figure: Figure, path: StoredPath) -> None:
    with whole_file(path) as partial:
        figure.savefig(partial, format="png")


def _short(name: str, length: int = 22) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"
