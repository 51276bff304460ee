from __future__ import annotations

import dataclasses
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask

from pipeline.data.datasets import coco
from pipeline.data.images.codecs import decode_image, decode_masks, decode_segments
from pipeline.data.shards import build, writer
from pipeline.params.schema import DatasetConfig
from pipeline.provenance.run_key import settings_facts
from tests.helpers.coco_files import (
    CONFIG,
    FIRST,
    IMAGES,
    INSTANCES,
    PANOPTIC,
    changed,
    published,
    write_coco,
)
from tests.helpers.images import encoded, image, put, zipped
from tests.helpers.shard_folders import rows
from tests.helpers.shared import shared


def test_a_file_is_found_whose_accent_or_slash_the_annotations_spell_otherwise(tmp_path: Path) -> None:
    for name in ("\u00e9.jpg", "e\u0301.jpg", ".\\\u00e9.jpg"):  # one character, two, and as Windows writes a path
        listing = {**INSTANCES, "images": [{**IMAGES[1], "file_name": name}], "annotations": []}
        put(tmp_path / "annotations/instances_val2017.json", json.dumps(listing).encode())
        put(tmp_path / "val2017/e\u0301.jpg", encoded(image(6, 8), ".jpg"))
        (record,) = coco.records(CONFIG, [tmp_path], "val")
        assert (record.name, record.read().size) == ("\u00e9", (6, 8))


def test_a_file_name_may_begin_with_the_splits_folder(tmp_path: Path) -> None:
    listing = {**INSTANCES, "images": [{**IMAGES[1], "file_name": "val2017/a.jpg"}], "annotations": []}
    put(tmp_path / "annotations/instances_val2017.json", json.dumps(listing).encode())
    put(tmp_path / "val2017/a.jpg", encoded(image(6, 8), ".jpg"))
    (record,) = coco.records(CONFIG, [tmp_path], "val")
    assert record.name == "a"
    (tmp_path / "val2017/a.jpg").unlink()
    with pytest.raises(ValueError, match="lists 'val2017/a.jpg', but no source has it in val2017/"):
        coco.records(CONFIG, [tmp_path], "val")


