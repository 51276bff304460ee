"""The report: every row of params.yaml beside its published figures, from what exists in results/.

Nothing is computed here but medians, ranges and differences. Figures are fractions in results/ and percent here,
with the two decimals the tables print.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.files import read_json, write_json, write_text
from pipeline.params import Params, Row
from pipeline.report_page import Section, page
from pipeline.storage import storage_root
from pipeline.tracking import read_curve

METRICS = ("miou", "mean_accuracy", "pixel_accuracy")
"""Figures of a checkpoint that are fractions."""

TABLE = (
    ("row", "Row"),
    ("seeds", "Seeds"),
    ("miou", "mIoU"),
    ("range", "range"),
    ("published", "published"),
    ("difference", "difference"),
    ("pixel_accuracy", "pixel acc."),
    ("baseline", "commonest class"),
)
"""Columns of the table: key of `table_line`, heading."""

SEED_TABLE = ("Seed", "mIoU", "best on validation", "pixel acc.", "training", "run key")
"""Columns of a row's seeds: `seed_cells`."""

LEGEND = (
    "Figures are percent on the validation pictures, single scale, of the last checkpoint: the median over the seeds, "
    'and their lowest and highest. "Commonest class" is the mIoU of predicting that class everywhere.'
)


def write_report(params: Params, *, results: Path = Path("results"), out: Path = Path("reports")) -> str:
    """Write results.json, results.md and index.html into `out`; returns the table as text for a terminal."""
    rows = {name: row_facts(row, results) for name, row in params.rows.items()}
    gone = sorted({path.stem for path in (results / "evaluate").glob("*.json")} - set(rows))
    unknown = f"Not shown, because params.yaml has no such row any more: {', '.join(gone)}." if gone else ""
    write_json(out / "results.json", {"rows": rows})
    write_text(out / "results.md", markdown(rows, unknown))
    sections = [
        Section(
            name=name,
            facts=facts,
            line=table_line(name, facts),
            seeds=[seed_cells(seed) for seed in facts["seeds"]],
            **_details(params.rows[name], results),
        )
        for name, facts in rows.items()
    ]
    write_text(out / "index.html", page(sections, columns=TABLE, seed_columns=SEED_TABLE, notes=[LEGEND, unknown]))
    return text_table(rows)


def row_facts(row: Row, results: Path) -> dict[str, Any]:
    """One row of results.json.

    `status`: "not run"; "trained" (not evaluated yet); "out of date" (the figures belong to an earlier training);
    "incomplete" (a seed failed, diverged or has no result); "finished".
    """
    evaluated = _read(results, "evaluate", row.name)
    trained = _read(results, "train", row.name)
    seeds = _seeds(evaluated, trained) if evaluated else _seeds({"decides": "last", "seeds": []}, trained)
    figures = {name: [seed[name] for seed in seeds if name in seed] for name in METRICS}
    median = {name: statistics.median(values) for name, values in figures.items() if values}
    published = dict(row.published)
    facts: dict[str, Any] = {
        "dataset": row.dataset,
        "status": _status(row, seeds, evaluated, trained),
        "seeds": seeds,
        "median": median,
        "range": {name: [min(values), max(values)] for name, values in figures.items() if values},
        "published": published,
        "published_authors": dict(row.published_authors),
        "difference": {name: value - published[name] for name, value in median.items() if name in published},
        "baseline": None,
        "published_checkpoint": None,
    }
    if evaluated:
        baseline = evaluated["baseline"]
        facts["baseline"] = {"class": baseline["class"]} | {m: 100 * baseline[m] for m in METRICS if m in baseline}
    checked = _read(results, "published", row.name)
    if checked:  # the published weights through our evaluation: should repeat the published figure
        facts["published_checkpoint"] = {m: 100 * checked["figures"][m] for m in METRICS} | {
            "difference": checked["difference"]
        }
    return _rounded(facts)


def table_line(name: str, facts: Mapping[str, Any]) -> dict[str, str]:
    """A row's cells, by the keys of TABLE; "-" where there is nothing to say."""
    done = sum("miou" in seed for seed in facts["seeds"])
    low, high = facts["range"].get("miou", (None, None))
    difference = facts["difference"].get("miou")
    baseline = facts["baseline"]
    planned = len(facts["seeds"])
    return {
        "row": name,
        "status": facts["status"],
        "seeds": "-" if not planned else f"{done}" if done == planned else f"{done} of {planned}",
        "miou": _cell(facts["median"].get("miou")),
        "range": "-" if low is None else f"{low:.2f} to {high:.2f}",
        "published": _cell(facts["published"].get("miou")),
        "difference": "-" if difference is None else f"{difference:+.2f}",
        "pixel_accuracy": _cell(facts["median"].get("pixel_accuracy")),
        "baseline": "-" if baseline is None else f"{baseline['miou']:.2f} ({baseline['class']})",
    }


def markdown(rows: Mapping[str, Mapping[str, Any]], unknown: str = "") -> str:
    """results.md: the table, then every seed of the rows that ran."""
    lines = ["# Results", "", LEGEND, ""]
    lines += [f"| {' | '.join(title for _, title in TABLE)} |", f"|{' --- |' * len(TABLE)}"]
    for name, facts in rows.items():
        cells = table_line(name, facts)
        if facts["status"] not in ("finished", "not run"):
            cells["row"] += f" ({facts['status']})"
        if facts["status"] == "not run":
            cells["miou"] = "not run"
        lines.append(f"| {' | '.join(_escaped(cells[key]) for key, _ in TABLE)} |")
    for name, facts in rows.items():
        if checked := facts["published_checkpoint"]:
            difference = (
                "" if checked["difference"] is None else f", {checked['difference']:+.2f} from the published figure"
            )
            lines += [
                "",
                f"{name}: the published checkpoint, evaluated here, has mIoU {checked['miou']:.2f}{difference}.",
            ]
    if unknown:
        lines += ["", unknown]
    for name, facts in rows.items():
        if not facts["seeds"]:
            continue
        lines += ["", f"## {name}", "", f"| {' | '.join(SEED_TABLE)} |", f"|{' --- |' * len(SEED_TABLE)}"]
        for seed in facts["seeds"]:
            lines.append(f"| {' | '.join(map(_escaped, seed_cells(seed)))} |")
    return "\n".join(lines) + "\n"


