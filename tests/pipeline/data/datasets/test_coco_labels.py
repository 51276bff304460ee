from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask

from pipeline.data.datasets import coco
from pipeline.data.records import Instance
from tests.helpers.coco_files import (
    CAR,
    COLUMN,
    CONFIG,
    DOG,
    FIRST,
    IDS,
    INSTANCES,
    PANOPTIC,
    SKY,
    changed,
    png,
    write_coco,
)
from tests.helpers.images import encoded, image, put


def masks(labelled: Any) -> list[np.ndarray]:
    run_lengths = [{"size": [6, 8], "counts": instance.counts} for instance in labelled.instances]
    return list(mask.decode(run_lengths).transpose(2, 0, 1))


def test_polygons_and_both_kinds_of_run_lengths_become_masks(tmp_path: Path) -> None:
    records = coco.records(CONFIG, [write_coco(tmp_path, panoptic=None)], "val")
    assert [record.name for record in records] == ["a", "b"]  # by id: 2, 7
    labelled = records[0].read()
    assert labelled.image == encoded(image(6, 8, seed=0), ".jpg")
    assert (labelled.segments, labelled.segment_classes) == (None, None)
    # corners are pixel borders: 3 x 2 pixels from (1, 1) and 2 x 2 from (5, 4)
    polygons = np.zeros((6, 8))
    polygons[1:3, 1:4] = polygons[4:6, 5:7] = 1
    for found, expected in zip(masks(labelled), (polygons, COLUMN, COLUMN), strict=True):
        np.testing.assert_array_equal(found, expected)
    car, crowd, dog = labelled.instances
    assert (car.class_id, car.box, car.area, car.crowd) == (1, (1, 1, 7, 6), 9.5, False)
    assert (crowd.class_id, crowd.box, crowd.area, crowd.crowd) == (2, (0, 0, 1, 6), 6, True)
    assert (dog.box, dog.crowd) == ((0.5, 0, 1, 6), False)
    assert records[1].read().instances == ()


def test_segments_are_numbered_as_listed_and_zero_is_nothing(tmp_path: Path) -> None:
    labelled = coco.records(CONFIG, [write_coco(tmp_path, instances=None)], "val")[0].read()
    expected = np.select([IDS == DOG, IDS == SKY, IDS == CAR], [0, 1, 2], 255)
    np.testing.assert_array_equal(labelled.segments, expected)
    assert labelled.segment_classes == (2, 0, 1)
    assert labelled.segment_crowd == (True, False, False)
    assert labelled.instances is None


def first(tmp_path: Path, **fields: Any) -> Instance:
    """The first object, a car of two polygons, after a change of its annotation."""
    content = {**INSTANCES, "annotations": [{**INSTANCES["annotations"][0], **fields}]}
    labelled = coco.records(CONFIG, [write_coco(tmp_path / "coco", content, None)], "val")[0].read()
    return labelled.instances[0]


NOT_FINITE = float("nan"), float("inf"), 1e300, 10**400


@pytest.mark.parametrize(
    "bbox",
    [
        None,
        [],
        [0, 0, 0, 0],
        [1, 1, 6, 0],
        [7, 6, -6, -5],  # from the other corner
        *([1, value, 6, 5] for value in NOT_FINITE),
        [0.1, 0.2, 0.75, 0.8],  # shares of the picture's sides
        [60, 40, 6, 5],
    ],
)
def test_a_box_that_cannot_be_the_objects_is_its_masks(tmp_path: Path, bbox: Any) -> None:
    # 3 x 2 pixels from (1, 1) and 2 x 2 from (5, 4)
    found = first(tmp_path, bbox=bbox)
    assert (found.box, found.area) == ((1, 1, 7, 6), 9.5)


def test_a_box_that_differs_from_the_mask_by_parts_of_pixels_stays_as_annotated(tmp_path: Path) -> None:
    assert first(tmp_path, bbox=[0.62, 1.4, 6.1, 4.37]).box == (0.62, 1.4, 6.72, 5.77)


