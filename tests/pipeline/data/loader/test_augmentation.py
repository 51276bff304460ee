from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from pipeline.data.images.label_maps import label_counts
from pipeline.data.loader.augmentation import (
    Flip,
    LargeScaleJitter,
    PhotometricDistortion,
    ShortSideCrop,
    resize_ids,
    seed_transform,
    touching,
    training_transform,
)
from pipeline.params.schema import AugmentationConfig
from tests.helpers.images import mirror

REFERENCE = Path(__file__).parents[3] / "reference"


def augmentation(**changes: Any) -> AugmentationConfig:
    settings: dict[str, Any] = {"crop": (32, 64), "short_sides": (32, 48, 64), "long_side_max": 200}
    return AugmentationConfig(**{**settings, **changes})


def scene(height: int = 40, width: int = 60) -> tuple[np.ndarray, np.ndarray]:
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    labels = np.zeros((height, width), np.uint8)
    labels[:, width // 2 :] = 3
    labels[:5] = 255
    return image, labels


def test_one_seed_decides_everything() -> None:
    image, labels = scene()
    transform, other = training_transform(augmentation()), training_transform(augmentation())
    outcomes = []
    for seed in range(20):
        seed_transform(transform, seed)
        first = transform(image=image, mask=labels)
        seed_transform(other, seed)
        second = other(image=image, mask=labels)
        np.testing.assert_array_equal(first["image"], second["image"])
        np.testing.assert_array_equal(first["mask"], second["mask"])
        outcomes.append(first["image"].tobytes())
    assert len(set(outcomes)) == 20


def test_the_steps_draw_independently_of_each_other() -> None:
    # Were every step seeded alike, flips would come with the smallest sizes only.
    image, labels = scene()
    transform = training_transform(augmentation(photometric=False, max_label_share=1.0, crop=(128, 224)))
    flipped: dict[int, list[bool]] = {}
    for seed in range(600):
        seed_transform(transform, seed)
        mask = transform(image=image, mask=labels)["mask"]
        flipped.setdefault(mask.shape[0], []).append(mask[-1, 0] == 3)
    assert sorted(flipped) == [32, 48, 64]
    # 200 each: the share's standard error is 0.035
    assert all(abs(np.mean(flips) - 0.5) < 0.15 and abs(len(flips) - 200) < 60 for flips in flipped.values())


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_labels_keep_their_type_and_ids_and_follow_the_picture(dtype: type) -> None:
    labels = (np.arange(40)[:, None] // 10 + 4 * (np.arange(60)[None] // 20)).astype(dtype)  # 12 blocks
    image = np.repeat(labels[..., None].astype(np.uint8) * 20, 3, 2)
    transform = training_transform(augmentation(photometric=False))
    for seed in range(10):
        seed_transform(transform, seed)
        drawn = transform(image=image, mask=labels)
        assert drawn["mask"].dtype == dtype
        assert drawn["image"].shape[:2] == drawn["mask"].shape
        assert drawn["image"].shape[0] <= 32
        assert drawn["image"].shape[1] <= 64
        # the picture differs from the labels only where it blends two blocks, one pixel on each side of a border
        assert np.mean(drawn["image"][..., 0] == drawn["mask"] * 20) > 0.7


def test_a_crop_larger_than_the_picture_leaves_it_as_it_is() -> None:
    image, labels = scene()
    transform = training_transform(augmentation(crop=(256, 256), short_sides=(40,), photometric=False, flip=0.0))
    drawn = transform(image=image, mask=labels)
    np.testing.assert_array_equal(drawn["image"], image)
    np.testing.assert_array_equal(drawn["mask"], labels)


def test_a_crop_is_drawn_again_while_one_label_covers_too_much() -> None:
    # 8 x 800, one label but for 8 columns of another at the right end; crops of 8 x 16. A crop with both labels under
    # the limit starts in 785 +- a few columns; those that see 5 to 8 of the columns (4 starts of 785) pass 0.75.
    labels = np.zeros((8, 800), np.uint8)
    labels[:, 792:] = 1
    image = np.zeros((8, 800, 3), np.uint8)
    crop = ShortSideCrop((8, 16), (8,), 800, 0.75)
    passed = {True: 0, False: 0}
    for limit in (True, False):
        crop.max_label_share = 0.75 if limit else 1.0
        for seed in range(2000):
            crop.set_random_seed(seed)
            passed[limit] += int((crop(image=image, mask=labels)["mask"] == 1).mean() > 0.25)
    # one draw: 2000 * 4 / 785 = 10 +- 3; with ten more: 2000 * (1 - (1 - 4 / 785) ** 11) = 109 +- 10
    assert passed[False] < 25
    assert 65 < passed[True] < 155


def test_nothing_labelled_and_a_single_label_end_after_the_last_redraw() -> None:
    crop = ShortSideCrop((8, 8), (16,), 16, 0.75)
    for value in (255, 4):
        labels = np.full((16, 16), value, np.uint8)
        drawn = crop(image=np.zeros((16, 16, 3), np.uint8), mask=labels)
        assert (drawn["mask"] == value).all()
        assert drawn["mask"].shape == (8, 8)


@pytest.mark.parametrize(("label_of", "draws"), [([0, 0, 0, 0], 11), ([0, 1, 0, 1], 1), ([-1, -1, -1, -1], 11)])
def test_the_rule_counts_labels_where_ids_are_given_some(label_of: list[int], draws: int) -> None:
    ids = np.repeat(np.array([[0, 1, 2, 3]], np.uint16), 8, 0).repeat(4, 1)  # every crop shows two or three, half each
    crop = ShortSideCrop((8, 8), (8,), 16, 0.75)
    drawn = []
    crop._part = lambda size: drawn.append(size) or (slice(0, 8), slice(len(drawn) % 8, len(drawn) % 8 + 8))
    crop(image=np.zeros((8, 16, 3), np.uint8), mask=ids, label_of=np.array(label_of))
    assert drawn == [(8, 16)] * draws


def jittered(factor: float, crop: tuple[int, int], height: int, width: int) -> tuple[Any, np.ndarray]:
    """(size of the whole picture, the crop's size) when the factor is drawn."""
    jitter = LargeScaleJitter(crop, (factor, factor))
    shown = jitter(image=np.zeros((height, width, 3), np.uint8))["image"]
    return jitter.params["size"], shown.shape[:2]


@pytest.mark.parametrize(
    ("factor", "crop", "image", "size", "shown"),
    [
        (1.5, (1024, 1024), (480, 640), (1152, 1536), (1024, 1024)),  # s = 1536: scale 1536 / 640 = 2.4
        (1.5, (1024, 1024), (640, 480), (1536, 1152), (1024, 1024)),
        (0.5, (1024, 1024), (480, 640), (384, 512), (384, 512)),  # smaller than the crop
        (1.0, (1024, 1024), (480, 640), (768, 1024), (768, 1024)),
        (0.1, (1024, 1024), (480, 640), (77, 102), (77, 102)),  # s = 102.4 truncated; 480 * 102 / 640 = 76.5, half up
        (1.0, (512, 1024), (480, 640), (512, 683), (512, 683)),  # the short side may be 512, the long one 1024
        (0.1, (8, 8), (1000, 10), (1, 1), (1, 1)),  # never less than a pixel
    ],
)
def test_jitter_fits_the_picture_into_the_crop_times_a_factor(
    factor: float, crop: tuple[int, int], image: tuple[int, int], size: tuple[int, int], shown: tuple[int, int]
) -> None:
    assert jittered(factor, crop, *image) == (size, shown)


def test_the_jitters_factor_and_offsets_are_uniform() -> None:
    # 480 x 640 in 1024 x 1024: the width is 1024 times the factor, truncated, so 0.5 less in the mean
    jitter = LargeScaleJitter((1024, 1024), (0.1, 2.0))
    jitter.set_random_seed(0)
    drawn = [jitter.get_params_dependent_on_data({"shape": (480, 640, 3)}, {}) for _ in range(20_000)]
    factors = np.array([(params["size"][1] + 0.5) / 1024 for params in drawn])
    assert 0.1 <= factors.min() < 0.105
    assert 1.995 < factors.max() <= 2.001
    deviation = 1.9 / 12**0.5  # of U(0.1, 2)
    assert abs(factors.mean() - 1.05) < 4 * deviation / len(factors) ** 0.5
    assert abs(factors.std() - deviation) < 0.01
    assert np.abs(np.histogram(factors, 10, (0.1, 2.0))[0] - 2000).max() < 4 * 2000**0.5
    for axis in (0, 1):
        rooms = np.array([max(0, params["size"][axis] - 1024) for params in drawn])
        starts = np.array([params["part"][axis].start for params in drawn])
        assert (starts[rooms == 0] == 0).all()
        shares = (starts[rooms > 50] + 0.5) / (rooms[rooms > 50] + 1)  # U(0, 1)
        assert abs(shares.mean() - 0.5) < 4 * (1 / 12 / len(shares)) ** 0.5
        assert abs(shares.std() - 12**-0.5) < 0.01
        assert np.corrcoef(shares, factors[rooms > 50])[0, 1] < 4 / len(shares) ** 0.5
    tight = LargeScaleJitter((8, 8), (1.25, 1.25))  # 10 x 10: offsets 0, 1 and 2
    tight.set_random_seed(0)
    starts = [tight.get_params_dependent_on_data({"shape": (5, 5, 3)}, {})["part"][0].start for _ in range(3000)]
    assert np.abs(np.bincount(starts) - 1000).max() < 4 * (1000 * 2 / 3) ** 0.5


def test_by_detectron2s_rules_one_draw_is_the_share_of_both_sides_room() -> None:
    # 12 x 16 pixels of which 8 x 8 are shown: offsets 0 to 4 and 0 to 8, both rounded from one share
    jitter = LargeScaleJitter((8, 8), (2.0, 2.0), one_offset=True)
    jitter.set_random_seed(0)
    drawn = [jitter.get_params_dependent_on_data({"shape": (6, 8, 3)}, {}) for _ in range(400)]
    assert {params["size"] for params in drawn} == {(12, 16)}
    starts = {tuple(side.start for side in params["part"]) for params in drawn}
    assert all(abs(2 * top - left) <= 1 for top, left in starts)
    assert {left for _, left in starts} == {*range(9)}
    hues = set()
    for most_hue in (17, 18):
        distortion = PhotometricDistortion(most_hue=most_hue)
        distortion.set_random_seed(0)
        hues |= {(most_hue, distortion.get_params()["hue"]) for _ in range(1000)}
    assert max(hue for most, hue in hues if most == 17 and hue) == 17 and (18, 18) in hues and (18, -18) in hues


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_part_resized_to_the_nearest_is_that_part_of_the_whole(mirrored: bool) -> None:
    random = np.random.default_rng(0)
    for dtype in (np.uint8, np.uint16):
        for _ in range(100):
            ids = random.integers(0, 200, random.integers(1, 90, 2)).astype(dtype)
            height, width = random.integers(1, 200, 2).tolist()
            top, left = random.integers(0, height), random.integers(0, width)
            part = slice(top, top + 50), slice(left, left + 60)
            whole = cv2.resize(mirror(ids, mirrored), (width, height), interpolation=cv2.INTER_NEAREST)
            np.testing.assert_array_equal(resize_ids(ids, (height, width), part, mirrored=mirrored), whole[part])
            np.testing.assert_array_equal(resize_ids(ids, (height, width), mirrored=mirrored), whole)


PLANS = {
    "short sides": {"short_sides": (32, 48, 64), "max_label_share": 1.0},
    "jitter": {"short_sides": (), "long_side_max": 0, "jitter": (0.3, 2.0)},
}


@pytest.mark.parametrize("plan", PLANS)
def test_image_segments_masks_and_boxes_move_together(plan: str) -> None:
    segments = np.full((40, 60), 255, np.uint8)
    boxes = np.array([[3, 2, 23, 17], [30, 20, 55, 38], [0, 30, 5, 40]])
    for place, (x1, y1, x2, y2) in enumerate(boxes):
        segments[y1:y2, x1:x2] = place
    masks = (segments == np.arange(3)[:, None, None]).astype(np.uint8)
    image = np.repeat(segments[..., None], 3, 2) * np.uint8(60)
    transform = training_transform(augmentation(photometric=False, **PLANS[plan]))
    left_out = 0
    for seed in range(60):
        seed_transform(transform, seed)
        drawn = transform(image=image, mask=segments, masks=masks, boxes=boxes.astype(float))
        height, width = drawn["mask"].shape
        assert drawn["image"].shape[:2] == (height, width)
        assert height <= 32
        assert width <= 64
        same = drawn["image"][..., 0] == drawn["mask"] * np.uint8(60)
        assert np.mean(same) > 0.5  # but for the blended borders
        np.testing.assert_array_equal(drawn["masks"], drawn["mask"] == np.arange(3)[:, None, None])
        kept = touching(drawn["boxes"], height, width)
        left_out += int((~kept).sum())
        for mask, (x1, y1, x2, y2), inside in zip(drawn["masks"], drawn["boxes"], kept, strict=True):
            rows, columns = np.nonzero(mask)
            if not inside:
                assert not len(rows)
                continue
            if len(rows):  # the pixels fill the box as far as it is inside, but for rounding
                left, top = max(x1, 0), max(y1, 0)
                right, bottom = min(x2, width), min(y2, height)
                found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert np.abs(np.array(found) - (left, top, right, bottom)).max() <= 1
    assert left_out > 10


def test_the_jitter_scales_the_mirrored_picture() -> None:
    # as the recipe does; nearest is not symmetric, so that scaling first would shift the labels by up to a pixel
    image, labels = scene()
    labels = np.random.default_rng(1).integers(0, 9, labels.shape).astype(np.uint8)
    settings = {"photometric": False, "crop": (20, 20), **PLANS["jitter"]}
    flipping, plain = (training_transform(augmentation(flip=flip, **settings)) for flip in (1.0, 0.0))
    for seed in range(10):
        seed_transform(flipping, seed)
        seed_transform(plain, seed)
        drawn = flipping(image=image, mask=labels)
        expected = plain(image=image[:, ::-1], mask=labels[:, ::-1])
        np.testing.assert_array_equal(drawn["image"], expected["image"])
        np.testing.assert_array_equal(drawn["mask"], expected["mask"])


@pytest.mark.parametrize("plan", PLANS)
def test_a_picture_may_have_no_masks_at_all(plan: str) -> None:
    transform = training_transform(augmentation(flip=1.0, **PLANS[plan]))
    empty = {"masks": np.zeros((0, 40, 60), np.uint8), "boxes": np.zeros((0, 4))}
    drawn = transform(image=scene()[0], **empty)
    assert drawn["masks"].shape == (0, *drawn["image"].shape[:2])
    assert drawn["boxes"].shape == (0, 4)


def test_a_flipped_box_is_as_far_from_the_other_side() -> None:
    flip = Flip(p=1.0)
    drawn = flip(image=np.zeros((10, 20, 3), np.uint8), boxes=np.array([[1.0, 2.0, 5.0, 8.0]]))
    assert drawn["boxes"].tolist() == [[15, 2, 19, 8]]


def test_a_box_touches_a_picture_when_something_of_it_is_inside() -> None:
    boxes = {
        (0, 0, 1, 1): True,
        (-3, -3, 0.5, 0.5): True,
        (-3, 2, 0, 5): False,  # ends where the picture begins
        (20, 2, 25, 5): False,  # begins where it ends
        (19.5, 9.5, 25, 25): True,
        (5, 10, 6, 12): False,
        (5, -2, 6, 0): False,
        (-5, -5, 50, 50): True,
        (5, 5, 5, 6): False,  # has no area
    }
    assert touching(np.array(list(boxes)), 10, 20).tolist() == list(boxes.values())


def test_one_seed_decides_a_jitter_and_another_one_another() -> None:
    image, labels = scene()
    transform, other = (training_transform(augmentation(**PLANS["jitter"])) for _ in range(2))
    outcomes = set()
    for seed in range(20):
        seed_transform(transform, seed)
        seed_transform(other, seed)
        drawn = transform(image=image, mask=labels)["image"].tobytes()
        assert drawn == other(image=image, mask=labels)["image"].tobytes()
        outcomes.add(drawn)
    assert len(outcomes) == 20


def distort(image: np.ndarray, **drawn: Any) -> np.ndarray:
    steps = {"brightness": None, "contrast": None, "saturation": None, "hue": None, "contrast_first": True}
    return PhotometricDistortion().apply(image, **{**steps, **drawn})


def pixel(*rgb: int) -> np.ndarray:
    return np.array([[rgb]], np.uint8)


def test_every_step_of_the_distortion_truncates_to_bytes() -> None:
    assert distort(pixel(10, 200, 250), brightness=10.7)[0, 0].tolist() == [20, 210, 255]
    assert distort(pixel(10, 200, 250), brightness=-20.5)[0, 0].tolist() == [0, 179, 229]
    assert distort(pixel(11, 101, 201), contrast=0.5)[0, 0].tolist() == [5, 50, 100]
    # 100 + 30.9 -> 130, * 0.77 -> 100.1 -> 100; without truncation in between it would be 100.8
    assert distort(pixel(100, 100, 100), brightness=30.9, contrast=0.77)[0, 0].tolist() == [100, 100, 100]
    # pure red has hue 0 of 180 and saturation 255: + 10 of 180 is 20 degrees, half the saturation 127 of 255
    assert distort(pixel(255, 0, 0), hue=10)[0, 0].tolist() == [255, 85, 0]
    assert distort(pixel(255, 0, 0), hue=-10)[0, 0].tolist() == [255, 0, 85]
    assert distort(pixel(255, 0, 0), saturation=0.5)[0, 0].tolist() == [255, 128, 128]
    grey = pixel(77, 77, 77)
    assert distort(grey, saturation=1.4, hue=17)[0, 0].tolist() == [77, 77, 77]


def test_contrast_comes_before_or_after_the_colour_steps() -> None:
    first = distort(pixel(200, 100, 50), contrast=1.5, saturation=0.6, contrast_first=True)
    last = distort(pixel(200, 100, 50), contrast=1.5, saturation=0.6, contrast_first=False)
    assert first[0, 0].tolist() != last[0, 0].tolist()


def test_the_distortion_draws_what_the_recipe_says() -> None:
    transform = PhotometricDistortion()
    transform.set_random_seed(0)
    draws = [transform.get_params() for _ in range(4000)]
    limits = {"brightness": (-32, 32), "contrast": (0.5, 1.5), "saturation": (0.5, 1.5), "hue": (-18, 17)}
    for name, (low, high) in limits.items():
        values = np.array([draw[name] for draw in draws if draw[name] is not None])
        assert abs(len(values) / 4000 - 0.5) < 0.032, name  # 4 standard errors
        assert low <= values.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 4 * values.std() / len(values) ** 0.5
    assert {draw["hue"] for draw in draws} == {None, *range(-18, 18)}
    assert abs(np.mean([draw["contrast_first"] for draw in draws]) - 0.5) < 0.032


@pytest.mark.slow
def test_statistics_are_the_published_implementations() -> None:
    # Every mean of 3,000 draws lies within 4 standard errors (of both samples) of the reference's.
    reference = json.loads((REFERENCE / "augmentation.json").read_text())
    with np.load(REFERENCE / "augmentation.npz") as arrays:
        image, labels = np.ascontiguousarray(arrays["image_bgr"][..., ::-1]), arrays["label"]
    draws = reference["draws"]
    transform = training_transform(
        AugmentationConfig(
            crop=tuple(reference["crop_hw"]),
            short_sides=tuple(reference["short_side_choices"]),
            long_side_max=reference["long_side_max"],
        )
    )
    found: dict[str, list[Any]] = {
        name: [] for name in ("height", "width", "channel_mean_rgb", "channel_std_rgb", "label_fraction")
    }
    found |= {"flipped": [], "largest_label_share": []}
    for seed in range(draws):
        seed_transform(transform, seed)
        drawn = transform(image=image, mask=labels)
        mean, std = cv2.meanStdDev(drawn["image"])
        counts = label_counts(drawn["mask"])
        found["height"].append(drawn["mask"].shape[0])
        found["width"].append(drawn["mask"].shape[1])
        found["channel_mean_rgb"].append(mean.ravel())
        found["channel_std_rgb"].append(std.ravel())
        found["label_fraction"].append(counts[:12] / drawn["mask"].size)
        found["flipped"].append(transform.transforms[1].params != {})
        found["largest_label_share"].append(counts.max() / counts.sum())
    for name, values in found.items():
        ours, theirs = np.array(values, np.float64), reference[name]
        error = np.sqrt((ours.var(0) + np.square(theirs["std"])) / draws)
        difference = np.abs(ours.mean(0) - theirs["mean"])
        rounding = 5e-5  # the reference is printed with four digits
        assert (difference <= 4 * error + rounding).all(), (name, difference / error)
    over = np.mean(np.array(found["largest_label_share"]) > 0.75)
    share = reference["largest_label_share_over_0.75"]
    assert abs(over - share) < 4 * (2 * share * (1 - share) / draws) ** 0.5