def seed_cells(seed: Mapping[str, Any]) -> tuple[str, str, str, str, str, str]:
    """Seed, mIoU, best-on-validation mIoU, pixel accuracy, training, run key."""
    best = seed.get("best")
    if "miou" not in seed:
        outcome = seed["status"] if not seed.get("reason") else f"{seed['status']}: {seed['reason']}"
    else:
        outcome = _cell(seed["miou"])
    cost = "-"
    if seed.get("train_s"):
        cost = f"{_duration(seed['train_s'])}, {seed['workers']} worker{'s' if seed['workers'] != 1 else ''}"
        cost += f", {seed['device']}" if seed.get("device") else ""
    return (
        str(seed["seed"]),
        outcome,
        "-" if not best else f"{best['miou']:.2f} (step {best['step']})",
        _cell(seed.get("pixel_accuracy")),
        cost,
        seed["run_key"],
    )


def text_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The table for a terminal; rows without figures shrink to one line at the end."""
    lines = [table_line(name, facts) for name, facts in rows.items()]
    shown = [line for line in lines if line["status"] != "not run"]
    waiting = [line["row"] for line in lines if line["status"] == "not run"]
    text = []
    if shown:
        columns = [*TABLE, ("status", "status")]
        grid = [[title for _, title in columns], *([line[key] for key, _ in columns] for line in shown)]
        widths = [max(len(cells[i]) for cells in grid) for i in range(len(columns))]
        for cells in grid:
            aligned = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
            text.append("  ".join(aligned))
        text.insert(1, "-" * len(text[0]))
    if waiting:
        text.append(f"not run: {', '.join(waiting)}")
    return "\n".join(text)


def _duration(seconds: float) -> str:
    """42 s, 12 min, 3.4 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _seeds(evaluated: Mapping[str, Any], trained: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Every seed's figures in percent, from its evaluation, and the cost of its training."""
    trainings = {entry["run_key"]: entry for entry in trained["seeds"]} if trained else {}
    entries = evaluated["seeds"] or (trained["seeds"] if trained else [])
    decides = evaluated["decides"]
    seeds = []
    for entry in entries:
        seed = {key: entry.get(key) for key in ("seed", "run_key", "status", "reason", "mlflow_run_id")}
        if evaluated["seeds"] and entry["status"] == "finished":
            figures = entry["checkpoints"][decides]
            seed |= {name: 100 * figures[name] for name in METRICS}
            seed["step"] = figures["step"]
            seed["best"] = {name: 100 * entry["checkpoints"]["best"][name] for name in METRICS}
            seed["best"]["step"] = entry["checkpoints"]["best"]["step"]
            seed["per_class"] = {c: None if iou is None else 100 * iou for c, iou in figures["per_class"].items()}
        training = trainings.get(entry["run_key"], {})
        seed |= {key: training.get(key) for key in ("train_s", "workers", "images_per_s")}
        seed["device"] = (training.get("environment") or {}).get("device")
        seeds.append(seed)
    return seeds


def _status(
    row: Row, seeds: Sequence[Mapping[str, Any]], evaluated: Mapping[str, Any] | None, trained: Mapping[str, Any] | None
) -> str:
    if not evaluated:
        return "trained" if trained else "not run"
    if trained and [s["run_key"] for s in trained["seeds"]] != [s["run_key"] for s in seeds]:
        return "out of date"
    if any("miou" not in seed for seed in seeds) or {seed["seed"] for seed in seeds} != set(row.seeds):
        return "incomplete"
    return "finished"


def _details(row: Row, results: Path) -> dict[str, Any]:
    """What only the page shows: curves, overlays and where the numbers came from."""
    evaluated, trained = _read(results, "evaluate", row.name), _read(results, "train", row.name)
    manifest, weights = _read(results, "shard", row.dataset), _read(results, "weights", row.weights)
    root = storage_root()
    trainings = trained["seeds"] if trained else []
    return {
        "curves": {
            entry["seed"]: read_curve(root / entry["run_dir"] / "curve.jsonl")
            for entry in trainings
            if entry.get("run_dir")
        },
        "overlays": [root / path for path in (evaluated or {}).get("overlays", ()) if (root / path).is_file()],
        "data_digest": (manifest or {}).get("digest"),
        "weights": f"{row.weights} {weights['sha256']}" if weights and weights.get("sha256") else row.weights,
        "trainings": trainings,
    }


def _read(results: Path, stage: str, name: str) -> Any:
    """results/<stage>/<name>.json, or None where the stage has not run."""
    path = results / stage / f"{name}.json"
    return read_json(path, made_by=f"dvc repro -f {stage}@{name}") if path.exists() else None


def _rounded(value: Any) -> Any:
    """Every float with the tables' two decimals."""
    if isinstance(value, Mapping):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return round(value, 2) if isinstance(value, float) else value


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")


def _cell(percent: float | None) -> str:
    return "-" if percent is None else f"{percent:.2f}"
