"""The published checkpoints of a row that have been evaluated here."""

from __future__ import annotations

from pathlib import Path

from pipeline.params.schema import Row
from pipeline.storage.results.folder import find_result, names_of
from pipeline.storage.results.rows import PublishedEvaluation


def other_checkpoints(row: Row, results: Path) -> dict[str, PublishedEvaluation]:
    """Those beside the one that is called as the row, by name; of another task: left out.

    ValueError with the command that makes a file again when it cannot be read.
    """
    found = {
        name: find_result(PublishedEvaluation, name, results=results)
        for name in names_of(PublishedEvaluation, results=results)
        if name.startswith(row.name) and name != row.name
    }
    return {name: each for name, each in found.items() if each and (each.row, each.task) == (row.name, row.task)}
