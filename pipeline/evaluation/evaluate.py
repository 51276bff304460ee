"""A row's checkpoints on the validation pictures: each seed's last and best, and the row's figures from them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.evaluation.evaluate_checkpoint import Job, evaluate, evaluation_key, overlays_of
from pipeline.params.schema import Row
from pipeline.params.tasks import FIGURES, primary
from pipeline.runs.outcome import evaluation_dir
from pipeline.storage.results.data import Manifest
from pipeline.storage.results.rows import (
    Baseline,
    EvaluatedCheckpoints,
    EvaluatedSeed,
    Evaluation,
    Figures,
    TrainedSeed,
    TrainingResult,
    Which,
)
from pipeline.storage.root import storage_root

if TYPE_CHECKING:
    from pipeline.compute.resources import Resources


def evaluate_row(row: Row, *, manifest: Manifest, trained: TrainingResult) -> Evaluation:
    """Evaluate the last and the best checkpoint of every finished seed, or find what was evaluated before.

    The row's checkpoint_rule says which of them decides the reported figure; the last where it is unknown. ValueError
    when a checkpoint is gone, altered or of another run.
    """
    from pipeline.compute.resources import cluster_resources

    resources = cluster_resources(row, training=False)
    decides: Which = "best" if row.checkpoint_rule == "best" else "last"
    seeds = tuple(_evaluated(row, seed, manifest, resources, decides) for seed in trained.seeds)
    finished = [seed.checkpoints[decides].figures for seed in seeds if seed.checkpoints]
    if not finished:
        raise ValueError(f"no seed of row {row.name} has finished, so there is nothing to evaluate; {_train(row)}")
    return Evaluation(
        row=row.name,
        dataset=row.dataset,
        task=row.task,
        primary=primary(row.task),
        checkpoint_rule=row.checkpoint_rule,
        decides=decides,
        seeds=seeds,
        median={name: _median([figures[name] for figures in finished]) for name in finished[0]},
        baseline=commonest_class(manifest) if row.task != "instance" and "train" in manifest.splits else None,
        overlays=_overlays(seeds, decides),
        parameters=_parameters(row),
    )


def _parameters(row: Row) -> int:
    """Of the row's network, those that do not learn included; no memory is taken."""
    import torch

    from m2f.model import build_model

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_model(row.model).parameters())


def _evaluated(row: Row, seed: TrainedSeed, manifest: Manifest, resources: Resources, decides: Which) -> EvaluatedSeed:
    """A seed with the figures of its checkpoints, the one that decides first; without any if it did not finish."""
    checkpoints = None
    if seed.checkpoints is not None:
        other: Which = "best" if decides == "last" else "last"
        found = {decides: evaluate(_job(row, seed, decides, manifest, resources), resources)}
        same = seed.checkpoints[other].sha256 == seed.checkpoints[decides].sha256
        found[other] = found[decides] if same else evaluate(_job(row, seed, other, manifest, resources), resources)
        checkpoints = EvaluatedCheckpoints(last=found["last"], best=found["best"])
    return EvaluatedSeed(
        seed=seed.seed,
        run_key=seed.run_key,
        status=seed.status,
        reason=seed.reason,
        mlflow_run_id=seed.mlflow_run_id,
        checkpoints=checkpoints,
    )


def _job(row: Row, seed: TrainedSeed, which: Which, manifest: Manifest, resources: Resources) -> Job:
    assert seed.checkpoints is not None
    checkpoint = seed.checkpoints[which]
    return Job(
        row=row,
        manifest=manifest,
        checkpoint=storage_root() / seed.run_dir / checkpoint.path,
        sha256=checkpoint.sha256,
        run_key=seed.run_key,
        step=checkpoint.step,
        run_dir=storage_root() / seed.run_dir,
        key=evaluation_key(row, manifest, sha256=checkpoint.sha256, device=resources.device_type),
        what=f"seed {seed.seed} of {row.name}, step {checkpoint.step}",
        processes=resources.loader_processes,
    )


def _train(row: Row) -> str:
    return f"train it with: dvc repro -f train@{row.name}"


def _overlays(seeds: Sequence[EvaluatedSeed], decides: Which) -> tuple[str, ...]:
    """Pictures of the first seed that finished, under the storage root."""
    for seed in seeds:
        if seed.checkpoints is not None:
            folder = evaluation_dir(storage_root() / "runs" / seed.run_key, seed.checkpoints[decides].key)
            return tuple(path.relative_to(str(storage_root())).as_posix() for path in overlays_of(folder))
    return ()


def _median(values: Sequence[float | None]) -> float | None:
    """None as soon as one is: the others' median would be of fewer seeds than it says."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if len(known) == len(values) else None


def commonest_class(manifest: Manifest) -> Baseline:
    """What predicting the training pictures' commonest class everywhere scores on the validation pictures."""
    import torch

    from m2f.metrics import SemanticMetric

    pixels = manifest.pixels["train"]
    common = pixels.index(max(pixels))
    metric = SemanticMetric(num_classes=len(manifest.class_names))
    metric.confusion[:, common] = torch.tensor(manifest.pixels["val"])
    result = metric.result()
    figures: Figures = {name: result[name] for name in FIGURES["semantic"]}  # type: ignore[literal-required]
    return Baseline(class_name=manifest.class_names[common], figures=figures)
