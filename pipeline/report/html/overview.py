"""A task's rows beside the published ones: the tables that the page begins with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup

from pipeline.comparison.rows import Facts
from pipeline.comparison.tables import (
    NOTHING,
    TITLES,
    Cell,
    Column,
    published_columns,
    signed,
    split,
    table_line,
    used_columns,
)
from pipeline.comparison.verdict import points
from pipeline.params.tasks import LABELS, primary
from pipeline.report.html import svg
from pipeline.report.sentences import not_run_sentence, published_sentences, table_notes
from pipeline.tracking.pages import MlflowPages

_BELOW: Mapping[str, Mapping[str, str]] = {
    "semantic": {"miou": "range"},
    "panoptic": {"pq": "range", "ap": "difference ap", "published ap": "authors ap"},
    "instance": {"ap": "range"},
}
"""By task, columns whose cells stand in small print below those of another, so that the table fits a page."""

_STRIP = "strip"
"""Key of the column that only the page has: the seeds' differences from the published figure, drawn."""

_LARGEST_REACH = 5.0
"""Points; a seed that is further away is drawn at the end of the axis."""


@dataclass(frozen=True, kw_only=True)
class ShownCell:
    """A cell, with what only the page shows of it."""

    classes: str
    cell: Cell
    below: str = ""
    """In small print below it."""
    verdict: str = ""
    """Shown as a label instead of the cell's text."""
    chart: Markup | None = None
    """Shown instead of the cell's text."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row in the table."""

    name: str
    linked: bool
    """Whether the row has a section."""
    cells: Sequence[ShownCell]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table with a body for every dataset."""

    columns: int
    groups: Sequence[tuple[str, int]]
    """(title above neighbouring columns, how many); an empty title: none."""
    headings: Sequence[tuple[str, str, str]]
    """(classes, heading, small print below it)."""
    bodies: Sequence[tuple[str, Sequence[Line]]]
    """(dataset, its rows)."""

    @property
    def several(self) -> bool:
        """Whether there is more than one dataset."""
        return len(self.bodies) > 1


@dataclass(frozen=True, kw_only=True)
class Overview:
    """A task's tables and what is said below them."""

    task: str
    title: str
    ran: Grid | None
    """None: no row ran."""
    idle: Grid | None
    """Published figures of the rows that have not been run; None: all ran."""
    idle_sentence: str
    notes: Sequence[str]
    checked: Sequence[str]
    """Sentences about the published checkpoints, evaluated here."""
    compared: str | None
    """The rows' page in MLflow; None: no row is there."""


def overview(task: str, rows: Mapping[str, Facts], mlflow: MlflowPages) -> Overview:
    """What the page shows of a task's rows. mlflow: where they are shown too."""
    ran, idle = split(rows)
    reach = _reach(ran)
    used = {column.key: column for column in used_columns(ran, task)}
    below = {key: used[under] for key, under in _BELOW[task].items() if key in used and under in used}
    columns = []
    for column in used.values():
        if column not in below.values():
            columns.append(column)
        if column.key == primary(task) and reach:
            columns.append(Column(_STRIP, f"seeds, ±{reach:g}", LABELS[primary(task)]))
    notes = table_notes(task, rows)
    if reach:
        notes.append(
            f'"Seeds, ±{reach:g}" draws every seed\'s difference from the published figure, up to {points(reach)}. '
            "The line in the middle is the published figure, and the shaded part is the margin."
        )
    return Overview(
        task=task,
        title=TITLES[task],
        ran=_grid(ran, columns, below, reach) if ran else None,
        idle=_grid(idle, published_columns(idle, task), {}, 0.0) if idle else None,
        idle_sentence=not_run_sentence(idle),
        notes=notes,
        checked=[sentence for name, facts in rows.items() for sentence in published_sentences(name, facts)],
        compared=next(filter(None, (mlflow.rows(facts.mlflow_experiment_id, task) for facts in rows.values())), None),
    )


def _grid(rows: Mapping[str, Facts], columns: Sequence[Column], below: Mapping[str, Column], reach: float) -> Grid:
    """below: columns in small print, by the one they stand below."""
    lines: dict[str, list[Line]] = {}
    for name, facts in rows.items():
        lines.setdefault(facts.dataset, []).append(_line(name, facts, columns, below, reach))
    groups = groupby(columns, key=lambda column: column.group)
    return Grid(
        columns=len(columns),
        groups=[(group, len(list(of_group))) for group, of_group in groups],
        headings=[
            (_classes(column), column.heading, below[column.key].heading if column.key in below else "")
            for column in columns
        ],
        bodies=list(lines.items()),
    )


def _line(name: str, facts: Facts, columns: Sequence[Column], below: Mapping[str, Column], reach: float) -> Line:
    texts = table_line(name, facts)
    cells = []
    for column in columns[1:]:
        cell = texts.get(column.key, NOTHING)
        under = texts[below[column.key].key] if column.key in below else NOTHING
        apart = " apart" if cell.apart else ""
        cells.append(
            ShownCell(
                classes=_classes(column) + (" main" if column.key == facts.primary else "") + apart,
                cell=cell,
                below="" if under == NOTHING else under.text,
                verdict=facts.verdict.decision if column.key == "verdict" else "",
                chart=_strip(name, facts, reach) if column.key == _STRIP else None,
            )
        )
    return Line(name=name, linked=facts.status != "not run", cells=cells)


def _classes(column: Column) -> str:
    """The column's own class, and `start` where columns that belong together begin."""
    starts = column.heading in ("median", "ours") or column.key in ("verdict", "training")
    return f"is-{column.key.replace(' ', '-')}" + (" start" if starts else "")


def _strip(name: str, facts: Facts, reach: float) -> Markup | None:
    differences, median = _differences(facts), facts.difference.get(facts.primary)
    if not differences or median is None:
        return None
    words = ", ".join(signed(difference) for difference in differences)
    return svg.small_strip(
        differences,
        median,
        reach=reach,
        margin=facts.margin,
        label=f"{name}: differences of the seeds from the published figure: {words}",
    )


def _reach(rows: Mapping[str, Facts]) -> float:
    """How far the axis of the seeds' differences goes; 0: there are none."""
    away = [abs(difference) for facts in rows.values() for difference in _differences(facts)]
    if not away:
        return 0.0
    margins = [facts.margin for facts in rows.values()]
    return min(svg.ticks(0.0, max(*away, *margins), 4)[-1], _LARGEST_REACH)


def _differences(facts: Facts) -> list[float]:
    """The seeds' figures less the published one."""
    first = facts.primary
    published = facts.reference.get(first)
    if published is None:
        return []
    return [value - published for seed in facts.seeds if (value := seed.figures.get(first)) is not None]
