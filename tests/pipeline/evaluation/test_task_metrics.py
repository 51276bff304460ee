from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from m2f import build_model
from pipeline.data.loader.val_images import validation_images
from pipeline.evaluation.predict import Predictions
from pipeline.evaluation.task_metrics import TaskMetrics, measure
from pipeline.params.schema import Row
from tests.helpers.loading import LAYOUTS, wide


def of_300_classes(row: Row, task: Any) -> Row:
    return dataclasses.replace(row, task=task, model=dataclasses.replace(row.model, num_classes=300))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_class_255_counts_and_nothing_does_not_where_there_are_300_classes(
    storage: Path, small_row: Row, layout: Any
) -> None:
    row = of_300_classes(small_row, "semantic")
    manifest = wide(storage, "semantic", layout)
    metrics = TaskMetrics(row, manifest)
    for val_image in validation_images(manifest, row.test):
        metrics.update(val_image, Predictions(labels=torch.full((32, 48), 255)))
    # 2 pictures of 47 columns, half of them 255, half 299: one class has 1/2, the other 0
    assert metrics.figures() == {"miou": 0.25, "mean_accuracy": 0.5, "pixel_accuracy": 0.5}
    assert metrics.per_class()["iou"]["class 255"] == 0.5
    assert metrics.semantic is not None and int(metrics.semantic.confusion.sum()) == 2 * 47 * 32


@pytest.mark.parametrize("task", ["semantic", "panoptic"])
def test_a_network_of_300_classes_is_measured(storage: Path, small_row: Row, task: str) -> None:
    row, manifest = of_300_classes(small_row, task), wide(storage, task)
    torch.manual_seed(0)
    metrics = measure(build_model(row.model), manifest, row)
    assert metrics.semantic is not None
    assert {c: n for c, n in enumerate(metrics.semantic.confusion.sum(1).tolist()) if n} == {255: 1504, 299: 1504}
    if metrics.panoptic is not None:  # every true segment is matched or missed
        assert metrics.panoptic.counts[:, [0, 2]].sum(1).nonzero().flatten().tolist() == [255, 299]
