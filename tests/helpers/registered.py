"""What the tests of the registry share: a row on pictures of odd sizes, and results of trainings that never were."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch

from m2f import build_model
from pipeline.params.schema import Row, TestConfig
from pipeline.params.tasks import primary
from pipeline.runs.checkpoints import checkpoint_path, save_model
from pipeline.storage.files import sha256
from pipeline.storage.results.data import Manifest
from pipeline.storage.results.rows import (
    BestCheckpoint,
    EvaluatedSeed,
    Evaluation,
    TrainedCheckpoint,
    TrainedCheckpoints,
    TrainingResult,
)
from tests.helpers.images import image, instance, rectangle, stored, write_shards
from tests.helpers.made_up import checkpoint, evaluated_seed, evaluation, trained_seed, training

SIZES = ((64, 96), (67, 101), (150, 33), (40, 131), (1, 7))
"""(height, width): fitting the network's stride, odd, high, wide, and smaller than a pixel of its coarsest map."""

CLASSES = ("sky", "road", "car")


class Results(TypedDict):
    """Two arguments of `pipeline.registry.register.register`."""

    evaluated: Evaluation
    trained: TrainingResult


def row_of(task: str, small_row: Row, **test: Any) -> Row:
    """The small row for a task on `manifest_of`'s pictures, sure of its predictions so that something is found."""
    settings: dict[str, Any] = {
        "short_side": 70,
        "long_side_max": 200,
        "score_threshold": 0.0,
        "overlap_threshold": 0.0,
    }
    model = dataclasses.replace(small_row.model, num_classes=1 if task == "instance" else 3)
    return dataclasses.replace(
        small_row, name=f"odd_{task}", dataset="mine", task=task, model=model, test=TestConfig(**{**settings, **test})
    )


def manifest_of(storage: Path, sizes: Sequence[tuple[int, int]] = SIZES) -> Manifest:
    """Validation pictures of random colours with a car each, under the storage root."""
    records = []
    for seed, size in enumerate(sizes):
        car = rectangle(size, 0, 0, max(1, size[1] // 3), max(1, size[0] // 2))
        segments = np.where(car, 1, 0).astype(np.uint8)
        pixels = image(*size, seed=seed)
        records.append(stored(f"p{seed}", pixels, segments, [1, 2], crowd=[False, False], instances=[instance(2, car)]))
    labels = ("semantic", "panoptic", "instances")
    return write_shards(storage, {"val": records}, labels=labels, classes=CLASSES, things=["car"])


def decided_network(row: Row, seed: int = 4) -> torch.nn.Module:
    """A network with random weights whose queries stand for different classes and parts of the picture."""
    torch.manual_seed(seed)
    model = build_model(row.model)
    with torch.no_grad():
        decoder = model.query_decoder
        for weight, factor in ((decoder.query_feature, 10), (decoder.class_head, 30), (decoder.mask_head[-1], 10)):
            weight.weight.mul_(factor)
    return model.eval()


def results_of(
    row: Row,
    storage: Path,
    values: Mapping[int, float | str],
    *,
    run: str = "run",
    runs: Mapping[int, str] | None = None,
) -> Results:
    """`evaluated` and `trained`, as the stages make them, of seeds with these figures; text: failed, for that reason.

    Every seed has a checkpoint of its own under the storage root. run: how run keys begin; runs: MLflow runs by seed.
    """
    trained, evaluated = [], []
    for seed, value in values.items():
        key, ids = f"{run}{seed}", {"key": run, "mlflow_run_id": (runs or {}).get(seed)}
        if isinstance(value, str):
            ended = {"status": "failed", "reason": value}
            trained.append(trained_seed(seed, environment=None, **ended, **ids))
            evaluated.append(EvaluatedSeed(seed=seed, run_key=key, mlflow_run_id=ids["mlflow_run_id"], **ended))
            continue
        path = checkpoint_path(storage / "runs" / key, 2)
        if not path.exists():  # written again, it would have another digest
            tensors = decided_network(row, seed).state_dict()
            save_model(storage / "runs" / key, step=2, run_key=key, tensors=tensors)
        last = TrainedCheckpoint(step=2, path=f"checkpoints/{path.name}", sha256=sha256(path))
        best = BestCheckpoint(**dataclasses.asdict(last), figure=primary(row.task), value=value)
        trained.append(trained_seed(seed, checkpoints=TrainedCheckpoints(last=last, best=best), **ids))
        evaluated.append(evaluated_seed(seed, checkpoint(row.task, value, step=2), **ids))
    return {"evaluated": evaluation(row.name, evaluated, task=row.task), "trained": training(row.name, trained)}
