"""A row's own run in MLflow: settings, figures beside the published ones, the verdict, a table of its seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.params.tasks import LABELS
from pipeline.provenance.run_key import key_of, settings_key
from pipeline.runs.outcome import TrackedRow, TrackedSplit
from pipeline.storage.root import storage_root

if TYPE_CHECKING:
    from pipeline.comparison.rows import Facts
    from pipeline.params.schema import Row
    from pipeline.storage.results.data import Manifest

_DIGITS = 16
"""Of a data set's digest, of which MLflow takes 36 characters."""
_DESCRIPTION_LENGTH = 7500
"""Characters of a run's description; MLflow cuts it at 8000."""


def tracked_row(row: Row, manifest: Manifest | None) -> TrackedRow:
    """What a run folder remembers of its row. manifest: of its data set; None: it is not known here."""
    height, width = row.train.augmentation.crop
    return TrackedRow(
        settings=key_of(settings=settings_key(row), weights=row.weights),
        params={
            "row": row.name,
            "task": row.task,
            "dataset": row.dataset,
            "backbone": row.model.backbone.name,
            "weights": row.weights,
            "crop": f"{height} x {width}",
            "steps": row.train.steps,
            "batch": row.train.global_batch,
            "learning_rate": row.train.optimizer.lr,
        },
        data=tracked_data(manifest) if manifest else (),
    )


def tracked_data(manifest: Manifest) -> tuple[TrackedSplit, ...]:
    """The splits of a data set that rows use, each with what it holds and where."""
    return tuple(
        TrackedSplit(
            name=f"{manifest.dataset} {name}",
            digest=manifest.digest[:_DIGITS],
            split=name,
            source=_folder_of([shard.path for shard in split.shards]),
            images=split.records,
            facts={
                "shards": len(split.shards),
                "bytes": manifest.bytes.get(name, 0),
                "classes": len(manifest.class_names),
                "instances": sum(manifest.instances.get(name, ())),
                "archives": {source.name: source.sha256 for source in manifest.sources},
                "terms": manifest.terms,
            },
        )
        for name, split in manifest.splits.items()
        if name in ("train", "val")
    )


def _folder_of(paths: Sequence[str]) -> str:
    folder = storage_root()
    return str(folder / paths[0].rpartition("/")[0]) if paths else str(folder)


def row_metrics(facts: Facts) -> dict[str, float]:
    """What the row's run shows in charts and columns: figures in percent, differences in points."""
    from pipeline.comparison.tables import evaluated_seeds

    values: dict[str, Any] = {}
    if evaluated_seeds(facts):
        for name, median in facts.median.items():
            low, high = facts.range.get(name) or (None, None)
            values |= {f"test/{name}_median": median, f"test/{name}_lowest": low, f"test/{name}_highest": high}
        values |= {f"difference/{name}": value for name, value in facts.difference.items()}
    for who, figures in (("published", facts.published), ("authors", facts.published_authors)):
        values |= {f"{who}/{name}": value for name, value in figures.items() if name in LABELS}
        memory = figures.get("train_mem_gib") or figures.get("train_mem_gb_as_printed")
        values |= {f"{who}/memory_gib": memory, f"{who}/images_per_s": figures.get("inf_fps")}
    rates = [seed.images_per_s for seed in facts.seeds if seed.images_per_s is not None]
    values |= {
        "cost/memory_gib": facts.memory.gib if facts.memory else None,
        "cost/images_per_s": facts.speed.fps if facts.speed else None,
        "cost/training_images_per_s": statistics.median(rates) if rates else None,
        "cost/parameters_million": facts.parameters / 1e6 if facts.parameters else None,
    }
    if facts.cost:
        values |= {"cost/gpu_hours": facts.cost.gpu_hours_all, "cost/training_hours": facts.cost.seconds / 3600}
    return {name: round(float(value), 4) for name, value in values.items() if value is not None}


def row_description(facts: Facts) -> str:
    """Markdown: the verdict with its reason, the figures, and a line for every seed."""
    from pipeline.comparison.tables import figure_names, figure_text, seed_cells, seed_columns, signed, span

    figures = [figure for figure in figure_names(facts) if facts.median.get(figure) is not None]
    lines = [f"**{facts.verdict.decision}** ({facts.status}): {facts.verdict.reason}", ""]
    if figures:
        lines += [
            "| figure, percent | median | range | published | difference | authors' |",
            "|---|---|---|---|---|---|",
        ]
    for figure in figures:
        texts = (
            figure_text(facts.median[figure]),
            span(facts, figure),
            figure_text(facts.published.get(figure)),
            signed(facts.difference.get(figure)),
            figure_text(facts.published_authors.get(figure)),
        )
        lines.append(f"| {LABELS[figure]} | {' | '.join(texts)} |")
    headings = seed_columns(facts)
    lines += ["", f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    seeds = [f"| {' | '.join(_cell(text) for text in seed_cells(seed, facts))} |" for seed in facts.seeds]
    shown = len(seeds)
    while shown and len("\n".join([*lines, *seeds[:shown]])) > _DESCRIPTION_LENGTH:
        shown -= 1
    lines += seeds[:shown]
    if shown < len(seeds):
        lines += ["", f"{len(seeds) - shown} more seeds: the report has them (python -m stages.report)"]
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())


def row_tags(facts: Facts) -> dict[str, str]:
    """The row's verdict and state, to be searched and shown in columns."""
    return {"m2f.verdict": facts.verdict.decision, "m2f.status": facts.status}


def counted(statuses: Sequence[str]) -> str:
    """How seeds ended: "4 finished, 1 diverged"."""
    counts: Mapping[str, int] = {status: list(statuses).count(status) for status in dict.fromkeys(statuses)}
    return ", ".join(f"{count} {status}" for status, count in counts.items())
