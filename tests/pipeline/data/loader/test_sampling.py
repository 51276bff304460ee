"""Repeat factor sampling: how often images of rare classes are shown."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.loader.sampling import RepeatOrder, classes_held, repeat_factors
from pipeline.data.loader.train_batches import epoch_order
from pipeline.data.shards.reader import SplitReader
from pipeline.storage.results.data import Manifest
from tests.helpers.images import image, instance, rectangle, stored, write_shards
from tests.helpers.loading import THINGS, batches


def test_an_image_is_repeated_as_often_as_its_rarest_class() -> None:
    # of 4 images, class 0 is in all, 1 in one half, 2 in a quarter; threshold 1:
    # r(0) = 1, r(1) = sqrt(1 / (1/2)) = 1.4142, r(2) = sqrt(1 / (1/4)) = 2
    classes = [[0], [0, 1], [0, 1, 2], [0, 0]]
    assert repeat_factors(classes, 1.0) == pytest.approx([1, 2**0.5, 2, 1])
    # threshold 1/2: r(1) = sqrt((1/2) / (1/2)) = 1, r(2) = sqrt((1/2) / (1/4)) = 1.4142
    assert repeat_factors(classes, 0.5) == pytest.approx([1, 1, 2**0.5, 1])
    assert repeat_factors(classes, 0.25) == [1, 1, 1, 1]
    assert repeat_factors([[], [3]], 1.0) == pytest.approx([1, 2**0.5])  # an image without a class


def test_factors_of_one_leave_the_order_as_it_is() -> None:
    order = RepeatOrder(5, [1.0] * 7)
    assert [order[position] for position in range(21)] == [i for epoch in range(3) for i in epoch_order(5, epoch, 7)]


def test_whole_factors_repeat_in_every_epoch_and_fractions_in_their_share_of_epochs() -> None:
    order = RepeatOrder(3, [1.0, 2.0, 1.25])
    epochs = [order.epoch(epoch) for epoch in range(2000)]
    assert all(Counter(epoch)[0] == 1 and Counter(epoch)[1] == 2 for epoch in epochs)
    # a quarter of 2000 epochs, give or take four standard deviations of sqrt(2000 * 1/4 * 3/4) = 19
    assert sum(Counter(epoch)[2] == 2 for epoch in epochs) == pytest.approx(500, abs=78)
    assert len({tuple(epoch) for epoch in epochs[:20]}) > 5  # in an order of their own


def test_the_order_is_a_function_of_seed_and_position() -> None:
    order = RepeatOrder(3, [1.0, 2.0, 1.25])
    forwards = [order[position] for position in range(50)]
    assert forwards == [index for epoch in range(20) for index in order.epoch(epoch)][:50]
    assert [RepeatOrder(3, [1.0, 2.0, 1.25])[position] for position in reversed(range(50))] == forwards[::-1]
    other = RepeatOrder(4, [1.0, 2.0, 1.25])
    assert [other[position] for position in range(50)] != forwards


def three_images(storage: Path) -> Manifest:
    """Sky everywhere; p1 has a person, p2 a crowd of cars, of which nobody learns a thing."""
    records = []
    for place, (class_id, crowd) in enumerate([(0, False), (2, False), (1, True)]):
        ids = np.zeros((8, 8), np.uint8)
        ids[:4] = 1
        boxes = [instance(class_id, rectangle((8, 8), 0, 0, 8, 4), crowd=crowd)] if class_id else []
        records.append(stored(f"p{place}", image(8, 8), ids, [0, class_id], crowd=[False, crowd], instances=boxes))
    return write_shards(storage, {"train": records}, **THINGS)


@pytest.mark.parametrize(
    ("task", "classes"),
    [("semantic", [[0], [0, 2], [0, 1]]), ("panoptic", [[0], [0, 2], [0, 1]]), ("instance", [[], [2], []])],
)
def test_the_classes_of_an_image_are_those_that_the_task_learns(storage: Path, task: str, classes: object) -> None:
    split = SplitReader.of(three_images(storage), "train", task)
    assert classes_held(split, np.arange(3)) == classes


def test_rare_images_come_more_often_whatever_workers_and_loader_processes(storage: Path) -> None:
    manifest = three_images(storage)
    whole = batches(manifest, repeat_threshold=1.0, steps=30)
    names = Counter(name for batch in whole for name in batch.names)
    # r = 1, sqrt(3), sqrt(3): of 120 positions 120 / (1 + 2 sqrt(3)) = 26.9 show p0, 46.6 each of the others
    assert names["p0"] == pytest.approx(26.9, abs=4) and names["p1"] == pytest.approx(46.6, abs=8)
    half = batches(manifest, repeat_threshold=1.0, first_step=20, steps=10, image_range=range(2, 4), processes=1)
    assert [batch.names for batch in half] == [batch.names[2:] for batch in whole[20:]]
    plain, never_rare = batches(manifest), batches(manifest, repeat_threshold=1e-9)
    assert [batch.names for batch in plain] == [batch.names for batch in never_rare]
