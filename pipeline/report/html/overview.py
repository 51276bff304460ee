"""A task's rows beside the published ones: the table that the page begins with. On a phone style.css makes a card of
every line; `role` and `data-label` keep it a table for those who have it read out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from pipeline.params.tasks import LABELS, primary
from pipeline.report.html import svg
from pipeline.report.html.elements import chip, escaped, items, paragraphs, row_link, small
from pipeline.report.rows import Facts
from pipeline.report.sentences import LEGENDS, checkpoint_notes, published_sentence
from pipeline.report.tables import NOTHING, TITLES, Cell, Column, signed, table_line, used_columns

_BELOW: Mapping[str, Mapping[str, str]] = {
    "semantic": {"miou": "range"},
    "panoptic": {"pq": "range", "ap": "difference ap"},
    "instance": {"ap": "range"},
}
"""By task, columns whose cells stand in small print below those of another, so that the table fits a page."""

_STRIP = "strip"
"""Key of the column that only the page has: the seeds' differences from the published figure, drawn."""

_LARGEST_REACH = 5.0
"""Points; a seed that is further away is drawn at the end of the axis."""


def overview(task: str, rows: Mapping[str, Facts]) -> str:
    """The section of a task: its table, what its columns mean, its published checkpoints evaluated here."""
    first, reach = primary(task), _reach(rows)
    columns = []
    for column in used_columns(rows, task):
        if column.key not in _BELOW[task].values():
            columns.append(column)
        if column.key == first and reach:
            columns.append(Column(_STRIP, f"seeds, ±{reach:g}", LABELS[first], f"seeds less published, ±{reach:g}"))
    datasets = groupby(rows.items(), key=lambda item: item[1].dataset)
    several = len({facts.dataset for facts in rows.values()}) > 1
    bodies = ""
    for dataset, of_dataset in datasets:
        title = (
            f'<tr class=dataset role="row"><th colspan="{len(columns)}" scope="rowgroup" role="rowheader">'
            f"{escaped(dataset)}</th></tr>"
        )
        lines = "".join(_line(name, facts, columns, reach) for name, facts in of_dataset)
        bodies += f'<tbody role="rowgroup">{title if several else ""}{lines}</tbody>'
    legend = (
        f'"Seeds, ±{reach:g}" draws every seed\'s difference from the published figure, up to {reach:g} points: the '
        "line in the middle is the published figure, the shade the margin."
    )
    checked = [sentence for name, facts in rows.items() if (sentence := published_sentence(name, facts))]
    published = (
        f"<details><summary>The published checkpoints, evaluated here</summary><ul>{items(checked)}</ul></details>"
    )
    return (
        f'<section id="{task}"><h2>{TITLES[task]}</h2><div class="wide"><table class="rows" role="table">'
        f"{_head(task, columns)}{bodies}</table></div>"
        f"{paragraphs([LEGENDS[task], *checkpoint_notes(rows), legend if reach else ''], 'note')}"
        f"{published if checked else ''}</section>\n"
    )


def _head(task: str, columns: Sequence[Column]) -> str:
    groups = "".join(
        f'<th colspan="{len(list(of_group))}" scope="colgroup" role="columnheader">{escaped(group)}</th>'
        if group
        else f'<td colspan="{len(list(of_group))}"></td>'
        for group, of_group in groupby(columns, key=lambda column: column.group)
    )
    headings = "".join(
        f'<th scope="col" role="columnheader" class="{_classes(column)}">{escaped(column.heading)}'
        f"{small(_BELOW[task].get(column.key, '').partition(' ')[0])}</th>"
        for column in columns
    )
    return f'<thead role="rowgroup"><tr role="row" class=groups>{groups}</tr><tr role="row">{headings}</tr></thead>'


def _line(name: str, facts: Facts, columns: Sequence[Column], reach: float) -> str:
    line = table_line(name, facts)
    idle = facts.status == "not run"
    before, underscore, last = name.rpartition("_")
    title = f"<span>{escaped(before + underscore)}</span><wbr><span>{escaped(last)}</span>"
    text = f'<th scope="row" role="rowheader">{title if idle else row_link(name, title)}</th>'
    for column in columns[1:]:
        if column.key == _STRIP:
            content = _strip(name, facts, reach)
            kind = "" if content else "none"
        else:
            cell = line[column.key]
            content = chip(facts) + small(cell.note) if column.key == "verdict" else _content(cell)
            below = line.get(_BELOW[facts.task].get(column.key, ""), NOTHING)
            content += "" if below == NOTHING else small(below.text)
            kind = " ".join(k for k, holds in (("none", cell == NOTHING), ("apart", cell.apart)) if holds)
        classes = f"{_classes(column)} {kind}".strip() + (" main" if column.key == facts.primary else "")
        text += f'<td role="cell" class="{classes}" data-label="{escaped(column.full)}">{content}</td>'
    return f'<tr role="row"{" class=idle" if idle else ""}>{text}</tr>'


def _classes(column: Column) -> str:
    """The column's own class, and `start` where columns that belong together begin."""
    starts = column.heading in ("median", "ours") or column.key in ("verdict", "training")
    return f"is-{column.key.replace(' ', '-')}" + (" start" if starts else "")


def _content(cell: Cell) -> str:
    mark = '<span title="not comparable with the published figure"> *</span>' if cell.apart else ""
    return f"{escaped(cell.text)}{mark}{small(cell.note)}"


def _strip(name: str, facts: Facts, reach: float) -> str:
    differences, median = _differences(facts), facts.difference.get(facts.primary)
    if not differences or median is None:
        return ""
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
    published = facts.published.get(first)
    if published is None:
        return []
    return [value - published for seed in facts.seeds if (value := seed.figures.get(first)) is not None]
