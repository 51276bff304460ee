from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from m2f import build_model
from m2f.inference import Instances
from m2f.inference.panoptic import Segments
from m2f.metrics import CityscapesInstanceMetric
from m2f.types import Prediction
from pipeline.data.datasets import cityscapes
from pipeline.data.loader.train_batches import TrainingOrder, training_batches
from pipeline.data.loader.val_images import validation_images
from pipeline.data.shards import build as shards
from pipeline.evaluation.predict import PredictConfig, Predictions, single_scale
from pipeline.evaluation.task_metrics import TaskMetrics, measure
from pipeline.params.class_names import CLASS_NAMES
from pipeline.params.schema import DatasetConfig, Row
from pipeline.storage.files import sha256
from pipeline.storage.results.data import FetchedSource, Manifest
from tests.helpers.cityscapes_files import instance_ids, predictions
from tests.helpers.images import encoded, image, put, zipped
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


def test_cityscapes_ap_needs_segments(small_row: Row, small_manifest: Manifest) -> None:
    row = dataclasses.replace(small_row, test=dataclasses.replace(small_row.test, ap_rule="cityscapes"))
    of_objects = dataclasses.replace(small_manifest, labels=("instances",))
    with pytest.raises(ValueError, match="ap_rule is cityscapes, .* has instances labels; set ap_rule: coco"):
        TaskMetrics(row, of_objects)


@pytest.mark.parametrize(
    ("task", "ap_rule", "waits"),
    [
        ("semantic", "coco", 1),
        ("panoptic", "coco", 8),
        ("panoptic", "cityscapes", 7),
        ("instance", "coco", 4),
        ("instance", "cityscapes", 3),
    ],
)
def test_a_validation_picture_makes_the_host_wait_for_a_gpu_as_often_as_its_task_says(
    small_row: Row, small_manifest: Manifest, task: Any, ap_rule: Any, waits: int
) -> None:
    # semantic: the check of the label map. instance: one for the masks, three for the metric, two for Cityscapes'.
    # panoptic: those five, two for the segments and one for their metric
    test = dataclasses.replace(small_row.test, score_threshold=0.3, overlap_threshold=0.0, ap_rule=ap_rule)
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


# Cityscapes with objects, from archives in its published layout to figures by its own rules

CLASSES = CLASS_NAMES["cityscapes"]
IMAGES = 6


@pytest.fixture
def manifest(tmp_path: Path, storage: Path, pixels: Any) -> Manifest:
    """Shards of archives as Cityscapes publishes them."""
    for split, count in (("train", 2), ("val", IMAGES)):
        for number in range(count):
            ids = instance_ids(number)
            name = f"{split}/ulm/ulm_000000_{number:06d}"
            put(tmp_path / f"i/leftImg8bit/{name}_leftImg8bit.png", encoded(image(*ids.shape, seed=number)))
            put(tmp_path / f"g/gtFine/{name}_gtFine_instanceIds.png", encoded(ids))
    config = DatasetConfig(
        layout="cityscapes", class_names=CLASSES, thing_classes=CLASSES[11:], splits={"train": "train", "val": "val"},
        pixels=pixels,
    )  # fmt: skip
    archives = [zipped(tmp_path / top, tmp_path / f"{top}.zip") for top in ("i", "g")]
    facts = [
        FetchedSource(name=path.name, path="archives/00/folder.json", bytes=1, sha256=sha256(path)) for path in archives
    ]
    return shards.build("cityscapes", config, archives, facts=facts, processes=0)


def of_cityscapes(row: Row, task: Any) -> Row:
    classes = len(CLASSES) if task == "panoptic" else 8
    test = dataclasses.replace(row.test, ap_rule="cityscapes")
    return dataclasses.replace(row, task=task, test=test, model=dataclasses.replace(row.model, num_classes=classes))


@pytest.mark.parametrize(("task", "pixels"), [("panoptic", "encoded"), ("instance", "raw")])
def test_figures_of_shards_are_those_of_the_official_evaluators(manifest: Manifest, small_row: Row, task: Any) -> None:
    row = of_cityscapes(small_row, task)
    metrics = TaskMetrics(row, manifest)
    first = 11 if task == "instance" else 0
    for val_image in validation_images(manifest, row.test, task=task):
        ids = instance_ids(val_image.index)
        masks, labels, scores = predictions(ids, val_image.index)
        found = Instances(
            scores=torch.from_numpy(scores),
            labels=torch.from_numpy(labels) - first,
            masks=torch.from_numpy(masks),
            boxes=torch.zeros(len(masks), 4),
        )
        label_ids = np.where(ids < 1000, ids, ids // 1000)
        of_id = {label: train_id for train_id, label in enumerate(cityscapes.TRAIN_IDS)}
        classes = np.vectorize(lambda label, of_id=of_id: of_id.get(label, 255))(label_ids)
        segments = Segments(
            segments=torch.zeros(ids.shape, dtype=torch.int32),
            labels=torch.tensor([0]),
            is_thing=torch.tensor([False]),
            scores=torch.ones(1),
        )
        metrics.update(
            val_image,
            Predictions(
                labels=torch.from_numpy(np.where(classes == 255, 0, classes)), segments=segments, instances=found
            ),
        )
    figures = metrics.figures()
    assert isinstance(metrics.instance, CityscapesInstanceMetric)
    # cityscapesScripts' (tests/m2f/test_cityscapes_metric.py), of the same images and predictions
    assert figures["ap"] == pytest.approx(0.12166543490030246, abs=1e-12)
    if task == "instance":
        assert figures["ap50"] == pytest.approx(0.2564379039998914, abs=1e-12)
        assert figures["ap_large"] is None
    else:
        # every labelled pixel is right, those of groups too, and no other pixel counts
        assert figures["miou"] == 1


@pytest.mark.parametrize("pixels", ["raw"])
def test_training_shows_segments_without_groups_and_objects_of_no_class(manifest: Manifest, small_row: Row) -> None:
    row = of_cityscapes(small_row, "panoptic")
    (batch,) = training_batches(TrainingOrder.of(row, manifest, seed=0), first_step=0, steps=1, image_range=range(4))
    assert batch.segments is not None
    for segments, labels in zip(batch.segments, batch.labels, strict=True):
        assert int(segments[segments < 255].max()) == len(labels) - 1
        assert {*labels.tolist()} <= {*range(19)}