@pytest.mark.parametrize("image_format", ["TIFF", "PNG"])
def test_masks_lie_on_their_objects_in_turned_pictures(tmp_path: Path, storage: Path, image_format: str) -> None:
    """A picture of 6 x 8 pixels that is stored turned left, with a white object whose mask was drawn on it as shown."""
    shown = np.zeros((6, 8, 3), np.uint8)
    shown[1:3, 1:4] = 255
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # to be turned right
    Image.fromarray(np.rot90(shown)).save(file, image_format, exif=exif)
    write_coco(tmp_path, panoptic=None)
    put(tmp_path / "val2017/a.jpg", file.getvalue())
    record = coco.records(CONFIG, [tmp_path], "val")[0]
    stored = writer.verify(record, 4, frozenset({1, 2, 3}))
    pixels = decode_image(stored.row["image"], "")
    run_lengths = [{"size": pixels.shape[:2], "counts": stored.row["instances"][0]["counts"]}]
    object_and_another = decode_masks(run_lengths, (6, 8))[0]
    np.testing.assert_array_equal(object_and_another[:4], pixels[:4, :, 0] // 255)

    with pytest.raises(ValueError, match=r"a\.jpg is 8 x 6 .* says 6 x 8; if .*turned .* EXIF .*, set exif: apply"):
        coco.records(dataclasses.replace(CONFIG, exif="ignore"), [tmp_path], "val")[0].read()
    another_size = dataclasses.replace(record, read=lambda: record.read()._replace(size=(8, 6)))
    with pytest.raises(ValueError, match=r"json is 8 x 6 .* its image .*a\.jpg is 6 x 8; if .*, set exif: ignore"):
        writer.verify(another_size, 4, frozenset({1, 2, 3}))


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
    with pytest.raises(ValueError, match=r"annotations/panoptic_val2017\.zip is not a whole archive"):
        coco.records(CONFIG, sources, "val")


def test_pictures_that_the_files_do_not_list_are_left_alone_and_both_lists_are_joined(tmp_path: Path) -> None:
    instances = {**INSTANCES, "images": IMAGES[1:]}
    folder = write_coco(tmp_path, instances)
    put(folder / "val2017/c.jpg", b"")
    records = coco.records(CONFIG, [folder], "val")
    assert [record.name for record in records] == ["a", "b"]
    assert len(records[0].read().instances) == 3
    assert records[1].read().instances is None


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
        (wrong_json(lambda data: data + data), r"instances_val2017\.json is not JSON \(Extra data"),
        (wrong_json(lambda data: b"{[]: []}"), r"instances_val2017\.json is not JSON \(Expecting a name"),
        (
            wrong_json(lambda data: b'{"categories": [], "images": [], "annotations": []}'),
            r"instances_val2017\.json lists no images",
        ),
        (
            wrong_json(lambda data: json.dumps({**INSTANCES, "annotations": None}).encode()),
            "has no list called annotations; COCO's files hold one each of categories, images, annotations",
        ),
        (
            wrong_json(lambda data: json.dumps({**INSTANCES, "images": {}}).encode()),
            "has no list called images",
        ),
        (
            wrong_json(lambda data: data.replace(b'"licenses"', b'"annotations"')),
            "has 2 lists called annotations",
        ),
        (wrong_json(lambda data: b"\xff"), r"instances_val2017\.json is not JSON"),
        (
            wrong_json(lambda data: b'{"images": ' + b"[" * 100_000),
            r"_val2017\.json is not JSON \(.*recursion",
        ),
        (wrong_json(lambda data: b'{"images": [' + b"1" * 5_000), r"instances_val2017\.json is not JSON \(Exceeds"),
        (lambda folder: (folder / "val2017/b.jpg").unlink(), r"lists 'b\.jpg', but no source has it in val2017/"),
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
    with pytest.raises(ValueError, match=r"image 2 differs .* has 'a\.jpg' 6 8 and .*instances.* has 'a\.jpg' 6 9"):
        coco.records(CONFIG, [folder], "val")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("categories", 0, "name"), "sky", "'sky' as a thing category, but thing_classes in params.yaml does not list"),
        (("categories", 0, "name"), None, r"entry 1 of categories \(id 3\): it has no name"),
        (("categories", 0, "name"), 3, r"entry 1 of categories \(id 3\): its name is 3; it must be text"),
        (("categories", 0, "isthing"), "no", r"entry 1 of categories \(id 3\): its isthing is 'no'; it must be 0 or 1"),
        (("categories", 0, "id"), 18, r"entry 2 of categories \(id 18\): the category 'car' has its id too; give each"),
        (("categories", 0, "id"), "3", r"entry 1 of categories \(id '3'\): its id is '3'; .* number, without quotes"),
        (("categories", 0, "name"), "dog", "has objects of two categories called 'dog', with the ids 3 and 18; give"),
        (
            ("categories", 0, "name"),
            "Car ",
            "has the category 'Car ', and class_names .* has 'car', which is",
        ),
        (("images", 0, "height"), None, r"entry 1 of images \(id 7\): it has no height"),
        (("images", 0, "height"), "6", r"entry 1 of images \(id 7\): its height is '6'; .* number, without quotes"),
        (("images", 0, "width"), float("inf"), r"entry 1 of images \(id 7\): its width is inf; it must be a whole"),
        (("images", 0, "id"), 2, r"entry 2 of images \(id 2\): the image 'b\.jpg' has its id too; give each its own"),
        (("images", 0, "id"), "7", r"entry 1 of images \(id '7'\): its id is '7'; it must be a whole number, without"),
        (("images", 0, "file_name"), "c.jpg", r"lists 'c\.jpg', but no source has it in val2017/"),
        (
            ("images", 0, "file_name"),
            ["b.jpg"],
            r"entry 1 of images \(id 7\): its file_name is \['b.jpg'\]; it",
        ),
        (("images", 0, "file_name"), "b\ud800.jpg", r"its file_name is 'b\\ud800\.jpg'; it must be text"),
        (("images", 0, "file_name"), "a.jpg", "lists two images called 'a'; keep one"),
        (("images", 0), [7], r"entry 1 of images: it is \[7\]; it must be a mapping"),
        ((*FIRST, "image_id"), 4, "has annotations of image 4, which its `images` do not list"),
        (
            (*FIRST, "image_id"),
            "2",
            r"entry 1 of annotations \(id 11\): its image_id is '2'; .*, without quotes",
        ),
        (
            (*FIRST, "image_id"),
            {},
            r"entry 1 of annotations \(id 11\): its image_id is \{\}; it must be a whole",
        ),
    ],
)
def test_what_is_wrong_with_an_entry_is_named(tmp_path: Path, path: tuple[Any, ...], value: Any, message: str) -> None:
    folder = write_coco(tmp_path / "coco", changed(INSTANCES, *path, value=value), None)
    with pytest.raises(ValueError, match=message) as caught:
        coco.records(CONFIG, [folder], "val")
    assert str(caught.value).startswith("coco: annotations/instances_val2017.json")
    assert "\n" not in str(caught.value)


