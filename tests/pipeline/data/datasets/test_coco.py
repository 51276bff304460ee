from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask

from pipeline.data.datasets import coco
from pipeline.data.images.codecs import decode_segments
from pipeline.data.shards import build
from pipeline.params.schema import DatasetConfig
from tests.helpers.coco_files import (
    CAR,
    COLUMN,
    CONFIG,
    DOG,
    IDS,
    IMAGES,
    INSTANCES,
    PANOPTIC,
    SKY,
    png,
    published,
    write_coco,
)
from tests.helpers.images import encoded, image, put, zipped
from tests.helpers.shard_folders import rows
from tests.helpers.shared import shared


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


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_published_archives_give_the_same_as_a_folder_also_in_another_process(tmp_path: Path, compression: int) -> None:
    folder = write_coco(tmp_path / "coco")
    expected = [record.read() for record in coco.records(CONFIG, [folder], "val")]
    whole = zipped(tmp_path / "coco", tmp_path / "whole.zip")
    with_top = zipped(write_coco(tmp_path / "top/coco").parent, tmp_path / "top.zip")
    parts = published(folder, compression)
    with zipfile.ZipFile(parts[2]) as archive:  # unpacked once, the archive in it still is one
        archive.extractall(tmp_path / "unpacked")
    for sources in (parts[::-1], [*parts[:2], tmp_path / "unpacked"], [whole], [with_top]):
        records = pickle.loads(pickle.dumps(coco.records(CONFIG, sources, "val")))
        assert [record.name for record in records] == ["a", "b"]
        for record, other in zip(records, expected, strict=True):
            found = record.read()
            np.testing.assert_array_equal(found.segments, other.segments)
            assert found._replace(segments=None) == other._replace(segments=None)
    assert list(tmp_path.rglob("*.part")) == []


def test_an_inner_archive_that_is_torn_is_named(tmp_path: Path) -> None:
    sources = published(write_coco(tmp_path / "coco"), zipfile.ZIP_STORED)
    data = sources[2].read_bytes()
    with zipfile.ZipFile(sources[2], "w") as archive:
        archive.writestr("annotations/panoptic_val2017.json", json.dumps(PANOPTIC))
        archive.writestr("annotations/panoptic_val2017.zip", data[:200])
    with pytest.raises(ValueError, match=r"annotations/panoptic_val2017\.zip is not a whole zip archive"):
        coco.records(CONFIG, sources, "val")


def test_pictures_that_the_files_do_not_list_are_left_alone_and_both_lists_are_joined(tmp_path: Path) -> None:
    instances = {**INSTANCES, "images": IMAGES[1:]}
    folder = write_coco(tmp_path, instances)
    put(folder / "val2017/c.jpg", b"")
    records = coco.records(CONFIG, [folder], "val")
    assert [record.name for record in records] == ["a", "b"]
    assert len(records[0].read().instances) == 3
    assert records[1].read().instances is None


@pytest.mark.parametrize("polygons", [[], [[1, 1, 4, 1]], [[1, 1], [2, 2, 3, 3]]])
def test_an_object_without_a_real_polygon_keeps_its_area_and_has_no_mask(tmp_path: Path, polygons: list[Any]) -> None:
    content = copy.deepcopy(INSTANCES)
    content["annotations"][0]["segmentation"] = polygons
    labelled = coco.records(CONFIG, [write_coco(tmp_path, content, None)], "val")[0].read()
    assert labelled.instances[0].area == 9.5
    assert masks(labelled)[0].sum() == 0


def test_a_polygon_of_two_points_beside_a_real_one_adds_nothing(tmp_path: Path) -> None:
    content = copy.deepcopy(INSTANCES)
    content["annotations"][0]["segmentation"] = [[0, 0, 8, 6], [1, 1, 4, 1, 4, 3, 1, 3]]
    labelled = coco.records(CONFIG, [write_coco(tmp_path, content, None)], "val")[0].read()
    assert masks(labelled)[0].sum() == 6


def changed(content: dict[str, Any], *path: Any, value: Any) -> dict[str, Any]:
    """A copy with one value replaced; None takes the key away."""
    content = copy.deepcopy(content)
    place: Any = content
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return content


