"""The report as text: the cells of every table, results.md and the terminal's tables. The page shows the same cells."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.params.tasks import FIGURES, LABELS, MS_FLIP, primary
from pipeline.report.rows import (
    CHECKPOINTS,
    ENDED_BADLY,
    Facts,
    PaddedFacts,
    SeedFacts,
    counts,
    published_rows,
    short_device,
)

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
    """`row`, `verdict`, `seeds`, `range`, `memory`, `published memory`, `fps`, `published fps`, `training`, or a figure
    with who has it: "miou", "published miou", "difference miou", "authors miou"."""
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
        columns += [*figure("ap", "", "published", "difference"), *figure("miou", "", "authors")]
    for key, title in (("memory", "memory, GiB"), ("fps", "pictures/s")):
        columns += [Column(key, "ours", title, title)]
        columns += [Column(f"published {key}", "published", title, f"{title}, published")]
    return (*columns, Column("training", "Training of a seed", "", "training"))


COLUMNS: Mapping[str, tuple[Column, ...]] = {task: _columns(task) for task in TITLES}
"""By task, the columns of its table."""

LEGEND = (
    "Figures are percent on the validation pictures, single scale: the median over the seeds, and their lowest and "
    'highest. "Difference" is our median less the published figure. The original authors\' figures are of another '
    "recipe: shown beside and not judged against. Where it is not known which checkpoint a published figure is of, "
    "both the last and the best on validation are shown for each seed, and the last is compared. Memory is the most a "
    "GPU took in training; pictures/s is inference, one picture at a time. What is marked * was measured on another "
    "device, or with another number of pictures on a GPU, than the published figure beside it: do not compare the two."
)

HOW_TO_READ = (
    "A row's seeds say where a figure such as the published one is to be expected. All of that within the margin "
    "around the published figure: the row is reproduced. Otherwise all of it on one side: above or below. Otherwise: "
    "undecided. Margin and coverage were fixed beforehand (verdict in params.yaml); docs/verdicts.md has the rule and "
    "how often it errs. A row of which nothing is published under the same recipe has no verdict."
)

_MEMORY_AS_PRINTED = "The published memory is in GB as printed."

LEGENDS: Mapping[str, str] = {
    "semantic": "ms+flip averages the scores of several sizes, each also mirrored.",
    "panoptic": (
        f"AP is of the masks of things and mIoU of the classes, both by the network that PQ is of. {_MEMORY_AS_PRINTED}"
    ),
    "instance": f"AP is of masks, averaged over IoU thresholds from 0.50 to 0.95. {_MEMORY_AS_PRINTED}",
}
"""By task, what its table's columns mean."""


_DESCRIBED: Mapping[str, tuple[str, ...]] = {
    "semantic": ("miou", MS_FLIP, "mean_accuracy", "pixel_accuracy"),
    "panoptic": ("pq", "sq", "rq", "pq_things", "pq_stuff", "ap", "miou"),
    "instance": FIGURES["instance"],
}
"""By task, the figures that a row is described by, the primary one first."""


def by_task(rows: Mapping[str, Facts]) -> dict[str, dict[str, Facts]]:
    """The rows of every task that has any, in the order of TITLES."""
    grouped = {task: {name: facts for name, facts in rows.items() if facts.task == task} for task in TITLES}
    return {task: of_task for task, of_task in grouped.items() if of_task}


