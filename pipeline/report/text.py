"""The tables as Markdown and as text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from pipeline.comparison.rows import (
    Facts,
    published_rows,
)
from pipeline.comparison.tables import (
    TITLES,
    Cell,
    Column,
    by_task,
    finished_first,
    published_columns,
    seed_cells,
    seed_columns,
    split,
    table_line,
    used_columns,
)
from pipeline.params.schema import VerdictConfig
from pipeline.report.sentences import (
    LEGEND,
    RULE,
    attention,
    baseline_sentence,
    how_to_read,
    interval_sentence,
    not_run_sentence,
    published_sentences,
    summary,
    table_notes,
)


def markdown(rows: Mapping[str, Facts], settings: VerdictConfig, unknown: str = "") -> str:
    """results.md: how many rows have which verdict, a table per task with its published checkpoints, every seed of the
    rows that ran. settings: by which verdicts were found."""
    lines = ["# Results", ""]
    rule = (*how_to_read(settings), RULE) if (stands := summary(rows)) else ()
    said = (stands, *rule, LEGEND, unknown)
    lines += [paragraph for text in said if text for paragraph in (_escaped(text), "")]
    if worries := attention(rows):
        lines += [*(_escaped(f"- {name}: {sentence}.") for name, sentence in worries), ""]
    for task, of_task in by_task(rows).items():
        lines += [f"## {TITLES[task]}", "", _escaped(" ".join(table_notes(task, of_task))), ""]
        ran, idle = split(of_task)
        if ran:
            lines += [*_rows_table(ran, used_columns(ran, task), left=2), ""]
        if idle:
            lines += ["<details>", f"<summary>{_escaped(not_run_sentence(idle))}</summary>", ""]
            lines += [*_rows_table(idle, published_columns(idle, task), left=1), "", "</details>", ""]
        if checked := [sentence for name, facts in of_task.items() for sentence in published_sentences(name, facts)]:
            lines += [*(_escaped(f"- {sentence}") for sentence in checked), ""]
    if any(facts.seeds for facts in rows.values()):
        lines += ["## Seeds", ""]
    for name, facts in finished_first(rows).items():
        if facts.seeds:
            told = (facts.verdict.reason, interval_sentence(facts), baseline_sentence(facts))
            lines += [_escaped(f"### {name}"), ""]
            lines += [line for sentence in told if sentence for line in (_escaped(sentence), "")]
            lines += _markdown_table(seed_columns(facts), [seed_cells(seed, facts) for seed in facts.seeds])
            lines += [""]
    return "\n".join(lines[:-1]) + "\n"


def _rows_table(rows: Mapping[str, Facts], columns: Sequence[Column], *, left: int) -> list[str]:
    grid = [[str(table_line(name, facts)[column.key]) for column in columns] for name, facts in rows.items()]
    return _markdown_table([column.full for column in columns], grid, left=left)


def _markdown_table(headings: Sequence[str], grid: Iterable[Sequence[str]], *, left: int = 1) -> list[str]:
    lines = [f"| {' | '.join(headings)} |", f"|{' --- |' * left}{' ---: |' * (len(headings) - left)}"]
    return lines + [f"| {' | '.join(_markdown_cell(cell) for cell in cells)} |" for cells in grid]


def _markdown_cell(cell: str) -> str:
    return " ".join(_escaped(cell).replace("|", "\\|").replace(" *", " \\*").split())


def _escaped(text: str) -> str:
    """Text without HTML, which Markdown would let through."""
    return text.replace("&", "&amp;").replace("<", "&lt;")


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
        ran, _ = split(of_task)
        if not ran:
            continue
        # there is no column for the authors' figures: those that a row is judged by stand in that for published ones
        ran = {name: replace(facts, published={**facts.published, **facts.reference}) for name, facts in ran.items()}
        lines = [table_line(name, facts) for name, facts in ran.items()]
        columns = [column for column in used_columns(ran, task) if column.key in _TERMINAL[task]]
        grid = [
            ["diff." if column.full == "difference" else column.full for column in columns],
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
    if idle := split(rows)[1]:
        text += ["", *textwrap.wrap(not_run_sentence(idle), 100, break_on_hyphens=False)]
    if published_rows(rows):
        text += ["", summary(rows)]
    return "\n".join(text[1:])


def _brief(line: Mapping[str, Cell], key: str) -> str:
    """A cell of the terminal's table, which has no room for what other lines say too."""
    return line[key].text if key == "training" or line[key].note == "(incomplete)" else str(line[key])