FIRST = ("annotations", 0)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("categories", 0, "name"), "bus", "has the category 'bus', which is not among class_names"),
        (("categories", 0, "name"), "sky", "'sky' as a thing category, but thing_classes in params.yaml does not list"),
        (("categories", 0, "name"), None, r"is not as COCO writes it: categories, KeyError\('name'\)"),
        (("images", 0, "height"), None, r"is not as COCO writes it: images, KeyError\('height'\)"),
        (("images", 0, "id"), 2, "lists two pictures with id 2"),
        (("images", 0, "id"), "7", "is not as COCO writes it: images, .*'7' is not a number"),
        (("images", 0, "file_name"), "c.jpg", r"lists c\.jpg, but no source has val2017/c\.jpg"),
        (("images", 0, "file_name"), "a.jpg", "lists two pictures called a; keep one"),
        (("images", 1, "width"), 9, r"val2017/a\.jpg is 6 x 8 \(height x width\), but .* says 6 x 9"),
        ((*FIRST, "image_id"), 4, "has annotations of picture 4, which its `images` do not list"),
        ((*FIRST, "category_id"), 4, "annotation 11: category_id 4 is not among its `categories`"),
        ((*FIRST, "area"), None, "annotation 11 has no area"),
        ((*FIRST, "bbox"), [1, 2, 3], "annotation 11: not enough values"),
        ((*FIRST, "segmentation"), [1, 2, 3], "annotation 11: its segmentation is neither a list of polygons nor"),
        ((*FIRST, "segmentation"), {"size": [8, 6], "counts": [48]}, r"run lengths are for 8 x 6 .* picture is 6 x 8"),
        ((*FIRST, "segmentation"), {"size": [6, 8], "counts": [40]}, "annotation 11: its run lengths do not cover 6 x"),
        ((*FIRST, "segmentation"), {"size": [6, 8], "counts": [-1, 49]}, "annotation 11: .* out of bounds"),
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
        (("categories", 2, "isthing"), 1, "'sky' as a thing category, but thing_classes .* does not list it"),
        (("categories", 1, "isthing"), 0, "'dog' as a stuff category, but thing_classes in params.yaml lists it"),
        ((*FIRST, "file_name"), "c.png", r"lists c\.png, but no source has annotations/panoptic_val2017/c\.png"),
        (("annotations", 1, "image_id"), 2, r"has 2 annotations of a\.jpg; panoptic pictures have one"),
        ((*FIRST, "segments_info"), None, r"has 1 annotations of a\.jpg; panoptic .* with segments_info"),
        ((*FIRST, "segments_info", 0, "category_id"), 1, r"segments_info of .*a\.png: category_id 1 is not among"),
        ((*FIRST, "segments_info", 0, "id"), None, r"a segment of .*a\.png has no id"),
        ((*FIRST, "segments_info", 0, "id"), CAR, r"segments_info of .*a\.png holds an id twice"),
        ((*FIRST, "segments_info", 0, "id"), 0, r"holds an id twice, or 0, which is nothing"),
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
        (png(IDS, "RGBA"), r"a\.png is PNG of mode RGBA; .* mode RGB"),
        (png(IDS, "L"), r"a\.png is PNG of mode L; .* mode RGB"),
        (encoded(image(6, 8), ".jpg"), r"a\.png is JPEG of mode RGB"),
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


