"""The tables as Markdown and as text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence

from pipeline.report.rows import (
    Facts,
    published_rows,
)
from pipeline.report.sentences import (
    HOW_TO_READ,
    LEGEND,
    LEGENDS,
    attention,
    baseline_sentence,
    checkpoint_notes,
    interval_sentence,
    published_sentence,
    summary,
)
from pipeline.report.tables import TITLES, Cell, by_task, seed_cells, seed_columns, table_line, used_columns


def markdown(rows: Mapping[str, Facts], unknown: str = "") -> str:
    """results.md: how the rows stand, a table per task with its published checkpoints, every seed of the rows that
    ran."""
    lines = ["# Results", ""]
    lines += [paragraph for text in (summary(rows), HOW_TO_READ, LEGEND, unknown) if text for paragraph in (text, "")]
    if worries := attention(rows):
        lines += [*(f"- {name}: {sentence}." for name, sentence in worries), ""]
    for task, of_task in by_task(rows).items():
        lines += [f"## {TITLES[task]}", "", " ".join([LEGENDS[task], *checkpoint_notes(of_task)]), ""]
        columns = used_columns(of_task, task)
        grid = [[str(table_line(name, facts)[column.key]) for column in columns] for name, facts in of_task.items()]
        lines += [*_markdown_table([column.full for column in columns], grid, left=2), ""]
        if checked := [sentence for name, facts in of_task.items() if (sentence := published_sentence(name, facts))]:
            lines += [*(f"- {sentence}" for sentence in checked), ""]
    if any(facts.seeds for facts in rows.values()):
        lines += ["## Seeds", ""]
    for name, facts in rows.items():
        if facts.seeds:
            said = (facts.verdict.reason, interval_sentence(facts), baseline_sentence(facts))
            lines += [f"### {name}", "", *(line for sentence in said if sentence for line in (sentence, ""))]
            lines += _markdown_table(seed_columns(facts), [seed_cells(seed, facts) for seed in facts.seeds])
            lines += [""]
    return "\n".join(lines[:-1]) + "\n"


def _markdown_table(headings: Sequence[str], grid: Iterable[Sequence[str]], *, left: int = 1) -> list[str]:
    lines = [f"| {' | '.join(headings)} |", f"|{' --- |' * left}{' ---: |' * (len(headings) - left)}"]
    return lines + [f"| {' | '.join(_markdown_cell(cell) for cell in cells)} |" for cells in grid]


def _markdown_cell(cell: str) -> str:
    return " ".join(cell.replace("|", "\\|").replace("<", "&lt;").replace(" *", " \\*").split())


_TERMINAL: Mapping[str, tuple[str, ...]] = {
    task: ("row", "verdict", first, "range", "seeds", f"published {first}", f"difference {first}", *more, "training")
    for task, first, more in (
        ("semantic", "miou", ("fps",)),
        ("panoptic", "pq", ("ap", "miou")),
        ("instance", "ap", ("fps",)),
    )
}
"""By task, columns of the terminal's tables, which are to fit into 120 characters."""


def text_table(rows: Mapping[str, Facts]) -> str:
    """For a terminal: a table per task of the rows that ran, columns without any figure left out; the other rows are
    named."""
    text: list[str] = []
    for task, of_task in by_task(rows).items():
        ran = {name: facts for name, facts in of_task.items() if facts.status != "not run"}
        if not ran:
            continue
        lines = [table_line(name, facts) for name, facts in ran.items()]
        columns = [column for column in used_columns(ran, task) if column.key in _TERMINAL[task]]
        grid = [
            [column.full for column in columns],
            *([_brief(line, column.key) for column in columns] for line in lines),
        ]
        widths = [max(len(cells[i]) for cells in grid) for i in range(len(columns))]
        printed = [
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ).rstrip()
            for cells in grid
        ]
        text += ["", TITLES[task], printed[0], "-" * max(map(len, printed)), *printed[1:]]
    worries = attention(rows)
    if worries:
        text += ["", *(f"{name}: {sentence}" for name, sentence in worries)]
    waiting = [name for name, facts in rows.items() if facts.status == "not run"]
    if waiting:
        text += ["", *textwrap.wrap(f"not run: {', '.join(waiting)}", 100, break_on_hyphens=False)]
    if published_rows(rows):
        text += ["", summary(rows)]
    return "\n".join(text[1:])


def _brief(line: Mapping[str, Cell], key: str) -> str:
    """A cell of the terminal's table, which has no room for what other lines say too."""
    return line[key].text if key == "training" or line[key].note == "(incomplete)" else str(line[key])