@pytest.mark.parametrize("area", [None, 0, -9.5, *NOT_FINITE, 81])
def test_an_area_that_cannot_be_the_objects_is_its_masks(tmp_path: Path, area: Any) -> None:
    # 6 + 4 pixels; 8 x 10 = 80 with a pixel around the picture
    assert first(tmp_path, area=area).area == 10


def test_boxes_and_areas_may_be_left_out(tmp_path: Path) -> None:
    content = changed(changed(INSTANCES, *FIRST, "bbox", value=None), *FIRST, "area", value=None)
    found = coco.records(CONFIG, [write_coco(tmp_path, content, None)], "val")[0].read().instances[0]
    assert (found.box, found.area) == ((1, 1, 7, 6), 10)


@pytest.mark.parametrize(
    ("value", "crowd"),
    [
        *((value, False) for value in (0, 0.0, False, "0", " 0.0", "False")),
        *((value, True) for value in (1, 1.0, True, "1", "1.0", "true ")),
    ],
)
def test_a_crowd_is_what_its_number_or_text_says(tmp_path: Path, value: Any, crowd: bool) -> None:
    assert first(tmp_path, iscrowd=value).crowd is crowd


@pytest.mark.parametrize("value", [None, 2, -1, 0.5, float("nan"), "", "no", "01", [], [0], {}])
def test_a_crowd_flag_that_is_neither_0_nor_1_is_named(tmp_path: Path, value: Any) -> None:
    with pytest.raises(
        ValueError, match=r"instances_val2017\.json: annotation 11: its iscrowd is .*; it must be 0 or 1$"
    ):
        first(tmp_path, iscrowd=value)


@pytest.mark.parametrize("polygons", [[], [[1, 1, 4, 1]], [[1, 1], [2, 2, 3, 3]], [[1, 2.5, 4, 2.5, 6, 2.5]]])
def test_an_object_without_pixels_keeps_its_box_and_area(tmp_path: Path, polygons: list[Any]) -> None:
    # two of COCO's objects are flat polygons with a box of height 0
    found = first(tmp_path, segmentation=polygons, bbox=[1, 2, 5, 0])
    assert (found.box, found.area, found.name) == ((1, 2, 6, 2), 9.5, "annotation 11")
    assert mask.area({"size": [6, 8], "counts": found.counts}) == 0
    assert first(tmp_path, segmentation=polygons, bbox=[7, 6, -6, -5], area=-1)[1:3] == ((0, 0, 0, 0), 0)


