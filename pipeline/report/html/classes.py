"""By class, how far our median seed is from the published checkpoint, or the seeds from each other: what differs most
is shown, every class is in a table that opens."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from pipeline.comparison.rows import Facts
from pipeline.comparison.tables import figure_text, signed
from pipeline.report.html import svg

SHOWN = 12
"""Classes that are shown at once."""

METRICS = {"iou": "IoU", "pq": "PQ", "ap": "AP"}
"""How a metric of classes is headed."""

Values = Mapping[str, float | None]
"""Class -> percent; None where the validation pictures hold nothing of it."""


@dataclass(frozen=True, kw_only=True)
class ClassLine:
    """A class in a table."""

    name: str
    cells: Sequence[str]
    bar: Markup | None
    """None: there is nothing to draw."""


@dataclass(frozen=True, kw_only=True)
class ClassTable:
    """A metric of every class, what differs most first."""

    label: str
    title: str
    headings: Sequence[str]
    lines: Sequence[ClassLine]
    shown: Sequence[ClassLine]
    """At once; empty: the table opens."""

    @property
    def opens(self) -> bool:
        """Whether the table of all classes says more than what is shown."""
        return len(self.lines) > len(self.shown)


def class_tables(facts: Facts) -> list[ClassTable]:
    """The tables of all the row's metrics; none where no seed has any."""
    seeds = {seed.seed: seed.per_class for seed in facts.seeds if seed.per_class}
    if not seeds:
        return []
    middle = facts.median_seed if facts.median_seed in seeds else next(iter(seeds))
    checked = facts.published_checkpoint.per_class if facts.published_checkpoint else {}
    tables: list[ClassTable] = []
    for metric, ours in seeds[middle].items():
        label = METRICS.get(metric, metric)
        if checked.get(metric):
            title, headings, lines = _with_published(label, middle, ours, checked[metric])
        elif len(seeds) > 1:
            title, headings, lines = _with_each_other(label, [per_class[metric] for per_class in seeds.values()])
        else:
            title, headings, lines = _alone(label, ours)
        shown = [] if tables else lines[:SHOWN]
        tables.append(ClassTable(label=label, title=title, headings=headings, lines=lines, shown=shown))
    return tables


_Compared = tuple[str, Sequence[str], list[ClassLine]]
"""A table's title, headings and lines."""


def _with_published(label: str, seed: int, ours: Values, published: Values) -> _Compared:
    differences = {
        name: value - other
        for name, value in ours.items()
        if value is not None and (other := published.get(name)) is not None
    }
    reach = max(map(abs, differences.values()), default=0.0)

    def line(name: str) -> ClassLine:
        difference = differences.get(name)
        cells = [_value(ours[name]), _value(published.get(name)), signed(difference)]
        drawn = f"{name}: {label} {signed(difference)} points from the published"
        return ClassLine(
            name=name, cells=cells, bar=None if difference is None else svg.bar(difference, reach, label=drawn)
        )

    title = f"{label} of classes: seed {seed}, the one at the median, less the published checkpoint evaluated here"
    order = {name: abs(difference) for name, difference in differences.items()}
    return title, ["Class", "ours", "published", "difference", "drawn"], _lines(ours, order, line)


def _with_each_other(label: str, seeds: Sequence[Values]) -> _Compared:
    known = {name: sorted(v for values in seeds if (v := values.get(name)) is not None) for name in seeds[0]}

    def line(name: str) -> ClassLine:
        values = known[name]
        if not values:
            return ClassLine(name=name, cells=["absent", "", "", ""], bar=None)
        low, middle, high = values[0], statistics.median(values), values[-1]
        drawn = f"{name}: {label} {figure_text(low)} to {figure_text(high)}, median {figure_text(middle)}"
        cells = [*map(figure_text, (low, middle, high, high - low))]
        return ClassLine(name=name, cells=cells, bar=svg.span_bar(low, high, middle, label=drawn))

    title = f"{label} of classes: where the seeds lie furthest apart"
    order = {name: values[-1] - values[0] for name, values in known.items() if values}
    return title, ["Class", "lowest", "median", "highest", "apart", "0 to 100"], _lines(seeds[0], order, line)


def _alone(label: str, ours: Values) -> _Compared:
    def line(name: str) -> ClassLine:
        value = ours[name]
        drawn = f"{name}: {label} {_value(value)}"
        return ClassLine(
            name=name,
            cells=[_value(value)],
            bar=None if value is None else svg.span_bar(0.0, value, value, label=drawn),
        )

    order = {name: 100 - value for name, value in ours.items() if value is not None}
    return f"{label} of classes, the lowest first", ["Class", "ours", "0 to 100"], _lines(ours, order, line)


def _lines(names: Values, order: Mapping[str, float], line: Callable[[str], ClassLine]) -> list[ClassLine]:
    """A line of every class, the largest of `order` first, those that it lacks last."""
    return [line(name) for name in sorted(names, key=lambda name: order.get(name, -1.0), reverse=True)]


def _value(value: float | None) -> str:
    return "absent" if value is None else f"{value:.2f}"
