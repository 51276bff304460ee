from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from m2f.draws import mix
from pipeline.data.images.codecs import decode_masks
from pipeline.data.loader import train_batches
from pipeline.data.loader.augmentation import seed_transform, training_transform
from pipeline.data.loader.train_batches import Batch, TrainingOrder, epoch_order, training_batches
from pipeline.data.loader.val_images import validation_images
from pipeline.data.shards import reader
from pipeline.storage.results.data import Manifest
from tests.helpers.images import image, instance, labels, rectangle, stored, write_shards
from tests.helpers.loading import (
    LAYOUTS,
    TEST,
    THINGS,
    augmentation,
    batches,
    crossing,
    images_of,
    many,
    shard_path,
    street,
)


def test_an_epoch_is_a_permutation_and_the_next_one_another() -> None:
    orders = [epoch_order(5, epoch, 50) for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert epoch_order(6, 0, 50) != orders[0] == epoch_order(5, 0, 50)


def test_steps_walk_through_epoch_after_epoch(manifest: Manifest) -> None:
    # 7 pictures in steps of 4: 16 positions hold two whole epochs and two pictures of the third
    names = [name for batch in batches(manifest) for name in batch.names]
    expected = [f"p{index}" for epoch in range(3) for index in epoch_order(5, epoch, 7)]
    assert names == expected[:16]


@pytest.mark.parametrize("processes", [1, 2])
def test_loader_processes_change_nothing(manifest: Manifest, processes: int) -> None:
    # OpenCV's own threads are running here: processes forked now must not wait for them
    cv2.setNumThreads(4)
    cv2.GaussianBlur(np.zeros((2000, 2000, 3), np.uint8), (0, 0), 3)
    alone, others = batches(manifest), batches(manifest, processes=processes)
    assert [batch.positions for batch in alone] == [batch.positions for batch in others]
    assert images_of(alone) == images_of(others)
    shown = [list(validation_images(manifest, TEST, processes=count)) for count in (0, processes)]
    assert [val_image.name for val_image in shown[0]] == [val_image.name for val_image in shown[1]]
    assert all(torch.equal(a.image, b.image) for a, b in zip(*shown, strict=True))


def test_workers_and_restarts_see_the_same_pictures(manifest: Manifest) -> None:
    whole = images_of(batches(manifest))
    shared = images_of(batches(manifest, image_range=range(2))) | images_of(batches(manifest, image_range=range(2, 4)))
    restarted = images_of(batches(manifest, steps=1)) | images_of(batches(manifest, first_step=1, steps=3))
    assert whole == shared == restarted
    assert whole != images_of(batches(manifest, seed=6))


def test_every_picture_carries_its_seed(manifest: Manifest) -> None:
    for batch in batches(manifest, image_range=range(1, 3)):
        assert batch.seeds == tuple(mix(5, 3, position) for position in batch.positions)


def test_segments_index_the_labels_that_are_there_and_padding_is_nothing(manifest: Manifest) -> None:
    for batch in batches(manifest, steps=20):
        assert batch.images.shape == (4, 3, 32, 32)
        assert batch.images.dtype == batch.segments.dtype == torch.uint8
        for place in range(4):
            height, width = batch.sizes[place].tolist()
            padding = torch.ones(32, 32, dtype=torch.bool)
            padding[:height, :width] = False
            assert (batch.segments[place][padding] == 255).all()
            present = torch.unique(batch.segments[place])
            assert present[present != 255].tolist() == list(range(len(batch.labels[place])))
            assert batch.labels[place].tolist() == sorted(batch.labels[place].tolist())


def test_a_picture_smaller_than_the_crop_comes_through_unchanged(manifest: Manifest) -> None:
    plain = augmentation(short_sides=(12,), flip=0.0, photometric=False)
    (batch,) = batches(manifest, plain, steps=1, global_batch=1, image_range=range(1))
    expected = image(seed=int(batch.names[0][1:]))
    assert batch.sizes.tolist() == [[12, 16]]
    np.testing.assert_array_equal(batch.images[0, :, :12, :16].permute(1, 2, 0).numpy(), expected)
    np.testing.assert_array_equal(batch.segments[0, :12, :16].numpy(), np.where(labels() == 9, 255, labels()))


def test_a_picture_with_no_labelled_pixel_has_no_labels(storage: Path) -> None:
    record = stored("p0", image(), np.full((12, 16), 255, np.uint8))
    manifest = write_shards(storage, {"train": [record], "val": [record]})
    for batch in batches(manifest):
        assert [len(found) for found in batch.labels] == [0, 0, 0, 0]
        assert (batch.segments == 255).all()
    (val_image,) = validation_images(manifest, TEST)
    assert val_image.labels.tolist() == []
    assert (val_image.label_map == 255).all()


@pytest.mark.parametrize(("counts", "dtype", "nothing"), [((4, 7), torch.uint8, 255), ((4, 300), torch.int32, -1)])
def test_panoptic_segments_keep_their_classes_also_when_there_are_many(
    storage: Path, counts: tuple[int, ...], dtype: torch.dtype, nothing: int
) -> None:
    records = [many(f"p{index}", count) for index, count in enumerate(counts)]
    manifest = write_shards(storage, {"train": records, "val": records}, **THINGS)
    plain = augmentation(short_sides=(20,), flip=0.0)
    (batch,) = batches(manifest, plain, task="panoptic", steps=1, global_batch=2, image_range=range(2))
    assert batch.segments.dtype == dtype
    for place, name in enumerate(batch.names):
        count = counts[int(name[1:])]
        assert batch.labels[place].tolist() == [2 - index % 2 for index in range(count)]
        expected = np.arange(400) % count
        expected[-1] = nothing
        np.testing.assert_array_equal(batch.segments[place, :20, :20].numpy().ravel(), expected)
        assert (batch.segments[place, 20:] == nothing).all()
    shown = list(validation_images(manifest, TEST, task="panoptic"))
    assert [len(val_image.labels) for val_image in shown] == list(counts)
    assert shown[1].label_map[0, :4].tolist() == [2, 1, 2, 1]
    assert shown[1].label_map[-1, -1] == 255


def one(manifest: Manifest, task: str, **changes: Any) -> Batch:
    """The first training picture as it is, not resized."""
    plain = augmentation(short_sides=(8,), flip=0.0, photometric=False, **changes)
    (batch,) = batches(manifest, plain, task=task, steps=1, global_batch=1, image_range=range(1))
    return batch


def test_a_panoptic_target_has_no_crowds_and_one_segment_for_stuff_of_a_class(storage: Path) -> None:
    batch = one(write_shards(storage, {"train": [street()]}, **THINGS), "panoptic")
    assert [class_ids.tolist() for class_ids in batch.labels] == [[1, 0]]  # the car had the lowest id
    expected = np.array([1, 1, 0, 0, 255, 255, 1, 1], np.uint8)[None].repeat(8, 0)
    expected[-1] = 255
    np.testing.assert_array_equal(batch.segments[0, :8, :8].numpy(), expected)
    assert batch.masks is None


def test_a_semantic_target_has_one_segment_for_every_class_and_keeps_crowds(storage: Path) -> None:
    batch = one(write_shards(storage, {"train": [street()]}, **THINGS), "semantic")
    assert [class_ids.tolist() for class_ids in batch.labels] == [[0, 1]]
    assert batch.segments[0, 0, :8].tolist() == [0, 0, 1, 1, 1, 1, 0, 0]


def test_thing_segments_are_the_instances_where_there_are_no_others(storage: Path) -> None:
    manifest = write_shards(storage, {"train": [street()], "val": [street()]}, **THINGS)
    batch = one(manifest, "instance")
    assert batch.segments is None
    assert [class_ids.tolist() for class_ids in batch.labels] == [
        [0]
    ]  # car is the first of the things; the crowd is left out
    assert batch.masks[0].dtype == torch.bool
    expected = np.zeros((32, 32), bool)
    expected[:7, 2:4] = True
    np.testing.assert_array_equal(batch.masks[0].numpy(), expected[None])
    (val_image,) = validation_images(manifest, TEST, task="instance")
    assert val_image.instances.labels.tolist() == [0, 0]
    assert val_image.instances.crowd.tolist() == [False, True]
    assert val_image.instances.areas.tolist() == [14, 14]  # 7 rows of 2
    decoded = decode_masks(val_image.instances.run_lengths, (8, 8))
    np.testing.assert_array_equal(decoded, [rectangle((8, 8), 2, 0, 4, 7), rectangle((8, 8), 4, 0, 6, 7)])


def test_an_instance_target_has_masks_that_may_overlap_and_classes_counted_among_the_things(storage: Path) -> None:
    manifest = write_shards(storage, {"train": [crossing()]}, **{**THINGS, "labels": ("instances",)})
    batch = one(manifest, "instance")
    assert [class_ids.tolist() for class_ids in batch.labels] == [[0, 1]]
    assert batch.masks[0].shape == (2, 32, 32)
    np.testing.assert_array_equal(batch.masks[0][:, :8, :8], [rectangle((8, 8), *box) for box in OVERLAPPING])
    assert batch.masks[0].sum() == 32


OVERLAPPING = ((0, 0, 4, 4), (2, 2, 6, 6))


@pytest.mark.parametrize(
    ("labels", "task", "lacking"),
    [
        (("instances",), "semantic", "no semantic labels, which the task semantic needs, but instances"),
        (("semantic",), "panoptic", "no panoptic labels, which the task panoptic needs, but semantic"),
        (
            ("panoptic", "semantic"),
            "instance",
            "no instances labels, .* instance needs, but panoptic and semantic; give",
        ),
    ],
)
def test_labels_that_a_task_needs_and_the_dataset_lacks_are_named(
    storage: Path, labels: tuple[str, ...], task: Any, lacking: str
) -> None:
    manifest = write_shards(storage, {"train": [street()], "val": [street()]}, **{**THINGS, "labels": labels})
    with pytest.raises(ValueError, match=lacking):
        batches(manifest, task=task)
    with pytest.raises(ValueError, match=lacking):
        list(validation_images(manifest, TEST, task=task))


def test_the_crop_rule_counts_classes_for_semantic_rows_and_segments_for_panoptic_ones(storage: Path) -> None:
    # 8 x 160: cars of 4 columns that touch, then 8 columns of sky; crops of 8 x 16 start in one of 145 places. From the
    # last 4 of them cars cover less than 12 of 16 columns, which is 3 in 4.
    ids = (np.arange(160) // 4)[None].repeat(8, 0).astype(np.uint8)
    ids[:, 152:] = 40
    manifest = write_shards(storage, {"train": [stored("p0", image(8, 160), ids, [1] * 40 + [0])]}, **THINGS)
    plan = augmentation(crop=(8, 16), short_sides=(8,), long_side_max=160, photometric=False)
    much_sky = {}
    for task in ("semantic", "panoptic"):
        found = batches(manifest, plan, task=task, steps=100)
        maps = [(batch.segments[b], batch.labels[b].tolist()) for batch in found for b in range(4)]
        much_sky[task] = sum(
            ((ids == class_ids.index(0)).float().mean() > 0.25).item() for ids, class_ids in maps if 0 in class_ids
        )
    # panoptic, one draw: 400 * 4 / 145 = 11 +- 3; semantic, ten more: 400 * (1 - (1 - 4 / 145) ** 11) = 106 +- 9
    assert much_sky["panoptic"] < 25
    assert 70 < much_sky["semantic"] < 142


JITTER = {"short_sides": (), "long_side_max": 0, "photometric": False}


def corners() -> np.ndarray:
    """16 x 16: two pixels, in opposite corners, so that the box is the whole picture."""
    mask = np.zeros((16, 16), bool)
    mask[0, 0] = mask[15, 15] = True
    return mask


def test_a_panoptic_thing_whose_box_meets_the_crop_stays_also_without_pixels(storage: Path) -> None:
    # shown at 32 x 32 and cropped to 16 x 16: the corners are rarely seen, but their box always touches the crop
    ids = np.zeros((16, 16), np.uint8)  # sky
    ids[:, 14:] = 3  # sky of a class's second segment, in the right seventh
    ids[4:6, 2:4] = 2  # a person
    ids[corners()] = 1  # a car
    manifest = write_shards(storage, {"train": [stored("p0", image(16, 16), ids, [0, 1, 2, 0])]}, **THINGS)
    jitter = augmentation(crop=(16, 16), jitter=(2.0, 2.0), **JITTER)
    empty, persons = 0, 0
    for batch in batches(manifest, jitter, task="panoptic", steps=20):
        for segments, class_ids in zip(batch.segments, batch.labels, strict=True):
            seen = torch.unique(segments).tolist()
            assert class_ids.tolist()[:2] == [0, 1]
            empty += 1 not in seen
            assert (2 in class_ids.tolist()) == (len(seen) + (1 not in seen) == 3)  # its pixels fill its box
            persons += 2 in class_ids.tolist()
    assert 60 < empty < 80
    assert 0 < persons < 80
    resized = augmentation(crop=(16, 16), short_sides=(32,), max_label_share=1.0)
    for batch in batches(manifest, resized, task="panoptic", steps=20):
        for segments, class_ids in zip(batch.segments, batch.labels, strict=True):
            assert torch.unique(segments).tolist() == list(range(len(class_ids)))


@pytest.mark.parametrize("resized", [{"jitter": (2.0, 2.0), **JITTER}, {"short_sides": (32,)}])
def test_an_instance_without_pixels_in_the_crop_is_no_target(storage: Path, resized: dict[str, Any]) -> None:
    objects = [instance(1, corners()), instance(2, np.ones((16, 16), bool))]
    manifest = write_shards(storage, {"train": [stored("p0", image(16, 16), instances=objects)]}, **THINGS)
    found = [
        (masks.any(dim=(1, 2)), class_ids.tolist())
        for batch in batches(manifest, augmentation(crop=(16, 16), **resized), task="instance", steps=20)
        for masks, class_ids in zip(batch.masks, batch.labels, strict=True)
    ]
    assert all(seen.all() for seen, _ in found)
    assert {tuple(class_ids) for _, class_ids in found} == {(1,), (0, 1)}


TWICE: list[dict[str, Any]] = [{"jitter": (2.0, 2.0), **JITTER}, {"short_sides": (32,), "max_label_share": 1.0}]
"""Both ways to show pictures of 16 x 16 at 32 x 32."""


def test_by_detectron2s_rules_instances_without_pixels_stay_targets_unless_jittered(storage: Path) -> None:
    objects = [instance(1, corners()), instance(2, np.ones((16, 16), bool))]
    manifest = write_shards(storage, {"train": [stored("p0", image(16, 16), instances=objects)]}, **THINGS)
    for resized, targets in zip(TWICE, ({(1,), (0, 1)}, {(0, 1)}), strict=True):
        plan = augmentation(crop=(16, 16), rules="detectron2", **resized)
        made = batches(manifest, plan, task="instance", steps=20)
        assert {tuple(classes.tolist()) for batch in made for classes in batch.labels} == targets


@pytest.mark.parametrize("resized", TWICE)
def test_by_detectron2s_rules_every_panoptic_segment_stays_a_target(storage: Path, resized: dict[str, Any]) -> None:
    ids = np.zeros((16, 16), np.uint8)  # sky
    ids[4:6, 2:4] = 1  # a car, of which most crops show nothing
    manifest = write_shards(storage, {"train": [stored("p0", image(16, 16), ids, [0, 1])]}, **THINGS)
    jitter = augmentation(crop=(16, 16), rules="detectron2", **resized)
    made = batches(manifest, jitter, task="panoptic", steps=20)
    shown = [
        (labels.tolist(), bool((each == 1).any()))
        for b in made
        for each, labels in zip(b.segments, b.labels, strict=True)
    ]
    assert all(class_ids == [0, 1] for class_ids, _ in shown)
    assert 0 < sum(seen for _, seen in shown) < len(shown)


def test_by_detectron2s_rules_a_picture_may_keep_no_instance_and_is_padded_with_grey(storage: Path) -> None:
    # at a tenth the small cars vanish, as below
    jitter = augmentation(jitter=(0.1, 0.1), rules="detectron2", **JITTER)
    targets: dict[str, set[int]] = {}
    for batch in batches(vanishing(storage), jitter, task="instance"):
        assert batch.sizes.tolist() == [list(batch.images.shape[2:])] * len(batch.sizes)
        assert (batch.images[:, :, 3:] == 128).all() and (batch.images[:, :, :, 3:] == 128).all()
        assert not (batch.images[:, :, :3, :3] == 128).all()
        for name, classes in zip(batch.names, batch.labels, strict=True):
            targets.setdefault(name, set()).add(len(classes))
    assert targets == {"p0": {0}, "p1": {0}, "p2": {0}, "p3": {0}, "p4": {1}}


def vanishing(storage: Path, **changes: Any) -> Manifest:
    """Five pictures of 32 x 32: p0 to p3 show a car of one pixel, p4 one that fills half of it."""
    small, large = rectangle((32, 32), 5, 5, 6, 6), rectangle((32, 32), 0, 0, 32, 16)
    records = [
        stored(
            f"p{index}", image(32, 32, seed=index), instances=[instance(1, large if index == 4 else small, **changes)]
        )
        for index in range(5)
    ]
    return write_shards(storage, {"train": records}, per_shard=2, **THINGS)


def test_another_picture_is_drawn_where_the_crop_shows_no_pixel_of_its_instances(storage: Path) -> None:
    # at a tenth, 3 x 3, nearest shows rows and columns 0, 10 and 21: the small cars vanish
    manifest, jitter = vanishing(storage), augmentation(jitter=(0.1, 0.1), **JITTER)
    found = images_of(batches(manifest, jitter, task="instance"))
    assert {name for name, *_ in found.values()} == {"p4"}
    attempts = {}
    for position, (_, seed, size, class_ids, pixels, *_) in found.items():
        tried = [epoch_order(5, position // 5, 5)[position % 5]]
        while tried[-1] != 4:
            tried.append(mix(5, 5, position, len(tried)) % 5)
        attempts[position] = len(tried) - 1
        transform = training_transform(jitter)
        again = (attempts[position],) if attempts[position] else ()
        seed_transform(transform, mix(5, 2, position, *again) % 2**32)
        expected = transform(image=image(32, 32, seed=4))["image"]
        assert (size, class_ids, seed) == ((3, 3), [0], mix(5, 3, position))
        assert pixels == np.ascontiguousarray(expected.transpose(2, 0, 1)).tobytes()
    assert 0 in attempts.values()
    assert max(attempts.values()) > 2


def test_a_redraw_does_not_depend_on_processes_workers_or_restarts(storage: Path) -> None:
    manifest, jitter = vanishing(storage), augmentation(jitter=(0.1, 2.0), **JITTER)
    settings: dict[str, Any] = {"task": "instance", "images": "with_things"}
    whole = images_of(batches(manifest, jitter, **settings))
    order = [f"p{index}" for epoch in range(4) for index in epoch_order(5, epoch, 5)]
    redrawn = [position for position, (name, *_) in whole.items() if name != order[position]]
    assert 0 < len(redrawn) < 16
    parts = (range(1), range(1, 4))
    shared = [images_of(batches(manifest, jitter, image_range=part, **settings)) for part in parts]
    restarted = [images_of(batches(manifest, jitter, first_step=at, steps=2, **settings)) for at in (0, 2)]
    assert whole == shared[0] | shared[1] == restarted[0] | restarted[1]
    assert whole == images_of(batches(manifest, jitter, processes=2, **settings))


def test_a_crop_beside_all_instances_is_trained_on_as_it_is(storage: Path) -> None:
    # shown at 32 x 32, cropped to 16 x 16 at offsets 0 to 16: 8 of 17 see something of the corner's 8 pixels, each way
    corner = instance(1, rectangle((16, 16), 0, 0, 4, 4))
    records = [stored(f"p{index}", image(16, 16), instances=[corner]) for index in range(4)]
    manifest = write_shards(storage, {"train": records}, **THINGS)
    found = batches(manifest, augmentation(crop=(16, 16), jitter=(2.0, 2.0), **JITTER), task="instance", steps=10)
    order = [f"p{index}" for epoch in range(10) for index in epoch_order(5, epoch, 4)]
    assert [name for batch in found for name in batch.names] == order
    counts = [len(masks) for batch in found for masks in batch.masks]
    assert 20 < counts.count(0) < 40  # (1 - (8 / 17) ** 2) * 40 = 31 +- 3
    assert all(masks.shape[1:] == (16, 16) for batch in found for masks in batch.masks)


def test_a_crowd_is_no_target_but_its_pixels_keep_the_crop(storage: Path) -> None:
    small = rectangle((32, 32), 5, 5, 6, 6)
    objects = [instance(1, np.ones((32, 32), bool), crowd=True), instance(1, small)]
    records = [stored(f"p{index}", image(32, 32), instances=objects) for index in range(4)]
    manifest = write_shards(storage, {"train": records}, **THINGS)
    found = batches(manifest, augmentation(jitter=(0.1, 0.1), **JITTER), task="instance", steps=1)
    assert [f"p{index}" for index in epoch_order(5, 0, 4)] == [name for batch in found for name in batch.names]
    assert [class_ids.tolist() for batch in found for class_ids in batch.labels] == [[], [], [], []]


def test_pictures_whose_instances_never_show_end_in_a_sentence(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_batches, "DRAWS", 5)
    small = instance(1, rectangle((32, 32), 5, 5, 6, 6))
    manifest = write_shards(storage, {"train": [stored("p0", image(32, 32), instances=[small])]}, **THINGS)
    with pytest.raises(ValueError, match="dataset mine: 5 training images were drawn for position 0, .*: p0; check"):
        batches(manifest, augmentation(jitter=(0.1, 0.1), **JITTER), task="instance")


def test_only_pictures_with_things_that_are_large_enough_are_taken(storage: Path) -> None:
    sizes = {"p0": (40, 32, 0), "p1": (32, 40, 1), "p2": (31, 40, 1), "p3": (40, 31, 2), "p4": (50, 50, 3)}
    records = [
        stored(name, image(height, width), np.zeros((height, width), np.uint8), [0], things=things)
        for name, (height, width, things) in sizes.items()
    ]
    manifest = write_shards(storage, {"train": records}, per_shard=2, **THINGS)
    found = batches(manifest, task="panoptic", images="with_things", steps=3)
    names = [name for batch in found for name in batch.names]
    assert names == [f"p{(1, 4)[place]}" for epoch in range(6) for place in epoch_order(5, epoch, 2)]
    assert {name for batch in batches(manifest, task="panoptic") for name in batch.names} == set(sizes)
    manifest = write_shards(storage, {"train": records[:1]}, **THINGS)
    with pytest.raises(
        ValueError, match="no training image with things and sides of at least 32 px; set `images: all`"
    ):
        batches(manifest, task="panoptic", images="with_things")


PLANS = {
    "short sides": {"short_sides": (12, 24, 36)},
    "jitter": {"short_sides": (), "long_side_max": 0, "jitter": (0.5, 3.0)},
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_both_layouts_give_the_same_pictures_in_all_tasks(storage: Path, task: Any, plan: str) -> None:
    records = [street(), {**street(), "name": "p1", "instances": crossing()["instances"]}, many("p2", 300)]
    found, shown = {}, {}
    for layout in LAYOUTS:
        manifest = write_shards(storage, {"train": records, "val": records}, layout=layout, **THINGS)
        found[layout] = images_of(batches(manifest, augmentation(crop=(16, 16), **PLANS[plan]), task=task))
        shown[layout] = list(validation_images(manifest, TEST, task=task))
    assert found["raw"] == found["encoded"]
    assert len({entry[4] for entry in found["raw"].values()}) == 16  # no two alike
    for a, b in zip(shown["raw"], shown["encoded"], strict=True):
        for name in ("image", "label_map", "segments", "labels", "crowd"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        if a.instances is not None:
            assert a.instances.run_lengths == b.instances.run_lengths


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_equal_resizing_everything_and_then_cropping(
    storage: Path, monkeypatch: pytest.MonkeyPatch, layout: str, plan: str
) -> None:
    # real edges matter: 40 x 60 noise in crops of 24 x 24, beside whole pictures resized by OpenCV
    random = np.random.default_rng(0)
    records = [
        stored(f"p{index}", image(40, 60, seed=index), random.integers(0, 3, (40, 60)).astype(np.uint8), [1, 2, 0])
        for index in range(4)
    ]
    manifest = write_shards(storage, {"train": records}, layout=layout, **THINGS)
    plain = {"crop": (24, 24), "photometric": False, **PLANS[plan]}
    resized = augmentation(**{**plain, "short_sides": (30, 47, 80)} if plan == "short sides" else plain)
    ours = {task: batches(manifest, resized, task=task, steps=10) for task in ("semantic", "panoptic", "instance")}

    def whole_image(image: np.ndarray, size: Any, part: Any, *, mirrored: bool) -> np.ndarray:
        turned = np.ascontiguousarray(image[:, ::-1] if mirrored else image)
        return cv2.resize(turned, size[::-1], interpolation=cv2.INTER_LINEAR)[part]

    def whole_ids(ids: np.ndarray, size: Any, part: Any, *, mirrored: bool = False) -> np.ndarray:
        turned = np.ascontiguousarray(ids[:, ::-1] if mirrored else ids)
        return cv2.resize(turned, size[::-1], interpolation=cv2.INTER_NEAREST)[part].copy()

    monkeypatch.setattr("pipeline.data.loader.augmentation.resize_image", whole_image)
    monkeypatch.setattr("pipeline.data.loader.augmentation.resize_ids", whole_ids)
    for task, found in ours.items():
        for a, b in zip(found, batches(manifest, resized, task=task, steps=10), strict=True):
            assert (a.images.int() - b.images.int()).abs().max() <= 2
            assert (a.names, a.sizes.tolist()) == (b.names, b.sizes.tolist())
            assert [class_ids.tolist() for class_ids in a.labels] == [class_ids.tolist() for class_ids in b.labels]
            if task == "instance":
                assert all(torch.equal(mine, other) for mine, other in zip(a.masks, b.masks, strict=True))
            else:
                assert torch.equal(a.segments, b.segments)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells which pages are in use")
def test_of_a_raw_picture_only_the_pages_of_the_crop_are_read(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 3,000 x 2,000 pixels are 17 MiB, a crop's 64 rows of 6,000 bytes 375 KiB, of the labels 125 KiB; at a scale of
    # 1.1, where a crop does not begin with a source pixel
    ids = np.arange(3000 * 2000, dtype=np.uint32).reshape(3000, 2000).astype(np.uint8) % 3
    manifest = write_shards(storage, {"train": [stored("p0", image(3000, 2000), ids)]}, layout="raw")
    plan = augmentation(crop=(64, 64), short_sides=(2201,), long_side_max=10_000, max_label_share=1.0)
    # a file that was read may lie in pages of 2 MiB
    monkeypatch.setattr(reader, "verify_shards", lambda *_: None)
    split = reader.SplitReader.of(manifest, "train", "semantic")
    source = train_batches._Training(split, train_batches._chosen(split, "all"), plan, 5, 1, range(1), None)
    source.split[0]  # the map is opened
    before = resident_kib(shard_path(storage, manifest))
    source[0]
    assert 400 < resident_kib(shard_path(storage, manifest)) - before < 5000  # more than one page is mapped at a time
    _ = source.split[0].image().sum(), source.split[0].segments().ids.sum()
    assert resident_kib(shard_path(storage, manifest)) > 23_000


def resident_kib(path: Path) -> int:
    """How much of a memory-mapped file this process has touched."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    return sum(
        int(next(line for line in lines if line.startswith("Rss:")).split()[1]) for line in lines if str(path) in line
    )


def test_a_loader_can_be_sent_to_a_spawned_process(manifest: Manifest) -> None:
    split = reader.SplitReader.of(manifest, "train", "semantic")
    source = train_batches._Training(split, train_batches._chosen(split, "all"), augmentation(), 5, 4, range(4), None)
    first = source[0]
    copy = pickle.loads(pickle.dumps(source))
    assert images_of([copy[0]]) == images_of([first])


def test_an_unfinished_loader_can_be_dropped(manifest: Manifest) -> None:
    order = TrainingOrder(manifest=manifest, augmentation=augmentation(), seed=0, global_batch=4)
    endless = training_batches(order, first_step=0, steps=10**9, image_range=range(4), processes=1)
    assert [batch.positions[0] for batch in itertools.islice(endless, 3)] == [0, 4, 8]
    endless.close()


@pytest.mark.parametrize("task", ["semantic", "instance"])
def test_every_tensor_of_a_batch_is_pinned(storage: Path, task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # without a GPU there is no such memory: what asks for it notes the tensor and copies it
    pinned: list[torch.Tensor] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    manifest = write_shards(storage, {"train": [{**street(), "instances": crossing()["instances"]}]}, **THINGS)
    batch = one(manifest, task)
    assert not pinned
    other = batch.pin_memory()
    fields = [value if isinstance(value, tuple) else (value,) for value in vars(batch).values()]
    tensors = [each for field in fields for each in field if isinstance(each, torch.Tensor)]
    assert {id(tensor) for tensor in tensors} == {id(tensor) for tensor in pinned} and len(tensors) >= 4
    assert images_of([batch]) == images_of([other])