def test_objects_and_segments_of_other_categories_are_left_out_and_their_pixels_are_nothing(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, class_names=("car", "cat"), thing_classes=("car", "cat"))
    labelled = coco.records(config, [write_coco(tmp_path)], "val")[0].read()
    assert labelled.left_out == ("dog", "sky")
    assert [instance.class_id for instance in labelled.instances] == [0]
    np.testing.assert_array_equal(labelled.segments, np.where(IDS == CAR, 0, 255))
    assert (labelled.segment_classes, labelled.segment_crowd) == ((0,), ())


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("images", 1, "width"), 9, r"val2017/a\.jpg is 6 x 8 \(height x width\), but .* says 6 x 9"),
        ((*FIRST, "category_id"), 4, "annotation 11: category_id 4 is not among its `categories`"),
        (
            (*FIRST, "category_id"),
            "3",
            "annotation 11: its category_id is '3'; it must be a whole number, without quotes",
        ),
        ((*FIRST, "category_id"), [3], r"annotation 11: its category_id is \[3\]; it must be a whole number"),
        ((*FIRST, "category_id"), True, "annotation 11: its category_id is True; it must be a whole number"),
        ((*FIRST, "category_id"), None, "annotation 11: it has no category_id"),
        ((*FIRST, "area"), "9.5", "annotation 11: its area is '9.5'; it must be a number of pixels"),
        ((*FIRST, "bbox"), [1, 2, 3], r"annotation 11: its bbox is \[1, 2, 3\]; it must be four numbers"),
        ((*FIRST, "segmentation"), [1, 2, 3], "annotation 11: its segmentation is neither a list of polygons nor"),
        ((*FIRST, "segmentation"), {"size": [8, 6], "counts": [48]}, r"run lengths are for 8 x 6 .* image is 6 x 8"),
        ((*FIRST, "segmentation"), {"size": [6, 8], "counts": [40]}, "annotation 11: its run lengths do not cover 6 x"),
        (
            (*FIRST, "segmentation"),
            {"size": [6, 8], "counts": [-1, 49]},
            "annotation 11: its run lengths hold -1; .* 0 to 48",
        ),
        ((*FIRST, "segmentation"), {"size": [6, 8], "counts": ""}, "compressed run lengths are not as pycocotools"),
        ((*FIRST, "segmentation"), {"size": [6, 8], "counts": "0"}, "annotation 11: its run lengths do not cover"),
    ],
)
def test_what_is_wrong_with_instances_is_named(tmp_path: Path, path: tuple[Any, ...], value: Any, message: str) -> None:
    folder = write_coco(tmp_path / "coco", changed(INSTANCES, *path, value=value), None)
    with pytest.raises(ValueError, match=message) as caught:
        coco.records(CONFIG, [folder], "val")[0].read()
    assert str(caught.value).startswith("coco: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("categories", 2, "isthing"), "1", "'sky' as a thing category, but thing_classes .* does not list it"),
        (("categories", 1, "isthing"), 0, "'dog' as a stuff category, but thing_classes in params.yaml lists it"),
        ((*FIRST, "file_name"), "c.png", r"lists 'c\.png', but no source has it in annotations/panoptic_val2017/"),
        (("annotations", 1, "image_id"), 2, r"has 2 annotations of 'a\.jpg'; panoptic images have one"),
        ((*FIRST, "segments_info"), None, r"has 1 annotations of 'a\.jpg'; panoptic .* with segments_info"),
        (
            (*FIRST, "segments_info", 0, "category_id"),
            1,
            r"segments_info of .*a\.png: segment 1: category_id 1 is not among",
        ),
        ((*FIRST, "segments_info", 0, "id"), None, r"segments_info of .*a\.png: segment 1: it has no id"),
        ((*FIRST, "segments_info", 0, "id"), CAR, r"segments_info of .*a\.png holds an id twice"),
        ((*FIRST, "segments_info", 0, "id"), 0, r"holds an id twice, or 0, which is nothing"),
        ((*FIRST, "segments_info", 0, "id"), 5.5, r"segment 1: its id is 5\.5; it must be a whole number"),
        ((*FIRST, "segments_info", 0, "id"), 256**3, r"segment 1: its id is 16777216; it must be R \+ 256 G"),
        ((*FIRST, "segments_info", 0, "iscrowd"), "no", "segment 1: its iscrowd is 'no'; it must be 0 or 1"),
        ((*FIRST, "segments_info", 0), 7, r"segments_info of .*a\.png is \[7, .*; it must be a list"),
        # two pixels hold the dog's id
        ((*FIRST, "segments_info", 0, "id"), 9, rf"a\.png holds id {DOG} on 2 pixels, which segments_info .* not list"),
    ],
)
def test_what_is_wrong_with_panoptic_labels_is_named(
    tmp_path: Path, path: tuple[Any, ...], value: Any, message: str
) -> None:
    folder = write_coco(tmp_path / "coco", None, changed(PANOPTIC, *path, value=value))
    with pytest.raises(ValueError, match=message) as caught:
        coco.records(CONFIG, [folder], "val")[0].read()
    assert str(caught.value).startswith("coco: ")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png(IDS, "L"), r"a\.png holds id \d+ on \d+ pixels, which segments_info"),
        (encoded(image(6, 8), ".jpg"), r"a\.png is JPEG; labels are PNG"),
        (png(IDS)[:60], r"a\.png does not decode"),
        (png(IDS[:5]), r"a\.png is 5 x 8 \(height x width\), but .*panoptic_val2017\.json says 6 x 8"),
        (png(np.where(IDS == CAR, SKY, IDS)), rf"a\.png has no pixel of segment {CAR}, which .*\.json lists"),
    ],
)
def test_a_wrong_png_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    folder = write_coco(tmp_path / "coco", None)
    put(folder / "annotations/panoptic_val2017/a.png", data)
    with pytest.raises(ValueError, match=message):
        coco.records(CONFIG, [folder], "val")[0].read()
