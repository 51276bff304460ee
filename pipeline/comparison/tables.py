"""The cells of every table of the report, as text; results.md, the terminal and the page show the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.comparison.rows import (
    CHECKPOINTS,
    Facts,
    SeedFacts,
    short_device,
)
from pipeline.params.tasks import FIGURES, LABELS, MS_FLIP, primary
from pipeline.storage.progress import duration

TITLES: Mapping[str, str] = {
    "semantic": "Semantic segmentation",
    "panoptic": "Panoptic segmentation",
    "instance": "Instance segmentation",
}
"""Heading of each task's table, in their order."""


@dataclass(frozen=True)
class Cell:
    """What stands at one place of a table."""

    text: str
    note: str = ""
    """Said in small print: the device, the unit."""
    apart: bool = False
    """Not comparable with the published figure beside it; marked."""

    def __str__(self) -> str:
        return f"{self.text} {self.note}".strip() + (" *" if self.apart else "")


NOTHING = Cell("-")


@dataclass(frozen=True)
class Column:
    """A column of a task's table."""

    key: str
    """`row`, `verdict`, `seeds`, `range`, `memory`, `published memory`, `fps`, `published fps`, `precision`,
    `training`, or a figure with who has it: "miou", "published miou", "difference miou", "authors miou"."""
    heading: str
    group: str = ""
    """Heading above the headings of neighbours that belong together."""

    alone: str = ""
    """Heading where there is no line for groups; default: `heading`."""

    @property
    def full(self) -> str:
        """The heading that says everything."""
        return self.alone or self.heading


def _columns(task: str) -> tuple[Column, ...]:
    def figure(name: str, *whose: str) -> list[Column]:
        label, first = LABELS[name], name == primary(task)
        headings = {"": "median", "authors": "authors'"}
        alone = {"": label, "published": "" if first else f"{label} published", "authors": f"{label} authors'"}
        alone["difference"] = "" if first else f"{label} difference"
        return [Column(f"{who} {name}".strip(), headings.get(who, who), label, alone[who]) for who in whose]

    own, *others = figure(primary(task), "", "published", "difference", "authors")
    columns = [Column("row", "Row"), Column("verdict", "Verdict"), own, Column("range", "range", own.group)]
    columns += [Column("seeds", "seeds", own.group), *others]
    if task == "semantic":
        columns += figure(MS_FLIP, "", "authors")
    elif task == "panoptic":
        columns += [*figure("ap", "", "published", "difference", "authors"), *figure("miou", "", "authors")]
    else:
        columns += figure("ap50", "", "authors")
    for key, title in (("memory", "memory, GiB"), ("fps", "images/s")):
        columns += [Column(key, "ours", title, title)]
        columns += [Column(f"published {key}", "published", title, f"{title}, published")]
    return (*columns, Column("precision", "Precision"), Column("training", "Training of a seed", "", "training"))


COLUMNS: Mapping[str, tuple[Column, ...]] = {task: _columns(task) for task in TITLES}
"""By task, the columns of its table."""

_DESCRIBED: Mapping[str, tuple[str, ...]] = {
    "semantic": ("miou", MS_FLIP, "mean_accuracy", "pixel_accuracy"),
    "panoptic": ("pq", "sq", "rq", "pq_things", "pq_stuff", "ap", "miou"),
    "instance": FIGURES["instance"],
}
"""By task, the figures that a row is described by, the primary one first."""

_STATUSES = ("finished", "incomplete", "out of date", "trained", "not run")
"""In the order in which rows are shown."""


def by_task(rows: Mapping[str, Facts]) -> dict[str, dict[str, Facts]]:
    """The rows of every task that has any, in the order of TITLES, finished rows first."""
    ordered = finished_first(rows)
    grouped = {task: {name: facts for name, facts in ordered.items() if facts.task == task} for task in TITLES}
    return {task: of_task for task, of_task in grouped.items() if of_task}


def finished_first(rows: Mapping[str, Facts]) -> dict[str, Facts]:
    """The rows, the finished ones first and those that have not been run last, otherwise in the same order."""
    return dict(sorted(rows.items(), key=lambda row: _STATUSES.index(row[1].status)))


def split(rows: Mapping[str, Facts]) -> tuple[dict[str, Facts], dict[str, Facts]]:
    """The rows that ran, and those that have not been run."""
    idle = {name: facts for name, facts in rows.items() if facts.status == "not run"}
    return {name: facts for name, facts in rows.items() if name not in idle}, idle


def table_line(name: str, facts: Facts) -> dict[str, Cell]:
    """A row's cells, by the keys of its task's COLUMNS; "-" where there is nothing to say."""
    done, planned = evaluated_seeds(facts), facts.planned_seeds
    verdict = facts.verdict.decision
    status = "" if facts.status in ("finished", verdict) else facts.status
    cells = {
        "row": Cell(name),
        "verdict": Cell(verdict, f"({status})" if status else ""),
        "seeds": NOTHING if not facts.seeds else Cell(f"{done}" if done == planned else f"{done} of {planned}"),
        "range": Cell(span(facts, facts.primary)),
        **_memory_cells(facts),
        **_speed_cells(facts),
        "precision": Cell(facts.precision or NOTHING.text),
        "training": _training_cell(facts),
    }
    shown: Mapping[str, Mapping[str, Any]] = {
        "": facts.median,
        "published": facts.published,
        "authors": facts.published_authors,
        "difference": facts.difference,
    }
    for column in COLUMNS[facts.task]:
        if column.key not in cells:
            whose, _, figure = column.key.rpartition(" ")
            value = shown[whose].get(figure)
            cells[column.key] = Cell(signed(value) if whose == "difference" else figure_text(value))
    return cells


