"""The report: every row of params.yaml beside its published figures, from what exists in results/.

One table per task. Nothing is computed here but medians, ranges and differences. Figures are fractions in results/ and
percent here, with two decimals.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.files import read_json, write_json, write_text
from pipeline.params import Params, Row
from pipeline.report_page import Section, Table, page
from pipeline.storage import storage_root
from pipeline.tasks import FIGURES, LABELS, MS_FLIP, primary
from pipeline.tracking import read_curve

TITLES: Mapping[str, str] = {
    "semantic": "Semantic segmentation",
    "panoptic": "Panoptic segmentation",
    "instance": "Instance segmentation",
}
"""Heading of each task's table, in their order."""

_BESIDE: Mapping[str, tuple[str, ...]] = {
    "semantic": ("authors miou", MS_FLIP, f"authors {MS_FLIP}", "pixel_accuracy", "baseline"),
    "panoptic": ("authors pq", "sq", "rq", "pq_things", "pq_stuff", "ap", "published ap", "difference ap", "miou"),
    "instance": ("authors ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
}
"""What a task's table shows beside its primary figure: ours, or "published", "difference" or "authors" of a figure."""


def _columns(task: str) -> tuple[tuple[str, str], ...]:
    first = primary(task)
    headings = {"row": "Row", "seeds": "Seeds", "range": "range", "baseline": "commonest class"}
    headings |= {f"published {first}": "published", f"difference {first}": "difference"}
    keys = ("row", "seeds", first, "range", f"published {first}", f"difference {first}", *_BESIDE[task])

    def heading(key: str) -> str:
        kind, _, figure = key.rpartition(" ")
        whose = "authors'" if kind == "authors" else kind
        return headings.get(key) or f"{whose} {LABELS[figure]}".lstrip()

    return tuple((key, heading(key)) for key in keys)


TABLES: Mapping[str, tuple[tuple[str, str], ...]] = {task: _columns(task) for task in TITLES}
"""By task, the columns of its table: key of `table_line`, heading."""

LEGEND = (
    "Figures are percent on the validation pictures, single scale: the median over the seeds, and their lowest and "
    'highest. "Difference" is ours less the published figure. The original authors\' figures are shown beside and not '
    "judged against. Where it is not known which checkpoint a published figure is of, both the last and the best on "
    "validation are shown for each seed, and the last is compared."
)

LEGENDS: Mapping[str, str] = {
    "semantic": (
        "ms+flip averages the scores of several sizes, each also mirrored. "
        '"Commonest class" is the mIoU of predicting that class everywhere.'
    ),
    "panoptic": "AP is of the masks of things and mIoU of the classes, both by the network that PQ is of.",
    "instance": (
        "AP is of masks, averaged over IoU thresholds from 0.50 to 0.95; "
        "small, medium and large objects part at 32 x 32 and 96 x 96 pixels."
    ),
}
"""By task, what its table's columns mean."""

CHECKPOINTS: Mapping[str, str] = {"last": "last", "best": "best on validation"}
"""The two checkpoints of a seed, and their names in headings."""


def write_report(params: Params, *, results: Path = Path("results"), out: Path = Path("reports")) -> str:
    """Write results.json, results.md and index.html into `out`; returns the tables as text for a terminal.

    ValueError when a result file is torn, of another version's layout, or of another task than its row.
    """
    rows = {name: row_facts(row, results) for name, row in params.rows.items()}
    gone = sorted({path.stem for path in (results / "evaluate").glob("*.json")} - set(rows))
    unknown = f"Not shown, because params.yaml has no such row any more: {', '.join(gone)}." if gone else ""
    write_json(out / "results.json", {"rows": rows})
    write_text(out / "results.md", markdown(rows, unknown))
    tables = [
        Table(
            title=TITLES[task],
            columns=TABLES[task],
            notes=[LEGENDS[task], *checkpoint_notes(of_task)],
            published=[sentence for name, facts in of_task.items() if (sentence := published_sentence(name, facts))],
            sections=[
                Section(
                    name=name,
                    facts=facts,
                    line=table_line(name, facts),
                    seed_columns=seed_columns(facts),
                    seeds=[seed_cells(seed, facts) for seed in facts["seeds"]],
                    **_details(params.rows[name], results),
                )
                for name, facts in of_task.items()
            ],
        )
        for task, of_task in by_task(rows).items()
    ]
    write_text(out / "index.html", page(tables, notes=[LEGEND, unknown]))
    return text_table(rows)


def by_task(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """The rows of every task that has any, in the order of TITLES."""
    grouped = {task: {name: facts for name, facts in rows.items() if facts["task"] == task} for task in TITLES}
    return {task: of_task for task, of_task in grouped.items() if of_task}


def row_facts(row: Row, results: Path) -> dict[str, Any]:
    """One row of results.json.

    `status`: "not run"; "trained" (not evaluated yet); "out of date" (the figures belong to an earlier training);
    "incomplete" (a seed failed, diverged or has no result); "finished". A figure that is None in any evaluated seed
    has no median and no range.
    """
    evaluated = _read(results, "evaluate", row.name, row.task)
    trained = _read(results, "train", row.name, row.task)
    decides = evaluated["decides"] if evaluated else "best" if row.checkpoint_rule == "best" else "last"
    seeds = _seeds(evaluated, trained, row.task, decides)
    done = [seed for seed in seeds if "step" in seed]
    figures = {
        name: None if any(seed.get(name) is None for seed in done) else [float(seed[name]) for seed in done]
        for name in _names(row.task)
        if any(name in seed for seed in done)
    }
    median = {name: None if values is None else statistics.median(values) for name, values in figures.items()}
    published = dict(row.published)
    facts: dict[str, Any] = {
        "dataset": row.dataset,
        "task": row.task,
        "primary": primary(row.task),
        "checkpoint_rule": evaluated["checkpoint_rule"] if evaluated else row.checkpoint_rule,
        "decides": decides,
        "status": _status(row, seeds, evaluated, trained),
        "seeds": seeds,
        "median": median,
        "range": {name: None if values is None else [min(values), max(values)] for name, values in figures.items()},
        "published": published,
        "published_authors": dict(row.published_authors),
        "difference": {
            name: value - published[name] for name, value in median.items() if value is not None and name in published
        },
        "baseline": None,
        "published_checkpoint": None,
    }
    if evaluated and evaluated["baseline"]:
        baseline = evaluated["baseline"]
        facts["baseline"] = {"class": baseline["class"]} | _percent(baseline, row.task)
    checked = _read(results, "published", row.name, row.task)
    if checked:  # the published weights through our evaluation: should repeat the published figures
        other = checked["other_padding"]
        facts["published_checkpoint"] = _padded(checked, row.task) | {
            "other_padding": _padded(other, row.task) if other else None,
            "agrees": checked["agrees"],
        }
    rounded: dict[str, Any] = _rounded(facts)
    return rounded


def table_line(name: str, facts: Mapping[str, Any]) -> dict[str, str]:
    """A row's cells, by the keys of its task's TABLES, and its status; "-" where there is nothing to say."""
    first = facts["primary"]
    done = sum("step" in seed for seed in facts["seeds"])
    planned = len(facts["seeds"])
    low, high = facts["range"].get(first) or (None, None)
    baseline = facts["baseline"]
    cells = {
        "row": name,
        "status": facts["status"],
        "seeds": "-" if not planned else f"{done}" if done == planned else f"{done} of {planned}",
        "range": "-" if low is None else f"{low:.2f} to {high:.2f}",
        "baseline": f"{baseline[first]:.2f} ({baseline['class']})" if baseline and first in baseline else "-",
    }
    shown = {"": "median", "published": "published", "authors": "published_authors", "difference": "difference"}
    for key, _ in TABLES[facts["task"]]:
        if key not in cells:
            kind, _, figure = key.rpartition(" ")
            value = facts[shown[kind]].get(figure)
            cells[key] = _signed(value) if kind == "difference" else _cell(value)
    return cells


def checkpoint_notes(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Published rows of which it is known which checkpoint their figures are of."""
    published = {name: facts["checkpoint_rule"] for name, facts in rows.items() if facts["published"]}
    named = {rule: [name for name, its_rule in published.items() if its_rule == rule] for rule in CHECKPOINTS}
    return [
        f"The checkpoint whose figures are published, and compared, is the {CHECKPOINTS[rule]}: {', '.join(names)}."
        for rule, names in named.items()
        if names
    ]


def published_sentence(name: str, facts: Mapping[str, Any]) -> str:
    """What the published checkpoint scores here, and under which padding it agrees better; empty: not evaluated."""
    checked = facts["published_checkpoint"]
    if not checked:
        return ""

    def told(figure: str, of: Mapping[str, Any], words: str = "") -> str:
        difference = of["difference"].get(figure)
        return _cell(of.get(figure)) + ("" if difference is None else f" ({_signed(difference)}{words})")

    figures = [key for key, _ in TABLES[facts["task"]] if checked.get(key) is not None]
    words = " from the published figure"
    listed = ", ".join(
        f"{LABELS[figure]} {told(figure, checked, words if figure == facts['primary'] else '')}" for figure in figures
    )
    text = f"{name}: the published checkpoint, evaluated here, has {listed}."
    if other := checked["other_padding"]:
        first, both = facts["primary"], sorted((checked, other), key=lambda of: of["pad_multiple"])
        compared = " and ".join(f"{told(first, of)} {_padding(of['pad_multiple'])}" for of in both)
        text += f" {LABELS[first]} is {compared}"
        text += "." if checked["agrees"] is None else f": {_padding(checked['agrees'])} agrees better."
    return text


def _padding(multiple: int) -> str:
    return "without padding" if multiple == 1 else f"padded to multiples of {multiple}"


def markdown(rows: Mapping[str, Mapping[str, Any]], unknown: str = "") -> str:
    """results.md: a table per task with its published checkpoints, then every seed of the rows that ran."""
    lines = ["# Results", "", LEGEND]
    if unknown:
        lines += ["", unknown]
    for task, of_task in by_task(rows).items():
        lines += ["", f"## {TITLES[task]}", "", " ".join([LEGENDS[task], *checkpoint_notes(of_task)]), ""]
        grid = []
        for name, facts in of_task.items():
            cells = table_line(name, facts)
            if facts["status"] not in ("finished", "not run"):
                cells["row"] += f" ({facts['status']})"
            if facts["status"] == "not run":
                cells[facts["primary"]] = "not run"
            grid.append([cells[key] for key, _ in TABLES[task]])
        lines += _markdown_table([title for _, title in TABLES[task]], grid)
        for name, facts in of_task.items():
            if sentence := published_sentence(name, facts):
                lines += ["", sentence]
    if any(facts["seeds"] for facts in rows.values()):
        lines += ["", "## Seeds"]
    for name, facts in rows.items():
        if facts["seeds"]:
            lines += ["", f"### {name}", ""]
            lines += _markdown_table(seed_columns(facts), [seed_cells(seed, facts) for seed in facts["seeds"]])
    return "\n".join(lines) + "\n"


def _markdown_table(headings: Sequence[str], grid: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(headings)} |", f"|{' --- |' * len(headings)}"]
    return lines + [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in grid]


def seed_columns(facts: Mapping[str, Any]) -> list[str]:
    """Headings of a row's seeds; one of the two checkpoints is the one the row's other figures are of."""
    label = LABELS[facts["primary"]]
    both = [
        f"{label}, {called}" + (" (in the table)" if kind == facts["decides"] else "")
        for kind, called in CHECKPOINTS.items()
    ]
    return ["Seed", *both, *(LABELS[figure] for figure in _beside(facts["task"])), "training", "run key"]


def seed_cells(seed: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """A seed's cells under `seed_columns`: why it has no figures, where it has none."""
    first = facts["primary"]
    if "step" in seed:
        last, best = (
            _cell(seed[kind][first]) + (f" (step {seed[kind]['step']})" if kind == "best" else "")
            for kind in CHECKPOINTS
        )
    else:
        last, best = seed["status"] if not seed.get("reason") else f"{seed['status']}: {seed['reason']}", "-"
    cost = "-"
    if seed.get("train_s"):
        cost = f"{_duration(seed['train_s'])}, {seed['workers']} worker{'s' if seed['workers'] != 1 else ''}"
        cost += f", {seed['device']}" if seed.get("device") else ""
    others = [_cell(seed.get(figure)) for figure in _beside(facts["task"])]
    return [str(seed["seed"]), last, best, *others, cost, seed["run_key"]]


def text_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The tables for a terminal, without columns that say nothing; rows without figures share a line at the end."""
    text: list[str] = []
    for task, of_task in by_task(rows).items():
        shown = [table_line(name, facts) for name, facts in of_task.items() if facts["status"] != "not run"]
        if not shown:
            continue
        columns = [*TABLES[task], ("status", "status")]
        columns = [(key, title) for key, title in columns if any(line[key] != "-" for line in shown)]
        grid = [[title for _, title in columns], *([line[key] for key, _ in columns] for line in shown)]
        widths = [max(len(cells[i]) for cells in grid) for i in range(len(columns))]
        lines = [
            "  ".join([cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))])
            for cells in grid
        ]
        text += ["", TITLES[task], lines[0], "-" * len(lines[0]), *lines[1:]]
    waiting = [name for name, facts in rows.items() if facts["status"] == "not run"]
    if waiting:
        text += ["", f"not run: {', '.join(waiting)}"]
    return "\n".join(text[1:])


def _names(task: str) -> tuple[str, ...]:
    """Figures a checkpoint may have."""
    return (*FIGURES[task], MS_FLIP)


def _beside(task: str) -> list[str]:
    """Our figures in the task's table but the primary one."""
    return [key for key in _BESIDE[task] if key in _names(task)]


def _percent(figures: Mapping[str, Any], task: str) -> dict[str, float | None]:
    return {name: None if figures[name] is None else 100 * figures[name] for name in _names(task) if name in figures}


def _padded(checked: Mapping[str, Any], task: str) -> dict[str, Any]:
    """A published checkpoint's figures under one padding."""
    return _percent(checked["figures"], task) | {key: checked[key] for key in ("difference", "pad_multiple")}


def _duration(seconds: float) -> str:
    """42 s, 12 min, 3.4 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _seeds(
    evaluated: Mapping[str, Any] | None, trained: Mapping[str, Any] | None, task: str, decides: str
) -> list[dict[str, Any]]:
    """Every seed's figures in percent, from its evaluation, and the cost of its training.

    An evaluated seed has `step`, the figures and `per_class` of the checkpoint that decides, and both checkpoints'
    under `last` and `best`.
    """
    trainings = {entry["run_key"]: entry for entry in trained["seeds"]} if trained else {}
    entries = (evaluated["seeds"] if evaluated else []) or (trained["seeds"] if trained else [])
    seeds = []
    for entry in entries:
        seed = {key: entry.get(key) for key in ("seed", "run_key", "status", "reason", "mlflow_run_id")}
        if evaluated and evaluated["seeds"] and entry["status"] == "finished":
            for kind in CHECKPOINTS:
                checkpoint = entry["checkpoints"][kind]
                seed[kind] = {"step": checkpoint["step"], **_percent(checkpoint, task)}
            seed |= seed[decides]
            seed["per_class"] = {
                metric: {name: None if value is None else 100 * value for name, value in values.items()}
                for metric, values in entry["checkpoints"][decides]["per_class"].items()
            }
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
    if any("step" not in seed for seed in seeds) or {seed["seed"] for seed in seeds} != set(row.seeds):
        return "incomplete"
    return "finished"


def _details(row: Row, results: Path) -> dict[str, Any]:
    """What only the page shows: curves, overlays and where the numbers came from."""
    evaluated, trained = (_read(results, stage, row.name, row.task) for stage in ("evaluate", "train"))
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


def _read(results: Path, stage: str, name: str, task: str = "") -> Any:
    """results/<stage>/<name>.json, or None where the stage has not run.

    ValueError with the command that makes it again when it is torn, of another layout or not of `task`.
    """
    path = results / stage / f"{name}.json"
    if not path.exists():
        return None
    made_by = f"dvc repro -f {stage}@{name}"
    content = read_json(path, made_by=made_by)
    for part, keys in _parts(stage, content, task):
        for key in keys:
            if not isinstance(part, Mapping) or key not in part:
                raise ValueError(
                    f"{path} has no {key!r}: another version of the stage wrote it; make it again with: {made_by}"
                )
        if part is content and part.get("task", task) != task:
            raise ValueError(
                f"{path} is of the task {part['task']}, but row {name} is {task} now; make it again with: {made_by}"
            )
    return content


def _parts(stage: str, content: Any, task: str) -> Iterator[tuple[Any, Iterable[str]]]:
    """The parts of a stage's result that the report reads, with the keys each must have; later parts lie in earlier."""
    if stage == "evaluate":
        yield content, ("task", "checkpoint_rule", "decides", "seeds", "baseline", "overlays")
        for seed in content["seeds"]:
            yield seed, ("seed", "run_key", "status", *(["checkpoints"] if seed.get("status") == "finished" else []))
            for kind in CHECKPOINTS if seed["status"] == "finished" else ():
                yield seed["checkpoints"], [kind]
                yield seed["checkpoints"][kind], ("step", "per_class", *FIGURES[task])
    elif stage == "train":
        yield content, ["seeds"]
        for seed in content["seeds"]:
            yield seed, ("seed", "run_key", "status")
    elif stage == "published":
        yield content, ("task", "figures", "difference", "pad_multiple", "other_padding", "agrees")
        yield content["figures"], FIGURES[task]
        if content["other_padding"]:
            yield content["other_padding"], ("pad_multiple", "figures", "difference")
            yield content["other_padding"]["figures"], [primary(task)]


def _rounded(value: Any) -> Any:
    """Every float with the tables' two decimals."""
    if isinstance(value, Mapping):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return round(value, 2) + 0.0 if isinstance(value, float) else value  # -0.0 + 0.0 is 0.0


def _cell(percent: float | None) -> str:
    return "-" if percent is None else f"{percent:.2f}"


def _signed(points: float | None) -> str:
    return "-" if points is None else f"{round(points, 2) + 0.0:+.2f}"
