"""Evaluation: the recipe's test pictures through a checkpoint's network, shared over workers and merged exactly."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from m2f.metrics import SemanticMetric
from m2f.model import build_model
from pipeline.answers import Outcome
from pipeline.loader import Picture
from pipeline.measures import Measures, measure
from pipeline.overlays import write_overlay
from pipeline.params import Row
from pipeline.precision import allow_tf32
from pipeline.results import (
    Baseline,
    EvaluatedCheckpoint,
    EvaluatedCheckpoints,
    EvaluatedSeed,
    Evaluation,
    Figures,
    TrainingResult,
    Which,
)
from pipeline.run_folder import OVERLAYS
from pipeline.tasks import FIGURES, primary

if TYPE_CHECKING:
    from pipeline.cluster import Resources


def evaluate_row(row: Row, *, manifest: Mapping[str, Any], train_result: TrainingResult) -> Evaluation:
    """Evaluate the last and the best checkpoint of every finished seed.

    The row's checkpoint_rule says which of them decides the reported figure; the last where it is unknown. ValueError
    when a checkpoint is gone, altered or of another run.
    """
    from pipeline import tracking
    from pipeline.checkpoints import check_digest
    from pipeline.cluster import cluster_resources
    from pipeline.storage import storage_root, stored

    resources = cluster_resources(row, training=False)
    decides: Which = "best" if row.checkpoint_rule == "best" else "last"
    other: Which = "last" if decides == "best" else "best"
    seeds: list[EvaluatedSeed] = []
    overlays: list[str] = []
    for trained in train_result.seeds:
        entry = EvaluatedSeed(
            seed=trained.seed,
            run_key=trained.run_key,
            status=trained.status,
            reason=trained.reason,
            mlflow_run_id=trained.mlflow_run_id,
        )
        if trained.checkpoints is None:
            seeds.append(entry)
            continue
        by_step: dict[int, EvaluatedCheckpoint] = {}
        for which in (decides, other):
            checkpoint = trained.checkpoints[which]
            path = stored(f"{trained.run_dir}/{checkpoint.path}", made_by=f"dvc repro -f train@{row.name}")
            step = checkpoint.step
            if step not in by_step:
                check_digest(path, checkpoint.sha256, row=row.name)
                folder = storage_root() / trained.run_dir / "overlays" if which == decides else None
                measures = evaluate_checkpoint(
                    path, trained.run_key, row, manifest, resources, folder, digest=checkpoint.sha256
                )
                by_step[step] = described(measures, step)
                if folder is not None:
                    title = f"seed {trained.seed} of {row.name}, step {step}"
                    keep_evaluation(folder.parent / tracking.EVALUATION, by_step[step], measures, title)
                if folder is not None and not overlays:
                    overlays = [str(p.relative_to(storage_root())) for p in sorted(folder.glob("*.png"))]
        last, best = (by_step[each.step] for each in (trained.checkpoints.last, trained.checkpoints.best))
        seeds.append(replace(entry, checkpoints=EvaluatedCheckpoints(last=last, best=best)))

    run_ids = tracking.track_row(row, seeds, decides=decides)
    seeds = [replace(entry, mlflow_run_id=run_ids[entry.run_key] or entry.mlflow_run_id) for entry in seeds]

    finished = [entry.checkpoints[decides].figures for entry in seeds if entry.checkpoints]
    return Evaluation(
        row=row.name,
        dataset=row.dataset,
        task=row.task,
        primary=primary(row.task),
        checkpoint_rule=row.checkpoint_rule,
        decides=decides,
        seeds=tuple(seeds),
        median={name: _median([figures[name] for figures in finished]) for name in finished[0]},
        baseline=None if row.task == "instance" else commonest_class(manifest),
        overlays=tuple(overlays),
    )


def _median(values: Sequence[float | None]) -> float | None:
    """None as soon as one is: the others' median would be of fewer seeds than it says."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if len(known) == len(values) else None


def commonest_class(manifest: Mapping[str, Any]) -> Baseline:
    """What predicting the training pictures' commonest class everywhere scores on the validation pictures."""
    common = int(np.argmax(manifest["pixels"]["train"]))
    metric = SemanticMetric(num_classes=len(manifest["class_names"]))
    metric.confusion[:, common] = torch.tensor(manifest["pixels"]["val"])
    result = metric.result()
    figures = {name: result[name] for name in FIGURES["semantic"]}  # type: ignore[literal-required]
    return Baseline(class_name=manifest["class_names"][common], figures=figures)


