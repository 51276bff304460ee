"""Made-up rows, their results, and their page."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.params.load import parse_params
from pipeline.params.schema import Params, VerdictConfig
from pipeline.params.tasks import FIGURES
from pipeline.provenance.run_key import settings_key
from pipeline.report.write import write_report
from pipeline.storage.results.folder import write_result
from pipeline.storage.results.rows import (
    Baseline,
    Benchmark,
    EvaluatedCheckpoint,
    EvaluatedSeed,
    Evaluation,
    PublishedEvaluation,
    TrainingResult,
)
from tests.helpers import made_up

RULE = VerdictConfig()

AUGMENTATION = {"crop": [64, 64], "short_sides": [64], "long_side_max": 128}
ROW = {
    "dataset": "d",
    "weights": "none",
    "model": {"num_classes": 2},
    "train": {"steps": 100, "augmentation": AUGMENTATION},
    "test": {"short_side": 64, "long_side_max": 128},
}

PARAMS = parse_params(
    {
        "datasets": {
            "d": {"layout": "folder", "class_names": ["road", "<sky>"], "thing_classes": ["road", "<sky>"]},
        },
        "rows": {
            "ours": {**ROW, "seeds": [0, 1, 2]},
            "published": {
                **ROW,
                "published": {"miou": 80.44, "inf_fps": 9.17, "train_mem_gib": 5.67, "device": "A100"},
                "published_authors": {"miou": 79.4, "miou_ms_flip": 82.2},
            },
            "panoptic": {
                **ROW,
                "task": "panoptic",
                "seeds": [0, 1, 2],
                "published": {"pq": 52.0, "ap": 41.8},
                "published_authors": {"pq": 51.9, "ap": 41.7, "miou": 61.7},
            },
            "instance": {
                **ROW,
                "task": "instance",
                "seeds": [0, 1, 2],
                "checkpoint_rule": "best",
                "published_authors": {"ap": 43.7},
            },
        },
    }
)

METRICS = {"semantic": ["iou"], "panoptic": ["pq", "ap", "iou"], "instance": ["ap"]}


def figures(task: str, value: float, **others: Any) -> EvaluatedCheckpoint:
    """A checkpoint whose every figure is `value`, but for the given ones and the pixel accuracy."""
    own: dict[str, Any] = {"pixel_accuracy": 0.9} if task == "semantic" else {}
    per_class = {metric: {"road": value, "<sky>": None} for metric in METRICS[task]}
    return made_up.checkpoint(task, value, **{"per_class": per_class, **own, **others})


def evaluated(
    row: str,
    values: Sequence[float | EvaluatedCheckpoint | None],
    *,
    task: str = "semantic",
    key: str = "k",
    rule: str = "unknown",
    **fields: Any,
) -> Evaluation:
    """Evaluation of seeds 0, 1, ...: the last checkpoint's primary figure, or that checkpoint; None: diverged.

    The best on validation has a point more, at step 80.
    """
    seeds = []
    for seed, value in enumerate(values):
        if value is None:
            reason = "the loss is not finite at step 7"
            seeds.append(ended(seed, "diverged", reason, key=key))
        else:
            last = value if isinstance(value, EvaluatedCheckpoint) else figures(task, value)
            best = figures(task, (last.figures[FIGURES[task][0]] or 0.0) + 0.01, step=80)
            seeds.append(made_up.evaluated_seed(seed, last, best, key=key))
    baseline = {"miou": 0.0625, "mean_accuracy": 0.5, "pixel_accuracy": 0.3}
    of_rule = {"checkpoint_rule": rule, "decides": "best" if rule == "best" else "last"}
    fields = {"baseline": Baseline(class_name="road", figures=baseline) if task == "semantic" else None, **fields}
    return made_up.evaluation(row, seeds, task=task, **of_rule, **fields)


def ended(seed: int, status: Any, reason: str, *, key: str = "k") -> EvaluatedSeed:
    """A seed that did not finish."""
    return EvaluatedSeed(seed=seed, run_key=f"{key}{seed}", status=status, reason=reason, mlflow_run_id=None)


def trained(row: str, seeds: int, key: str = "k", **of_each: Any) -> TrainingResult:
    settings = settings_key(PARAMS.rows[row])
    return made_up.training(row, [made_up.trained_seed(seed, key=key, **of_each) for seed in range(seeds)], settings)


def written(results: Path, *made: Any) -> None:
    """Write results of rows as their stages do."""
    for each in made:
        write_result(each, each.row, results=results)


def published(
    row: str,
    task: str,
    checkpoint: EvaluatedCheckpoint,
    *,
    difference: Mapping[str, float] | None = None,
    pad_multiple: int = 1,
    **fields: Any,
) -> PublishedEvaluation:
    """Evaluation of a published checkpoint, unpadded only."""
    theirs = made_up.padded(checkpoint, difference=difference, pad_multiple=pad_multiple)
    return made_up.published_evaluation(row, theirs, task=task, **fields)


def on_gpu(row: str, seeds: int, **of_each: Any) -> TrainingResult:
    """Trainings of 2 hours on 4 workers, on GPUs."""
    times = {"train_s": 7200.0, "worker_s": 28800.0, "workers": 4}
    return trained(row, seeds, environment=made_up.A100, **times, **of_each)


def benchmark(row: str, *, device: str = "NVIDIA A100-PCIE-40GB", **fields: Any) -> Benchmark:
    """A step of 2 pictures took 5,632 MiB; 9.5 pictures/s."""
    environment = dataclasses.replace(made_up.A100 if "NVIDIA" in device else made_up.CPU, device=device)
    return made_up.benchmark(row, environment=environment, **fields)


def page_of(params: Params, results: Path) -> str:
    """The page that results make."""
    write_report(params, results=results, out=results / "reports")
    return (results / "reports" / "index.html").read_text()
