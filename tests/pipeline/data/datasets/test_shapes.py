from __future__ import annotations

import numpy as np
import pytest

from pipeline.data.datasets import shapes
from pipeline.params.schema import DatasetConfig

SIZE = (128, 192)


def config(**generate: int) -> DatasetConfig:
    settings = {"train": 3, "val": 2, "height": 128, "width": 192, "seed": 7, **generate}
    return DatasetConfig(layout="shapes", class_names=shapes.CLASS_NAMES, generate=settings)


def label_map(segments: np.ndarray, classes: tuple[int, ...]) -> np.ndarray:
    lookup = np.full(256, 255)
    lookup[: len(classes)] = classes
    return lookup[segments]


@pytest.fixture(scope="module")
def scenes() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """120 training and 40 validation pictures, (N, h, w, 3), and their label maps, (N, h, w)."""
    train = [shapes.draw(7, "train", index, SIZE) for index in range(120)]
    val = [shapes.draw(7, "val", index, SIZE) for index in range(40)]
    images = [np.stack([scene[0] for scene in split]) for split in (train, val)]
    maps = [np.stack([label_map(*scene[1:]) for scene in split]) for split in (train, val)]
    return images[0], maps[0], images[1], maps[1]


def mean_iou(prediction: np.ndarray, truth: np.ndarray) -> float:
    counted = truth != 255
    pairs = np.bincount(truth[counted] * 9 + prediction[counted], minlength=81).reshape(9, 9)
    return float(np.mean(np.diag(pairs) / (pairs.sum(0) + pairs.sum(1) - np.diag(pairs))))


def test_a_picture_depends_on_seed_split_and_index_only() -> None:
    later = shapes.records(config(train=9), [], "train")[2].read()
    alone = shapes.records(config(), [], "train")[2].read()
    assert later.image == alone.image
    np.testing.assert_array_equal(later.segments, alone.segments)
    others = [shapes.draw(*key, SIZE)[0] for key in ((7, "train", 2), (8, "train", 2), (7, "val", 2), (7, "train", 3))]
    assert all(np.any(others[0] != other) for other in others[1:])


def test_every_class_is_common_enough_to_learn(scenes: tuple[np.ndarray, ...]) -> None:
    _, maps, _, _ = scenes
    holding = [np.mean([(labels == class_id).any() for labels in maps]) for class_id in range(9)]
    assert min(holding) > 0.3, dict(zip(shapes.CLASS_NAMES, holding, strict=True))
    assert np.mean(maps == 255) < 0.01


def test_things_have_a_segment_each_and_stuff_one_per_class() -> None:
    for index in range(20):
        _, segments, classes = shapes.draw(7, "train", index, SIZE)
        stuff = [class_id for class_id in classes if class_id not in shapes.THINGS]
        assert len(stuff) == len(set(stuff))
        counts = np.bincount(segments[segments != 255], minlength=len(classes))
        assert len(counts) == len(classes)
        assert all(
            count >= (shapes.SLIVER_PIXELS if class_id in shapes.THINGS else 1)
            for count, class_id in zip(counts, classes, strict=True)
        )


def test_unhidden_things_are_not_tiny() -> None:
    # the nearest thing of a class in a picture is the least hidden: persons at least 8 x 16, signs 8 x 8
    sizes: dict[int, list[tuple[int, int]]] = {shapes.PERSON: [], shapes.SIGN: [], shapes.CAR: []}
    for index in range(60):
        _, segments, classes = shapes.draw(7, "train", index, SIZE)
        for class_id, found in sizes.items():
            boxes = []
            for segment in np.flatnonzero(np.array(classes) == class_id):
                rows, columns = np.nonzero(segments == segment)
                if columns.min() > 0 and columns.max() < SIZE[1] - 1:
                    boxes.append((int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1))
            if boxes:
                found.append(max(boxes))
    for class_id, least in ((shapes.PERSON, (16, 8)), (shapes.SIGN, (8, 8)), (shapes.CAR, (10, 12))):
        whole = [height >= least[0] and width >= least[1] for height, width in sizes[class_id]]
        assert np.mean(whole) > 0.9, shapes.CLASS_NAMES[class_id]


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_the_best_colour_lookup_does_not_solve_it(scenes: tuple[np.ndarray, ...], bits: int) -> None:
    train, train_maps, val, val_maps = scenes

    def colours(images: np.ndarray) -> np.ndarray:
        levels = images.astype(np.int64) >> (8 - bits)
        return (levels[..., 0] << 2 * bits) + (levels[..., 1] << bits) + levels[..., 2]

    counted = train_maps != 255
    pairs = np.bincount(colours(train)[counted] * 9 + train_maps[counted], minlength=9 << 3 * bits)
    table = pairs.reshape(-1, 9).argmax(1)
    assert mean_iou(table[colours(val)], val_maps) < 0.35


def test_neither_the_commonest_class_nor_the_place_alone_solves_it(scenes: tuple[np.ndarray, ...]) -> None:
    _, train_maps, _, val_maps = scenes
    shares = np.stack([(train_maps == class_id).mean(0) for class_id in range(9)])  # (9, h, w)
    commonest = int(shares.mean((1, 2)).argmax())
    assert mean_iou(np.full_like(val_maps, commonest), val_maps) < 0.1
    assert mean_iou(np.broadcast_to(shares.argmax(0), val_maps.shape), val_maps) < 0.45


def test_settings_that_cannot_be_drawn_are_refused() -> None:
    with pytest.raises(ValueError, match=r"generate\.height is 16; layout shapes needs at least 64"):
        shapes.records(config(height=16), [], "train")
    with pytest.raises(ValueError, match=r"generate\.val is 0"):
        shapes.records(config(val=0), [], "val")
    with pytest.raises(ValueError, match="draws the classes sky, hill, road"):
        shapes.records(DatasetConfig(layout="shapes", class_names=("a",)), [], "train")