def described(measures: Measures, step: int) -> EvaluatedCheckpoint:
    """A checkpoint's figures as results hold them."""
    return EvaluatedCheckpoint(step=step, figures=measures.figures(), per_class=measures.per_class())


def keep_evaluation(folder: Path, described: EvaluatedCheckpoint, measures: Measures, title: str) -> None:
    """Write what MLflow shows of an evaluated checkpoint: figures.json, classes as a table and a chart, confusions.

    confusion.json holds pixels by true class (rows) and predicted class (columns).
    """
    from pipeline.charts import draw_confusion, draw_per_class
    from pipeline.files import write_json, write_text

    write_text(folder / "per_class.csv", _table(described.per_class))
    draw_per_class(folder / "per_class.png", described.per_class, title)
    if measures.semantic is not None:
        confusion = measures.semantic.confusion.numpy()
        pixels = {"class_names": measures.class_names, "true_by_predicted": confusion.tolist()}
        write_text(folder / "confusion.json", json.dumps(pixels, ensure_ascii=False) + "\n")
        draw_confusion(folder / "confusion.png", confusion, measures.class_names, title)
    figures = {f"test_{name}": value for name, value in described.figures.items() if value is not None}
    write_json(folder / "figures.json", figures)


def _table(per_class: Mapping[str, Figures]) -> str:
    """Per-class values as CSV, which MLflow shows as a table: a row per class, a column per metric."""
    classes = list(dict.fromkeys(name for values in per_class.values() for name in values))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["class", *per_class])
    for name in classes:
        values = [per_class[metric].get(name) for metric in per_class]
        writer.writerow([name, *("" if value is None else f"{value:.4f}" for value in values)])
    return text.getvalue()


def evaluate_checkpoint(
    path: Path,
    run_key: str,
    row: Row,
    manifest: Mapping[str, Any],
    resources: Resources,
    overlays: Path | None,
    *,
    digest: str | None = None,
) -> Measures:
    """One checkpoint over all validation pictures: in this process, or as one Ray task per worker.

    digest: its SHA-256; with it, a host copies a checkpoint from a URL once for all its workers.
    """
    if resources.workers <= 1:
        return _evaluate_part(path, digest, run_key, row, manifest, 0, 1, overlays, resources.loader_processes)
    import ray

    from pipeline.cluster import connect

    connect()
    task = ray.remote(_evaluate_part).options(
        num_cpus=resources.cpus_per_worker,
        num_gpus=1 if resources.use_gpu else 0,
        accelerator_type=resources.kind,
        max_retries=3,
    )
    parts = [
        task.remote(
            path, digest, run_key, row, manifest, worker, resources.workers, overlays, resources.loader_processes
        )
        for worker in range(resources.workers)
    ]
    try:
        measures, *others = ray.get(parts)
    except ray.exceptions.RayTaskError as error:  # its text is a traceback; the sentence is in its cause
        if isinstance(error.cause, (ValueError, OSError)):
            raise error.cause from None
        raise
    for part in others:
        measures.merge(part)
    merged: Measures = measures
    return merged


def _evaluate_part(
    path: Path,
    digest: str | None,
    run_key: str,
    row: Row,
    manifest: Mapping[str, Any],
    worker: int,
    workers: int,
    overlays: Path | None,
    processes: int,
) -> Measures:
    """One worker's share of the measures; draws its share of the overlays."""
    from pipeline.checkpoints import load_checkpoint

    allow_tf32(row.train.tf32)
    model = build_model(row.model)
    load_checkpoint(path, model=model, run_key=run_key, digest=digest)
    if torch.cuda.is_available():
        model.cuda()
    total = manifest["splits"]["val"]["records"]
    shown = set(np.linspace(0, total - 1, min(OVERLAYS, total)).round().astype(int).tolist())

    def draw(picture: Picture, outcome: Outcome) -> None:
        if picture.index in shown and overlays is not None:
            write_overlay(overlays / f"{picture.index:05d}.png", picture, outcome, row.model.num_classes)

    return measure(model, manifest, row, worker=worker, workers=workers, processes=processes, on_picture=draw)