def wrong_json(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def write_wrong(folder: Path) -> None:
        path = folder / "annotations/instances_val2017.json"
        path.write_bytes(change(path.read_bytes()))

    return write_wrong


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (wrong_json(lambda data: data[:-200]), r"annotations/instances_val2017\.json is not JSON"),
        (wrong_json(lambda data: b"<html>"), r"instances_val2017\.json is not JSON \(Expecting \{"),
        (wrong_json(lambda data: b"[]"), r"instances_val2017\.json is not JSON"),
        (wrong_json(lambda data: b"{}"), r"instances_val2017\.json is not JSON"),
        (wrong_json(lambda data: b'{"images": []}'), r"instances_val2017\.json lists no pictures"),
        (wrong_json(lambda data: b"\xff"), r"instances_val2017\.json is not JSON"),
        (lambda folder: (folder / "val2017/b.jpg").unlink(), r"lists b\.jpg, but no source has val2017/b\.jpg"),
        (
            lambda folder: (folder / "annotations/instances_val2017.json").unlink(),
            r"split val has neither annotations/panoptic_val2017\.json nor .*instances_val2017\.json in coco",
        ),
    ],
)
def test_wrong_and_missing_files_are_named(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    folder = write_coco(tmp_path / "coco", panoptic=None)
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        coco.records(CONFIG, [folder], "val")


def test_both_files_must_agree_on_a_picture(tmp_path: Path) -> None:
    folder = write_coco(tmp_path / "coco", changed(INSTANCES, "images", 1, "width", value=9))
    with pytest.raises(ValueError, match=r"picture 2 differs .* has a\.jpg 6 8 and .*instances.* has a\.jpg 6 9"):
        coco.records(CONFIG, [folder], "val")


def test_compressed_run_lengths_are_checked_as_pycocotools_reads_them() -> None:
    rng = np.random.default_rng(0)
    for share in (0, 0.001, 0.1, 0.5, 0.9, 1):
        drawn = np.asfortranarray(rng.random((300, 211)) < share, np.uint8)
        counts = mask.encode(drawn)["counts"]
        coco.check_run_lengths(counts, (300, 211))
        with pytest.raises(ValueError, match="do not cover"):
            coco.check_run_lengths(counts, (211, 299))
    for wrong in (b"\x00", b"\xff", b"o", b"0" + b"o" * 9 + b"0"):
        with pytest.raises(ValueError, match="compressed run lengths"):
            coco.check_run_lengths(wrong, (300, 211))


# Shards


def test_a_record_carries_both_kinds_of_labels_into_the_shard(tmp_path: Path, storage: Path) -> None:
    manifest = build.build("coco", CONFIG, [write_coco(tmp_path / "coco")], facts=[])
    assert manifest.labels == ("instances", "panoptic", "semantic")
    # of picture a: the car and the dog that is no crowd; b has none
    assert manifest.instances == {"val": (0, 1, 1, 0)}
    # 8 of 48 pixels are nothing, 6 car, 2 dog (crowd); in both pictures
    assert manifest.pixels == {"val": (64, 12, 4, 0)}
    assert manifest.ignored_pixels == {"val": 16}
    assert manifest.images == {"val": (2, 2, 2, 0)}
    first, second = rows(storage, manifest, "val")
    assert first["segment_classes"] == [2, 0, 1]
    assert first["segment_crowd"] == [True, False, False]
    assert first["segment_boxes"] == [6, 5, 8, 6, 0, 1, 8, 6, 1, 1, 4, 3]
    assert [(each["class"], each["box"], each["area"], each["crowd"]) for each in first["instances"]] == [
        (1, [1, 1, 7, 6], 9.5, False),
        (2, [0, 0, 1, 6], 6, True),
        (2, [0.5, 0, 1, 6], 6, False),
    ]
    assert first["things"] == 3  # the crowd too
    assert (second["instances"], second["things"]) == ([], 0)


def test_without_instances_the_segments_of_things_are_counted(tmp_path: Path, storage: Path) -> None:
    manifest = build.build("coco", CONFIG, [write_coco(tmp_path / "coco", None)], facts=[])
    assert manifest.labels == ("instances", "panoptic", "semantic")
    assert manifest.instances == {"val": (0, 2, 0, 0)}  # dogs are crowds
    first = rows(storage, manifest, "val")[0]
    assert (first["instances"], first["things"]) == (None, 2)


def test_instances_alone_have_no_segments_and_no_pixels(tmp_path: Path, storage: Path) -> None:
    manifest = build.build("coco", CONFIG, [write_coco(tmp_path / "coco", panoptic=None)], facts=[])
    assert manifest.labels == ("instances",)
    assert manifest.pixels == {"val": (0, 0, 0, 0)}
    assert manifest.ignored_pixels == {"val": 0}
    assert manifest.images == {"val": (0, 1, 1, 0)}
    assert manifest.instances == {"val": (0, 1, 1, 0)}
    first = rows(storage, manifest, "val")[0]
    fields = ("segments", "segment_classes", "segment_crowd", "segment_boxes")
    assert [first[key] for key in fields] == [None] * 4


def test_a_picture_with_other_labels_than_the_rest_is_named(tmp_path: Path, storage: Path) -> None:
    panoptic = {**PANOPTIC, "images": IMAGES[1:], "annotations": PANOPTIC["annotations"][:1]}
    with pytest.raises(ValueError, match=r"b\.jpg has instances labels, but .*a\.jpg has instances and panoptic and"):
        build.build("coco", CONFIG, [write_coco(tmp_path / "coco", panoptic=panoptic)], facts=[])
    assert list((storage / "shards").iterdir()) == []


def test_archives_change_no_byte(tmp_path: Path, storage: Path) -> None:
    folder = write_coco(tmp_path / "coco")
    alone = build.build("coco", CONFIG, [folder], facts=[])
    assert build.build("coco", CONFIG, published(folder, zipfile.ZIP_DEFLATED), facts=[]) == alone


# Real pictures


def real_json(archive: Path, name: str) -> dict[str, Any]:
    with zipfile.ZipFile(archive) as file:
        return json.loads(file.read(name))


def test_two_coco_pictures_keep_the_areas_and_boxes_of_their_json(storage: Path) -> None:
    archive = shared("data/coco-panoptic-sample.zip")
    truth = real_json(archive, "coco/annotations/panoptic_val2017.json")
    names = tuple(category["name"] for category in truth["categories"])
    things = tuple(category["name"] for category in truth["categories"] if category["isthing"])
    assert (len(names), names[:80]) == (133, things)  # COCO's order: 80 things, 53 kinds of stuff
    config = DatasetConfig(layout="coco", class_names=names, thing_classes=things, splits={"val": "val2017"})
    manifest = build.build("coco", config, [archive], facts=[])
    assert manifest.labels == ("instances", "panoptic", "semantic")
    by_id = {category["id"]: index for index, category in enumerate(truth["categories"])}
    expected_pixels = np.zeros(133, int)
    for row, annotation in zip(rows(storage, manifest, "val"), truth["annotations"], strict=True):
        infos = annotation["segments_info"]
        assert f"{row['name']}.png" == annotation["file_name"]
        assert row["segment_classes"] == [by_id[info["category_id"]] for info in infos]
        assert (row["segment_crowd"] or [False] * len(infos)) == [bool(info["iscrowd"]) for info in infos]
        areas = np.bincount(decode_segments(row["segments"], "").ravel(), minlength=256)
        assert areas[: len(infos)].tolist() == [info["area"] for info in infos]
        boxes = np.array(row["segment_boxes"]).reshape(-1, 4)
        boxes[:, 2:] -= boxes[:, :2]
        assert boxes.tolist() == [info["bbox"] for info in infos]
        assert row["things"] == sum(by_id[info["category_id"]] < 80 for info in infos)
        np.add.at(expected_pixels, row["segment_classes"], [info["area"] for info in infos])
    assert manifest.pixels["val"] == tuple(expected_pixels.tolist())
    both = dataclasses.replace(config, splits={"train": "train2017", "val": "val2017"})
    with pytest.raises(ValueError, match=r"split train has neither .*panoptic_train2017\.json nor .*sample\.zip"):
        build.build("coco", both, [archive], facts=[])


def test_nine_thousand_nuclei_keep_their_area_and_box(storage: Path) -> None:
    archive = shared("data/nuclei.zip")
    config = DatasetConfig(
        layout="coco",
        class_names=("nucleus",),
        thing_classes=("nucleus",),
        splits={"train": "train2018", "val": "val2018"},
    )
    manifest = build.build("nuclei", config, [archive], facts=[])
    assert manifest.labels == ("instances",)
    assert {split: entry.records for split, entry in manifest.splits.items()} == {"train": 240, "val": 70}
    assert manifest.instances == {"train": (7126,), "val": (2294,)}  # 9,420
    for split, folder in config.splits.items():
        truth = real_json(archive, f"nuclei/annotations/instances_{folder}.json")
        by_image: dict[int, list[dict[str, Any]]] = {}
        for annotation in truth["annotations"]:
            by_image.setdefault(annotation["image_id"], []).append(annotation)
        images = sorted(truth["images"], key=lambda entry: entry["id"])
        for row, entry in zip(rows(storage, manifest, split), images, strict=True):
            assert f"{row['name']}.jpg" == entry["file_name"]
            annotations = by_image.get(entry["id"], [])
            assert row["things"] == len(annotations)
            size = [row["height"], row["width"]]
            masks = [{"size": size, "counts": instance["counts"]} for instance in row["instances"]]
            areas = [annotation["area"] for annotation in annotations]
            assert [instance["area"] for instance in row["instances"]] == areas
            assert mask.area(masks).tolist() == areas
            boxes = np.array([instance["box"] for instance in row["instances"]]).reshape(-1, 4)
            boxes[:, 2:] -= boxes[:, :2]
            assert boxes.tolist() == [annotation["bbox"] for annotation in annotations]