def used_columns(rows: Mapping[str, Facts], task: str) -> list[Column]:
    """The columns that any of a task's rows has something for."""
    always = ("row", "verdict", primary(task))
    return [column for column in COLUMNS[task] if column.key in always or _says(column, rows)]


def published_columns(rows: Mapping[str, Facts], task: str) -> list[Column]:
    """The columns of rows that have not been run: their names, and what is published of any of them."""
    shown = [column for column in COLUMNS[task] if column.key != "verdict"]
    return [column for column in shown if column.key == "row" or _says(column, rows)]


def _says(column: Column, rows: Mapping[str, Facts]) -> bool:
    if column.key == "ap50" and not any("ap50" in facts.published_authors for facts in rows.values()):
        return False  # it stands beside the authors' alone
    return any(table_line(name, facts)[column.key] != NOTHING for name, facts in rows.items())


def _memory_cells(facts: Facts) -> dict[str, Cell]:
    ours, published = facts.memory, facts.published
    printed = published.get("train_mem_gib") or published.get("train_mem_gb_as_printed")
    cells = {"memory": NOTHING, "published memory": Cell(f"{printed}") if printed else NOTHING}
    if ours:
        apart = bool(printed) and not ours.comparable
        note = f"{ours.pictures:g} images" if apart else ours.device
        cells["memory"] = Cell(f"{ours.gib:.2f}", note, apart)
    return cells


def _speed_cells(facts: Facts) -> dict[str, Cell]:
    ours, published = facts.speed, facts.published
    fps = published.get("inf_fps")
    cells = {"fps": NOTHING, "published fps": Cell(f"{fps}", published.get("device", "")) if fps else NOTHING}
    if ours:
        cells["fps"] = Cell(rate(ours.fps), ours.device, bool(fps) and not ours.comparable)
    return cells


def _training_cell(facts: Facts) -> Cell:
    cost = facts.cost
    if not cost:
        return NOTHING
    return Cell(duration(cost.seconds) if cost.gpu_hours is None else gpu_hours(cost.gpu_hours), cost.device)


def span(facts: Facts, figure: str) -> str:
    """The lowest and the highest seed's figure; "-" where it is of a single seed, or not known."""
    limits = facts.range.get(figure)
    return "-" if limits is None or evaluated_seeds(facts) < 2 else f"{limits[0]:.2f} to {limits[1]:.2f}"


def evaluated_seeds(facts: Facts) -> int:
    """Seeds that have figures."""
    return sum(bool(seed.checkpoints) for seed in facts.seeds)


def figure_names(facts: Facts) -> tuple[str, ...]:
    """The figures that a row is described by, the primary one first."""
    return _DESCRIBED[facts.task]


def seed_columns(facts: Facts) -> list[str]:
    """Headings of a row's seeds; one of the two checkpoints is the one the row's other figures are of."""
    label = LABELS[facts.primary]
    both = [
        f"{label}, {called}" + (" (in the table)" if which == facts.decides else "")
        for which, called in CHECKPOINTS.items()
    ]
    return ["Seed", *both, *(LABELS[figure] for figure in figure_names(facts)[1:]), "training", "run key"]


def seed_cells(seed: SeedFacts, facts: Facts) -> list[str]:
    """A seed's cells under `seed_columns`: why it has no figures, where it has none."""
    first = facts.primary
    if seed.checkpoints:
        last = figure_text(seed.checkpoints["last"].figures[first])
        best = f"{figure_text(seed.checkpoints['best'].figures[first])} (step {seed.checkpoints['best'].step:,})"
    else:
        last, best = seed.status if not seed.reason else f"{seed.status}: {seed.reason}", "-"
    others = [figure_text(seed.figures.get(figure)) for figure in figure_names(facts)[1:]]
    key = seed.run_key + (" (reused)" if seed.reused else "")
    return [str(seed.seed), last, best, *others, training_time(seed), key]


def training_time(seed: SeedFacts) -> str:
    """What a seed's training took, and on what."""
    if seed.train_s is None:
        return "-"
    workers = f"{seed.workers} x " if (seed.workers or 1) > 1 else ""
    where = f" on {workers}{short_device(seed.device, gpu=seed.gpu)}" if seed.device else ""
    if seed.gpu_hours is None:
        return f"{duration(seed.train_s)}{where}"
    return f"{duration(seed.train_s)}{where}, {gpu_hours(seed.gpu_hours)}"


def rate(per_second: float) -> str:
    """9.54, 0.012: two decimals, or as many as a slow device needs."""
    return f"{per_second:.2f}" if per_second >= 0.1 else f"{per_second:.2g}"


def gpu_hours(hours: float) -> str:
    """7.4 GPU-h, 254 GPU-h."""
    return f"{hours:.1f} GPU-h" if hours < 100 else f"{hours:,.0f} GPU-h"


def figure_text(value: float | None) -> str:
    """A figure of a table; "-": there is none."""
    return "-" if value is None else f"{value:.2f}"


def signed(points: float | None) -> str:
    """A difference in percent points; "-": there is none."""
    return "-" if points is None else f"{round(points, 2) + 0.0:+.2f}"