def table_line(name: str, facts: Facts) -> dict[str, Cell]:
    """A row's cells, by the keys of its task's COLUMNS; "-" where there is nothing to say."""
    done, planned = evaluated_seeds(facts), facts.planned_seeds
    verdict = facts.verdict.kind
    status = "" if facts.status in ("finished", verdict) else facts.status
    cells = {
        "row": Cell(name),
        "verdict": Cell(verdict, f"({status})" if status else ""),
        "seeds": NOTHING if not facts.seeds else Cell(f"{done}" if done == planned else f"{done} of {planned}"),
        "range": Cell(span(facts, facts.primary)),
        **_memory_cells(facts),
        **_speed_cells(facts),
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
            cells[column.key] = Cell(signed(value) if whose == "difference" else percent(value))
    return cells


def used_columns(rows: Mapping[str, Facts], task: str) -> list[Column]:
    """The columns that any of a task's rows has something for."""
    lines = [table_line(name, facts) for name, facts in rows.items()]
    always = ("row", "verdict", primary(task))
    return [
        column for column in COLUMNS[task] if column.key in always or any(line[column.key] != NOTHING for line in lines)
    ]


def _memory_cells(facts: Facts) -> dict[str, Cell]:
    ours, published = facts.memory, facts.published
    printed = published.get("train_mem_gib") or published.get("train_mem_gb_as_printed")
    cells = {"memory": NOTHING, "published memory": Cell(f"{printed}") if printed else NOTHING}
    if ours:
        apart = bool(printed) and not ours.comparable
        note = f"{ours.pictures:g} pictures" if apart else ours.device
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


def summary(rows: Mapping[str, Facts]) -> str:
    """How the published rows stand, in one sentence; empty where there are none."""
    of_kind = {kind: count for kind, count in counts(rows).items() if count}
    total = sum(of_kind.values())
    if not total:
        return ""
    listed = ", ".join(f"{count} {kind}" for kind, count in of_kind.items())
    return f"Of {total} published rows: {listed}."


def attention(rows: Mapping[str, Facts]) -> list[tuple[str, str]]:
    """(row, sentence) for what is not as it should be: failed seeds, warnings, figures that are out of date."""
    sentences = []
    for name, facts in rows.items():
        for seed in facts.seeds:
            if seed.status in ENDED_BADLY:
                sentences.append((name, f"seed {seed.seed} {seed.status}: {seed.reason or 'no reason given'}"))
            else:
                sentences += [(name, warning) for warning in behind(seed, facts)[-1:]]
        if facts.status == "out of date":
            sentences.append((name, f"the figures belong to an earlier training; dvc repro evaluate@{name}"))
        elif facts.status == "trained":
            sentences.append((name, f"trained, but not evaluated; dvc repro evaluate@{name}"))
        elif facts.status == "incomplete" and len(facts.seeds) < facts.planned_seeds:
            missing = facts.planned_seeds - len(facts.seeds)
            seeds = "a seed has" if missing == 1 else f"{missing} seeds have"
            sentences.append((name, f"{seeds} no result yet; dvc repro evaluate@{name}"))
    return sentences


def behind(seed: SeedFacts, facts: Facts) -> list[str]:
    """Sentences of a seed's early warnings."""
    label = LABELS[facts.primary]
    against = {"published": "the published curve", "sisters": "the other seeds"}
    return [
        f"seed {seed.seed} was clearly behind {against[point.reference]} at step {point.step:,}: "
        f"{label} {point.value:.2f}, where {point.expected:.2f} was expected"
        for point in seed.behind
    ]


def checkpoint_notes(rows: Mapping[str, Facts]) -> list[str]:
    """Published rows of which it is known which checkpoint their figures are of."""
    published = {name: facts.checkpoint_rule for name, facts in rows.items() if facts.published}
    named = {rule: [name for name, its_rule in published.items() if its_rule == rule] for rule in CHECKPOINTS}
    return [
        f"The checkpoint whose figures are published, and compared, is the {CHECKPOINTS[rule]}: {', '.join(names)}."
        for rule, names in named.items()
        if names
    ]


def published_sentence(name: str, facts: Facts) -> str:
    """What the published checkpoint scores here, and under which padding it agrees better; empty: not evaluated."""
    checked = facts.published_checkpoint
    if not checked:
        return ""

    def told(figure: str, of: PaddedFacts, words: str = "") -> str:
        difference = of.difference.get(figure)
        return percent(of.figures.get(figure)) + ("" if difference is None else f" ({signed(difference)}{words})")

    first, words, ours = facts.primary, " from the published figure", checked.evaluated
    figures = [figure for figure in figure_names(facts) if ours.figures.get(figure) is not None]
    listed = ", ".join(f"{LABELS[figure]} {told(figure, ours, words if figure == first else '')}" for figure in figures)
    text = f"{name}: the published checkpoint, evaluated here, has {listed}."
    if other := checked.other_padding:
        both = sorted((ours, other), key=lambda of: of.pad_multiple)
        compared = " and ".join(f"{told(first, of)} {_padding(of.pad_multiple)}" for of in both)
        text += f" {LABELS[first]} is {compared}"
        text += "." if checked.agrees is None else f": {_padding(checked.agrees)} agrees better."
    return text


def _padding(multiple: int) -> str:
    return "without padding" if multiple == 1 else f"padded to multiples of {multiple}"


def interval_sentence(facts: Facts) -> str:
    """Between which values the median of all possible seeds lies, and how surely; empty: too few seeds to say."""
    interval = facts.median_interval
    if not interval:
        return ""
    return (
        f"The median of all seeds there could be lies between {interval.low:.2f} and {interval.high:.2f} "
        f"with {interval.coverage:g} % confidence."
    )


def baseline_sentence(facts: Facts) -> str:
    """What guessing would score; empty: not known."""
    baseline = facts.baseline
    if not baseline:
        return ""
    figure = facts.primary if baseline.figures.get(facts.primary) is not None else "miou"
    value = baseline.figures.get(figure)
    return "" if value is None else f"Predicting {baseline.class_name} everywhere gives {LABELS[figure]} {value:.2f}."


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
        last = percent(seed.checkpoints["last"].figures[first])
        best = f"{percent(seed.checkpoints['best'].figures[first])} (step {seed.checkpoints['best'].step:,})"
    else:
        last, best = seed.status if not seed.reason else f"{seed.status}: {seed.reason}", "-"
    others = [percent(seed.figures.get(figure)) for figure in figure_names(facts)[1:]]
    key = seed.run_key + (" (accepted)" if seed.accepted else "")
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


def duration(seconds: float) -> str:
    """42 s, 12 min, 3.4 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def rate(per_second: float) -> str:
    """9.54, 0.012: two decimals, or as many as a slow device needs."""
    return f"{per_second:.2f}" if per_second >= 0.1 else f"{per_second:.2g}"


def gpu_hours(hours: float) -> str:
    """7.4 GPU-h, 254 GPU-h."""
    return f"{hours:.1f} GPU-h" if hours < 100 else f"{hours:,.0f} GPU-h"


def percent(value: float | None) -> str:
    """A figure of a table; "-": there is none."""
    return "-" if value is None else f"{value:.2f}"


def signed(points: float | None) -> str:
    """A difference in percent points; "-": there is none."""
    return "-" if points is None else f"{round(points, 2) + 0.0:+.2f}"
