"""By class, how far our median seed is from the published checkpoint, or the seeds from each other: what differs most
is shown, every class is in a table that opens."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.report.html import svg
from pipeline.report.html.elements import escaped, table
from pipeline.report.rows import Facts
from pipeline.report.tables import percent, signed

SHOWN = 12
"""Classes that are shown at once."""

METRICS = {"iou": "IoU", "pq": "PQ", "ap": "AP"}
"""How a metric of classes is headed."""

Values = Mapping[str, float | None]
"""Class -> percent; None where the validation pictures hold nothing of it."""


@dataclass(frozen=True, kw_only=True)
class _Compared:
    """A table's lines, what differs most first."""

    title: str
    headings: Sequence[str]
    lines: Sequence[str]


def class_tables(facts: Facts) -> str:
    """The tables of all the row's metrics; empty where no seed has any."""
    seeds = {seed.seed: seed.per_class for seed in facts.seeds if seed.per_class}
    if not seeds:
        return ""
    middle = facts.median_seed if facts.median_seed in seeds else next(iter(seeds))
    checked = facts.published_checkpoint.per_class if facts.published_checkpoint else {}
    text = ""
    for number, metric in enumerate(seeds[middle]):
        ours = seeds[middle][metric]
        label = METRICS.get(metric, metric)
        if checked.get(metric):
            compared = _with_published(label, middle, ours, checked[metric])
        elif len(seeds) > 1:
            compared = _with_each_other(label, [per_class[metric] for per_class in seeds.values()])
        else:
            compared = _alone(label, ours)
        if number == 0:
            text += f"<h4>{escaped(compared.title)}</h4>{table(compared.headings, compared.lines[:SHOWN], 'classes')}"
        if number or len(compared.lines) > SHOWN:
            text += (
                f"<details><summary>{escaped(label)} of every class ({len(compared.lines)})</summary>"
                f"{table(compared.headings, compared.lines, 'classes')}</details>"
            )
    return text


def _with_published(label: str, seed: int, ours: Values, published: Values) -> _Compared:
    differences = {
        name: value - other
        for name, value in ours.items()
        if value is not None and (other := published.get(name)) is not None
    }
    reach = max(map(abs, differences.values()), default=0.0)

    def cells(name: str) -> list[str]:
        difference = differences.get(name)
        bar = "" if difference is None else svg.bar(difference, reach)
        return [_value(ours[name]), _value(published.get(name)), signed(difference), bar]

    return _Compared(
        title=f"{label} of classes: seed {seed}, the one at the median, less the published checkpoint evaluated here",
        headings=["Class", "ours", "published", "difference", ""],
        lines=_lines(ours, lambda name: abs(differences.get(name, -1.0)) if name in differences else -1.0, cells),
    )


def _with_each_other(label: str, seeds: Sequence[Values]) -> _Compared:
    known = {name: sorted(v for values in seeds if (v := values.get(name)) is not None) for name in seeds[0]}

    def cells(name: str) -> list[str]:
        values = known[name]
        if not values:
            return ["absent", "", "", "", ""]
        low, middle, high = values[0], statistics.median(values), values[-1]
        return [*map(percent, (low, middle, high, high - low)), svg.span_bar(low, high, middle)]

    return _Compared(
        title=f"{label} of classes: where the seeds lie furthest apart",
        headings=["Class", "lowest", "median", "highest", "apart", "0 to 100"],
        lines=_lines(seeds[0], lambda name: known[name][-1] - known[name][0] if known[name] else -1.0, cells),
    )


def _alone(label: str, ours: Values) -> _Compared:
    def cells(name: str) -> list[str]:
        value = ours[name]
        return [_value(value), "" if value is None else svg.span_bar(0.0, value, value)]

    return _Compared(
        title=f"{label} of classes, the lowest first",
        headings=["Class", "ours", "0 to 100"],
        lines=_lines(ours, lambda name: -1.0 if (value := ours[name]) is None else 100 - value, cells),
    )


def _lines(names: Values, order: Callable[[str], float], cells: Callable[[str], Sequence[str]]) -> list[str]:
    """A line of every class, the largest of `order` first; `cells` are HTML."""
    return [
        f'<tr><th scope="row">{escaped(name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells(name))}</tr>'
        for name in sorted(names, key=order, reverse=True)
    ]


def _value(value: float | None) -> str:
    return "absent" if value is None else f"{value:.2f}"