def test_a_category_that_no_object_has_may_have_the_name_of_another(tmp_path: Path) -> None:
    categories = [{"id": 0, "name": "dog"}, *INSTANCES["categories"]]
    folder = write_coco(tmp_path, {**INSTANCES, "categories": categories}, None)
    found = coco.records(CONFIG, [folder], "val")[0].read().instances
    assert [instance.class_id for instance in found] == [1, 2, 2]


def test_class_names_that_name_no_category_are_an_error(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, class_names=("bus", "tram"), thing_classes=("bus", "tram"))
    with pytest.raises(ValueError, match="has the categories 'car', 'dog', 'sky', none of which is among class_names"):
        coco.records(config, [write_coco(tmp_path)], "val")


OTHER_NAMES = {
    "instances": "{folder}/_annotations.coco.json",
    "panoptic": "labels/{split}.json",
    "panoptic_maps": "labels/maps",
}


@pytest.mark.parametrize("archived", [False, True])
def test_annotation_files_may_have_other_names(tmp_path: Path, archived: bool) -> None:
    expected = [record.read() for record in coco.records(CONFIG, [write_coco(tmp_path / "coco")], "val")]
    renamed = write_coco(tmp_path / "renamed/top")
    (renamed / "labels").mkdir()
    (renamed / "annotations/instances_val2017.json").rename(renamed / "val2017/_annotations.coco.json")
    (renamed / "annotations/panoptic_val2017.json").rename(renamed / "labels/val.json")
    (renamed / "annotations/panoptic_val2017").rename(renamed / "labels/maps")
    source = zipped(renamed.parent, tmp_path / "renamed.zip") if archived else renamed
    config = dataclasses.replace(CONFIG, annotation_files=OTHER_NAMES)
    for record, other in zip(coco.records(config, [source], "val"), expected, strict=True):
        found = record.read()
        np.testing.assert_array_equal(found.segments, other.segments)
        assert found._replace(segments=None) == other._replace(segments=None)
    with pytest.raises(ValueError, match=r"has no labels/val\.json in coco, but annotations/inst.*annotation_files"):
        coco.records(config, [tmp_path / "coco"], "val")


def test_other_names_are_in_the_key_of_shards_and_cocos_own_are_not() -> None:
    assert "annotation_files" not in settings_facts(CONFIG)
    renamed = dataclasses.replace(CONFIG, annotation_files=OTHER_NAMES)
    assert settings_facts(renamed)["annotation_files"] == OTHER_NAMES


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
