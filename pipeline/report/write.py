"""The report: every row of params.yaml beside its published figures, from what exists in results/.

pipeline.comparison reads and compares, sentences.py makes sentences of it, text.py and html/ write them.
Here the three files are written, and what lies under the storage root is read for the page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pipeline.comparison.rows import Facts, counts, of_row, row_facts
from pipeline.params.schema import Params, Row
from pipeline.report.html.page import page
from pipeline.report.html.row_section import Details
from pipeline.report.html.thumbnails import ROW_OVERLAYS, panel_limit, panels
from pipeline.report.paths import without_folders
from pipeline.report.text import markdown, text_table
from pipeline.runs.curve_file import read_curve
from pipeline.storage.files import write_json, write_text
from pipeline.storage.results.data import ConvertedWeights, Manifest
from pipeline.storage.results.folder import RESULTS, find_result, names_of
from pipeline.storage.results.rows import Evaluation, PublishedEvaluation, TrainingResult
from pipeline.storage.root import storage_root
from pipeline.storage.stores import StoredPath
from pipeline.tracking.client import shown_uri

_T = TypeVar("_T")


def write_report(params: Params, *, results: Path = RESULTS, out: Path = Path("reports")) -> str:
    """Write results.json, results.md and index.html into `out`; returns the tables as text for a terminal.

    ValueError when a result file is torn, of another version's layout, or of another task than its row. What is
    missing from the storage root is left out of the page, which says so.
    """
    rows = {name: without_folders(row_facts(row, results, params.verdict)) for name, row in params.rows.items()}
    gone = sorted(set(names_of(Evaluation, results=results)) - set(rows))
    unknown = f"Not shown, because params.yaml has no such row any more: {', '.join(gone)}." if gone else ""
    stored = _Stored()
    details = _details(params, results, rows, stored)
    as_json = {name: facts.as_json() for name, facts in rows.items()}
    write_json(out / "results.json", {"verdicts": counts(rows), "rows": as_json})
    write_text(out / "results.md", markdown(rows, params.verdict, unknown))
    html = page(rows, details, settings=params.verdict, notes=[unknown, stored.sentence()], tracking=shown_uri())
    write_text(out / "index.html", html)
    return text_table(rows)


class _Stored:
    """Reads under the storage root. What is missing is counted, and a root that fails is not asked again: the report
    is made all the same."""

    def __init__(self) -> None:
        self.root = storage_root()
        self.missing = 0
        self.failure = ""

    def read(self, relative: str, reader: Callable[[StoredPath], _T]) -> _T | None:
        """What `reader` makes of the path; None: it is missing or cannot be read."""
        if self.failure:
            self.missing += 1
            return None
        try:
            return reader(self.root / relative)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            self.missing += 1
        except Exception as error:  # whatever a remote root's client may throw
            said = " ".join(str(error).replace(str(self.root), "the root").split())
            self.failure = without_folders(said)[:200] or type(error).__name__
            self.missing += 1
        return None

    def sentence(self) -> str:
        """What the page lacks; empty: nothing."""
        if not self.missing:
            return ""
        files = "a file" if self.missing == 1 else f"{self.missing} files"
        why = f" ({self.failure})" if self.failure else ""
        return f"Curves or images are left out: {files} could not be read from the storage root{why}."


def _details(params: Params, results: Path, rows: Mapping[str, Facts], stored: _Stored) -> dict[str, Details]:
    """What only the page shows of the rows that ran: curves, overlays and where the numbers came from."""
    ran = [params.rows[name] for name, facts in rows.items() if facts.status != "not run"]
    evaluated = {row.name: of_row(Evaluation, row, results) for row in ran}
    named = {name: result.overlays if result else () for name, result in evaluated.items()}
    shown = sum(min(len(paths), ROW_OVERLAYS) for paths in named.values())
    limit = panel_limit(3 * shown)
    return {row.name: _row_details(row, params, results, named[row.name], limit, stored) for row in ran}


def _row_details(
    row: Row, params: Params, results: Path, overlays: Sequence[str], limit: int, stored: _Stored
) -> Details:
    trained, checked = of_row(TrainingResult, row, results), of_row(PublishedEvaluation, row, results)
    manifest = find_result(Manifest, row.dataset, results=results)
    weights = find_result(ConvertedWeights, row.weights, results=results)
    trainings = without_folders(trained.seeds) if trained else ()
    published = checked.curve if checked else None
    config = params.checkpoints.get(row.name)
    links = {"published checkpoint": config.url, "published log": config.log_url} if config else {}
    return Details(
        curves={
            seed.seed: points for seed in trainings if (points := stored.read(f"{seed.run_dir}/curve.jsonl", _curve))
        },
        published_curve=(stored.read(published, _curve) or []) if published else [],
        overlays=[
            pictures
            for path in overlays[:ROW_OVERLAYS]
            if (pictures := stored.read(path, lambda file: panels(_bytes(file), limit)))
        ],
        overlays_left_out=max(0, len(overlays) - ROW_OVERLAYS),
        data_digest=manifest.digest if manifest else None,
        weights=row.weights,
        weights_sha256=weights.sha256 if weights else None,
        trainings=trainings,
        links={name: without_folders(url) for name, url in links.items() if url},
    )


def _curve(path: StoredPath) -> list[dict[str, Any]]:
    points = read_curve(path)
    if not points:
        raise FileNotFoundError(path)
    return points


def _bytes(path: StoredPath) -> bytes:
    with path.open("rb") as file:
        return file.read()
