from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import pytest

from pipeline.data.datasets import shapes
from pipeline.data.datasets.shapes import coast, street
from pipeline.data.datasets.shapes.canvas import SLIVER_PIXELS, Scene
from pipeline.data.datasets.shapes.scenes import SCENES, draw
from pipeline.params.schema import DatasetConfig

SIZE = (128, 192)


class Drawn(NamedTuple):
    """A scene, and pictures of it."""

    scene: Scene
    train: np.ndarray
    """120 pictures, (N, h, w, 3)."""
    train_maps: np.ndarray
    """Their label maps, (N, h, w)."""
    val: np.ndarray
    val_maps: np.ndarray


def config(scene: Scene = street.STREET, **generate: int) -> DatasetConfig:
    settings = {"train": 3, "val": 2, "height": 128, "width": 192, "seed": 7, **generate}
    return DatasetConfig(layout="shapes", class_names=scene.class_names, generate=settings)


def label_map(segments: np.ndarray, classes: tuple[int, ...]) -> np.ndarray:
    lookup = np.full(256, 255)
    lookup[: len(classes)] = classes
    return lookup[segments]


@pytest.fixture(scope="module", params=SCENES, ids=["street", "coast"])
def drawn(request: pytest.FixtureRequest) -> Drawn:
    scene: Scene = request.param
    parts = []
    for split, count in (("train", 120), ("val", 40)):
        pictures = [draw(scene.class_names, 7, split, index, SIZE) for index in range(count)]
        parts += [np.stack([picture[0] for picture in pictures])]
        parts += [np.stack([label_map(*picture[1:]) for picture in pictures])]
    return Drawn(scene, *parts)


def mean_iou(prediction: np.ndarray, truth: np.ndarray, classes: int) -> float:
    counted = truth != 255
    pairs = np.bincount(truth[counted] * classes + prediction[counted], minlength=classes**2).reshape(classes, classes)
    return float(np.mean(np.diag(pairs) / (pairs.sum(0) + pairs.sum(1) - np.diag(pairs))))


@pytest.mark.parametrize("scene", SCENES, ids=["street", "coast"])
def test_a_picture_depends_on_classes_seed_split_and_index_only(scene: Scene) -> None:
    later = shapes.records(config(scene, train=9), [], "train")[2].read()
    alone = shapes.records(config(scene), [], "train")[2].read()
    assert later.image == alone.image
    np.testing.assert_array_equal(later.segments, alone.segments)
    keys = ((7, "train", 2), (8, "train", 2), (7, "val", 2), (7, "train", 3))
    others = [draw(scene.class_names, *key, SIZE)[0] for key in keys]
    assert all(np.any(others[0] != other) for other in others[1:])


def test_the_street_of_the_demo_is_drawn_as_ever() -> None:
    # its pictures decide the keys of all trainings on them
    image, segments, classes = draw(street.CLASS_NAMES, 7, "train", 0, SIZE)
    digest = hashlib.sha256(segments.tobytes() + bytes(classes)).hexdigest()[:16]
    assert (image.mean().round(2), digest) == (106.16, "508a464a99e083bb")


def test_every_class_is_common_enough_to_learn(drawn: Drawn) -> None:
    names = drawn.scene.class_names
    holding = [np.mean([(labels == class_id).any() for labels in drawn.train_maps]) for class_id in range(len(names))]
    assert min(holding) > 0.3, dict(zip(names, holding, strict=True))
    assert np.mean(drawn.train_maps == 255) < 0.01


@pytest.mark.parametrize("scene", SCENES, ids=["street", "coast"])
def test_things_have_a_segment_each_and_stuff_one_per_class(scene: Scene) -> None:
    for index in range(20):
        _, segments, classes = draw(scene.class_names, 7, "train", index, SIZE)
        stuff = [class_id for class_id in classes if class_id not in scene.things]
        assert len(stuff) == len(set(stuff))
        counts = np.bincount(segments[segments != 255], minlength=len(classes))
        assert len(counts) == len(classes)
        assert all(
            count >= (SLIVER_PIXELS if class_id in scene.things else 1)
            for count, class_id in zip(counts, classes, strict=True)
        )


@pytest.mark.parametrize(
    ("scene", "class_id", "least"),
    [
        (street.STREET, street.PERSON, (16, 8)),
        (street.STREET, street.SIGN, (8, 8)),
        (street.STREET, street.CAR, (10, 12)),
        (coast.COAST, coast.BOAT, (6, 12)),
        (coast.COAST, coast.BUOY, (7, 5)),
        (coast.COAST, coast.PARASOL, (14, 12)),
    ],
    ids=lambda value: "" if isinstance(value, Scene) else None,
)
def test_unhidden_things_are_not_tiny(scene: Scene, class_id: int, least: tuple[int, int]) -> None:
    # the nearest thing of a class in a picture is the least hidden
    sizes: list[tuple[int, int]] = []
    for index in range(60):
        _, segments, classes = draw(scene.class_names, 7, "train", index, SIZE)
        boxes = []
        for segment in np.flatnonzero(np.array(classes) == class_id):
            rows, columns = np.nonzero(segments == segment)
            if columns.min() > 0 and columns.max() < SIZE[1] - 1:
                boxes.append((int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1))
        if boxes:
            sizes.append(max(boxes))
    whole = [height >= least[0] and width >= least[1] for height, width in sizes]
    assert np.mean(whole) > 0.9


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_the_best_colour_lookup_does_not_solve_it(drawn: Drawn, bits: int) -> None:
    count = len(drawn.scene.class_names)

    def colours(images: np.ndarray) -> np.ndarray:
        levels = images.astype(np.int64) >> (8 - bits)
        return (levels[..., 0] << 2 * bits) + (levels[..., 1] << bits) + levels[..., 2]

    counted = drawn.train_maps != 255
    pairs = colours(drawn.train)[counted] * count + drawn.train_maps[counted]
    table = np.bincount(pairs, minlength=count << 3 * bits).reshape(-1, count).argmax(1)
    assert mean_iou(table[colours(drawn.val)], drawn.val_maps, count) < 0.35


def test_neither_the_commonest_class_nor_the_place_alone_solves_it(drawn: Drawn) -> None:
    count = len(drawn.scene.class_names)
    shares = np.stack([(drawn.train_maps == class_id).mean(0) for class_id in range(count)])  # (C, h, w)
    commonest = int(shares.mean((1, 2)).argmax())
    assert mean_iou(np.full_like(drawn.val_maps, commonest), drawn.val_maps, count) < 0.1
    assert mean_iou(np.broadcast_to(shares.argmax(0), drawn.val_maps.shape), drawn.val_maps, count) < 0.45


def test_settings_that_cannot_be_drawn_are_refused() -> None:
    with pytest.raises(ValueError, match=r"generate\.height is 16; layout shapes needs at least 64"):
        shapes.records(config(height=16), [], "train")
    with pytest.raises(ValueError, match=r"generate\.val is 0"):
        shapes.records(config(val=0), [], "val")
    message = "draws scenes of sky, hill, road, .*, sign or of sky, hill, water, .*, parasol; class_names lists others"
    with pytest.raises(ValueError, match=message):
        shapes.records(DatasetConfig(layout="shapes", class_names=("a",)), [], "train")
