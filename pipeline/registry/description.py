"""What a registered model and its versions say of themselves: figures, verdict, recipe, origin, terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pipeline.params.tasks import FIGURES, LABELS, MS_FLIP, percent
from pipeline.registry.candidates import Candidate

if TYPE_CHECKING:
    from pipeline.comparison.verdict import Verdict
    from pipeline.params.schema import Row
    from pipeline.storage.results.rows import Figures

_SHOWN: Mapping[str, Sequence[str]] = {
    "semantic": (*FIGURES["semantic"], MS_FLIP),
    "panoptic": ("pq", "sq", "rq", "ap", "miou"),
    "instance": FIGURES["instance"],
}
"""By task, the figures that are told."""


def figure_tags(figures: Figures) -> dict[str, str]:
    """The figures that are known, in percent, as tags: {"pq": "58.8312"}."""
    return {name: f"{round(percent(value), 4):g}" for name, value in figures.items() if value is not None}


def version_description(row: Row, candidate: Candidate, *, licence: str, made_by: str) -> str:
    """Markdown for one version."""
    told = [name for name in _SHOWN[row.task] if candidate.figures.get(name) is not None]
    figures = ", ".join(f"{LABELS[name]} {percent(candidate.figures[name] or 0.0):.2f}" for name in told)
    lines = [
        f"{figures} (percent, validation), {candidate.description} of {row.name}.",
        f"Run key {candidate.run_key}, commit {candidate.git_commit or 'unknown'}. Made by `{made_by}`.",
        f"Terms: {licence}.",
    ]
    return "\n\n".join(lines)


def model_description(
    row: Row, name: str, versions: Mapping[str, tuple[str, Mapping[str, str]]], verdict: Verdict | None, *, licence: str
) -> str:
    """Markdown for the registered model. versions: by alias, a version's number and its tags; verdict: on the row
    beside its published figures."""
    told = [name for name in _SHOWN[row.task] if any(name in tags for _, tags in versions.values())]
    table = [f"| | version | seed | {' | '.join(LABELS[figure] for figure in told)} |", f"|{'---|' * (3 + len(told))}"]
    for alias, (number, tags) in versions.items():
        cells = [f"{float(tags[figure]):.2f}" if figure in tags else "-" for figure in told]
        table.append(f"| {alias} | {number} | {tags.get('seed', '-')} | {' | '.join(cells)} |")
    for who, figures in (("published", row.published), ("the authors'", row.published_authors)):
        if any(figure in figures for figure in told):
            cells = [f"{figures[figure]:.2f}" if figure in figures else "-" for figure in told]
            table.append(f"| {who} | | | {' | '.join(cells)} |")
    train, (height, width) = row.train, row.train.augmentation.crop
    start = "random initial weights" if row.weights == "none" else f"initial weights {row.weights}"
    judged = [f"**{verdict.decision}**: {verdict.reason}"] if verdict else []
    lines = [
        f"Mask2Former with {row.model.backbone.name} for {row.task} segmentation: row {row.name}, trained on "
        f"{row.dataset}. `best` is the seed with the highest figure, `median` what one training of this row gives.",
        "\n".join(table),
        "Figures are percent, on the validation images.",
        *judged,
        f"Recipe: {train.steps:,} steps of {train.global_batch} images, crops of {height} x {width}, {start}.",
        f"Made by `dvc repro register@{row.name}`.",
        f"Terms: {licence}.",
        f'Load it with `mlflow.pyfunc.load_model("models:/{name}@best")`; `predict` takes image files or arrays.',
    ]
    return "\n\n".join(lines)
