"""Samples of a dataset: what is stored, sorted by what is worth a look, and what a training sees of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from pipeline.browse.samples import stored_samples, training_samples
from pipeline.data.loader.train_batches import TrainingOrder, training_batches
from pipeline.params.schema import Row, Task
from pipeline.storage.results.data import Manifest
from tests.helpers.images import image, instance, rectangle, stored, write_shards
from tests.helpers.registered import CLASSES, SIZES, manifest_of


def test_the_smallest_and_the_most_crowded_come_first(storage: Path) -> None:
    samples = stored_samples(manifest_of(storage), "val", task="panoptic", count=3)
    # pixels of SIZES: 6144, 6767, 4950, 5240, 7
    assert [each.name for each in samples.smallest] == ["p4", "p2", "p3"]
    assert [each.name for each in samples.crowded] == ["p0", "p1", "p2"]  # one car each
    assert [each.name for each in samples.spread] == ["p0", "p2", "p4"]


def test_a_stored_picture_comes_with_its_labels_and_the_boxes_of_its_things(storage: Path) -> None:
    (sample,) = stored_samples(manifest_of(storage, sizes=SIZES[:1]), "val", task="panoptic", count=1).spread
    assert np.array_equal(sample.image, image(64, 96, seed=0))
    assert sample.objects.labels == [1, 2] and sample.counts == {1: 1, 2: 1}
    # a car of a third of the width and half of the height, on a road
    assert (sample.objects.ids[:32, :32] == 1).all() and (sample.objects.ids[32:] == 0).all()
    assert sample.boxes.tolist() == [[0, 0, 32, 32]] and list(sample.box_labels) == [2]


def test_of_instances_alone_the_smaller_lies_on_top(storage: Path) -> None:
    large, small = rectangle((8, 8), 0, 0, 8, 8), rectangle((8, 8), 2, 2, 4, 4)
    record = stored("p", image(8, 8), None, None, instances=[instance(2, small), instance(2, large)])
    manifest = write_shards(storage, {"val": [record]}, labels=("instances",), classes=CLASSES, things=["car"])
    (sample,) = stored_samples(manifest, "val", task="instance", count=5).crowded
    assert sample.objects.ids[3, 3] == 0 and sample.objects.ids[0, 0] == 1 and sample.counts == {2: 2}


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_a_training_s_pictures_are_the_loader_s(task: Task, small_row: Row, small_manifest: Manifest) -> None:
    row = dataclasses.replace(small_row, task=task)
    samples = training_samples(small_manifest, row, seed=0, count=5)
    batches = training_batches(
        TrainingOrder.of(row, small_manifest, seed=0), first_step=0, steps=2, image_range=range(4)
    )
    loaded = {
        f"{name}, position {position}": (pixels[:, :height, :width].permute(1, 2, 0).numpy(), labels)
        for batch in batches
        for name, position, pixels, (height, width), labels in zip(
            batch.names, batch.positions, batch.images, batch.sizes.tolist(), batch.labels, strict=True
        )
    }
    assert len(samples) == 5 and len(loaded) == 8
    for sample in samples:
        pixels, labels = loaded[sample.name]
        assert np.array_equal(sample.image, pixels) and sample.objects.labels == labels.tolist()
        assert sample.objects.ids.shape == sample.image.shape[:2] and len(sample.boxes) == len(sample.box_labels)
    areas = [each.image.shape[0] * each.image.shape[1] for each in samples]
    assert areas == sorted(areas)
    assert any(len(each.boxes) for each in samples) == (task != "semantic")
