from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from m2f import build_model
from m2f.types import Prediction
from pipeline.data.loader.val_images import validation_images
from pipeline.evaluation.predict import PredictConfig, Predictions, single_scale
from pipeline.evaluation.task_metrics import TaskMetrics, measure
from pipeline.params.schema import Row
from pipeline.storage.results import Manifest
from tests.helpers.loading import LAYOUTS, wide
from tests.helpers.pretend_gpu import PretendGpu


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


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_loader_processes_change_no_figure(small_row: Row, small_manifest: Manifest, task: Any) -> None:
    row = dataclasses.replace(small_row, task=task, test=dataclasses.replace(small_row.test, score_threshold=0.0))
    torch.manual_seed(0)
    model = build_model(row.model)
    alone, shared = (measure(model, small_manifest, row, processes=processes) for processes in (0, 2))
    assert alone.state() == shared.state()
    assert alone.figures() == shared.figures()


@pytest.mark.parametrize(("task", "waits"), [("semantic", 1), ("panoptic", 8), ("instance", 4)])
def test_a_validation_picture_makes_the_host_wait_for_a_gpu_as_often_as_its_task_says(
    small_row: Row, small_manifest: Manifest, task: Any, waits: int
) -> None:
    # semantic: the check of the label map. instance: one for the masks, three for the metric.
    # panoptic: those five, two for the segments and one for their metric
    test = dataclasses.replace(small_row.test, score_threshold=0.3, overlap_threshold=0.0)
    row = dataclasses.replace(small_row, task=task, test=test)
    predictions_of = single_scale.__wrapped__  # without inference mode, which leaves out the pretended GPU
    config = PredictConfig(test=row.test, task=task, thing_ids=small_manifest.thing_ids_of(task))
    on_cpu, on_gpu = TaskMetrics(row, small_manifest), TaskMetrics(row, small_manifest)
    generator = torch.Generator().manual_seed(0)
    for val_image in validation_images(small_manifest, row.test, task=task):
        valid = val_image.image.shape[1:]
        padded = [-(-side // 32) * 32 for side in valid]
        made = Prediction(
            3 * torch.randn(1, 12, row.model.num_classes + 1, generator=generator),
            4 * torch.randn(1, 12, padded[0] // 4, padded[1] // 4, generator=generator),
        )
        images, size = torch.zeros(1, 3, *padded), val_image.original_size
        on_cpu.update(val_image, predictions_of(lambda *_, made=made, **__: made, images, valid, size, config))
        with PretendGpu() as gpu:
            there = Prediction(gpu.put(made.class_logits), gpu.put(made.mask_logits))
            predictions = predictions_of(lambda *_, there=there, **__: there, images, valid, size, config)
            on_gpu.update(val_image, predictions)
            assert len(gpu.waits) == waits, gpu.waits
    with PretendGpu():
        assert on_gpu.state() == on_cpu.state()
