from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.project.own_images import look
from tests.helpers.images import encoded, image, put, write_folder, zipped


def labelled(
    folder: Path, train: Any, val: Any, *, splits: tuple[str, str] = ("train", "val"), ending: str = ""
) -> Path:
    """One image of 12 x 16 in each split, with a label file."""
    for split, pixels in zip(splits, (train, val), strict=True):
        put(folder / f"images/{split}/a.jpg", encoded(image(), ".jpg"))
        put(folder / f"annotations/{split}/a{ending}.png", encoded(np.asarray(pixels, np.uint8)))
    return folder


def filled(*values: Any) -> np.ndarray:
    """12 x 16 pixels: the first row for row holds these values, in turn."""
    rows = [values[row % len(values)] for row in range(12)]
    return np.repeat(np.array(rows)[:, None], 16, axis=1)


@pytest.mark.parametrize("top", ["", "camvid/"])
def test_label_maps_of_ids_give_a_class_for_every_id_up_to_the_highest(tmp_path: Path, top: str) -> None:
    archive = zipped(write_folder(tmp_path / "files", top=top), tmp_path / "mine.zip")
    found = look(archive)
    assert found.layout == "folder" and found.splits == {"train": "training", "val": "validation"}
    assert found.class_names == tuple(f"class_{n}" for n in range(10)) and not found.named  # ids 0, 1, 2 and 9
    assert found.task == "semantic" and found.size == (12, 16) and not found.palette
    assert found.read == "5 of 5 label files"


def test_255_is_no_class_unless_masks_are_of_0_and_255(tmp_path: Path) -> None:
    found = look(labelled(tmp_path / "ids", filled(0, 1, 255), filled(0, 1)))
    assert found.class_names == ("class_0", "class_1") and not found.palette
    masks = look(labelled(tmp_path / "masks", filled(0, 255), filled(0)))
    assert masks.palette == {"class_0": (0, 0, 0), "class_1": (255, 255, 255)}


def test_colours_become_a_palette(tmp_path: Path) -> None:
    road, car, black = (128, 64, 128), (0, 0, 142), (0, 0, 0)
    found = look(labelled(tmp_path, filled(road, car), filled(black, road)))
    assert found.palette == {"class_0": black, "class_1": car, "class_2": road}
    assert found.class_names == tuple(found.palette)


def test_an_ending_of_label_files_is_found(tmp_path: Path) -> None:
    assert look(labelled(tmp_path, filled(0, 1), filled(0, 1), ending="_L")).label_suffix == "_L"


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        (("Train", "valid"), {"train": "Train", "val": "valid"}),
        (("training_2019", "test"), {"train": "training_2019", "val": "test"}),
    ],
)
def test_splits_are_known_by_the_beginnings_of_their_names(
    tmp_path: Path, splits: tuple[str, str], expected: dict[str, str]
) -> None:
    assert look(labelled(tmp_path, filled(0, 1), filled(0, 1), splits=splits)).splits == expected


def test_pascal_vocs_lists_are_splits(tmp_path: Path) -> None:
    for name in ("train", "val", "trainval"):
        put(tmp_path / f"VOC2012/ImageSets/Segmentation/{name}.txt", b"a\n")
    put(tmp_path / "VOC2012/JPEGImages/a.jpg", encoded(image(), ".jpg"))
    put(tmp_path / "VOC2012/SegmentationClass/a.png", encoded(filled(0, 1, 2, 255).astype(np.uint8)))
    found = look(tmp_path)
    assert found.layout == "voc" and found.splits == {"train": "train", "val": "val"}
    assert len(found.class_names) == 3


def coco(objects: int = 3) -> dict[str, Any]:
    """An image of 30 x 40 with so many objects; categories are not in the order of their ids."""
    return {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 30, "width": 40}],
        "categories": [{"id": 7, "name": "dog"}, {"id": 2, "name": "cat"}],
        "annotations": [{"id": n, "image_id": 1, "category_id": 7} for n in range(objects)],
    }


def test_cocos_files_name_classes_and_count_objects(tmp_path: Path) -> None:
    for split in ("train2020", "val2020"):
        put(tmp_path / f"annotations/instances_{split}.json", json.dumps(coco()).encode())
    found = look(tmp_path)
    assert found.layout == "coco" and found.task == "instance" and found.named
    assert found.class_names == found.thing_classes == ("cat", "dog")
    assert found.most_objects == 3 and found.size == (30, 40) and not found.annotation_files

    panoptic = coco()
    panoptic["categories"] = [{"id": 2, "name": "cat", "isthing": 1}, {"id": 9, "name": "sky", "isthing": 0}]
    panoptic["annotations"] = [{"image_id": 1, "file_name": "a.png", "segments_info": [{}, {}, {}, {}]}]
    for split in ("train2020", "val2020"):
        put(tmp_path / f"annotations/panoptic_{split}.json", json.dumps(panoptic).encode())
    both = look(tmp_path)
    assert both.task == "panoptic" and both.most_objects == 4
    assert {*both.class_names} == {"cat", "dog", "sky"} and {*both.thing_classes} == {"cat", "dog"}


def test_annotation_files_within_the_splits_folders_are_found(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        put(tmp_path / f"{split}/_annotations.coco.json", json.dumps(coco()).encode())
    found = look(tmp_path)
    assert found.splits == {"train": "train", "val": "valid"}
    assert found.annotation_files == {"instances": "{folder}/_annotations.coco.json"}


def test_of_several_data_sets_none_is_taken_silently(tmp_path: Path) -> None:
    for top in ("a", "b"):
        labelled(tmp_path / "maps" / top, filled(0, 1), filled(0, 1))
        put(tmp_path / f"coco/{top}/annotations/instances_train.json", json.dumps(coco()).encode())
        put(tmp_path / f"exported/{top}/valid/_annotations.coco.json", json.dumps(coco()).encode())
        put(tmp_path / f"voc/{top}/ImageSets/Segmentation/train.txt", b"a\n")
    put(labelled(tmp_path / "both", filled(0, 1), filled(0, 1)) / "annotations/instances_val.json", b"{}")
    for folder, sets in {
        "maps": "a/annotations/<split>/, b/annotations/<split>/",
        "coco": "a/annotations/instances_train.json, b/annotations/instances_train.json",
        "exported": "a/valid/_annotations.coco.json, b/valid/_annotations.coco.json",
        "voc": "a/ImageSets/Segmentation/, b/ImageSets/Segmentation/",
        "both": "annotations/instances_val.json, annotations/<split>/",
    }.items():
        with pytest.raises(ValueError, match=rf"{folder} holds several data sets: {sets}; leave one of them there, or"):
            look(tmp_path / folder)


def test_cocos_annotations_in_two_top_folders_with_maps_are_one_data_set(tmp_path: Path) -> None:
    # as COCO's own archives unpack: panoptic maps lie below annotations/, images below images/ by some habits
    panoptic = {**coco(), "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": [{}]}]}
    for split in ("train", "val"):
        put(tmp_path / f"one/annotations/instances_{split}.json", json.dumps(coco()).encode())
        put(tmp_path / f"two/annotations/panoptic_{split}.json", json.dumps(panoptic).encode())
        put(tmp_path / f"two/annotations/panoptic_{split}/a.png", encoded(filled(0, 1).astype(np.uint8)))
        put(tmp_path / f"two/images/{split}/a.jpg", encoded(image(), ".jpg"))
    assert look(tmp_path).task == "panoptic"


def test_half_of_a_layout_is_named(tmp_path: Path) -> None:
    put(tmp_path / "labels/annotations/train/a.png", encoded(filled(0, 1).astype(np.uint8)))
    put(tmp_path / "images/images/train/a.jpg", encoded(image(), ".jpg"))
    with pytest.raises(ValueError, match="has label files in annotations/<split>/ without images in images/<split>/"):
        look(tmp_path / "labels")
    with pytest.raises(ValueError, match="has images in images/<split>/ without label files in annotations/<split>/"):
        look(tmp_path / "images")


def test_what_is_not_understood_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing does not exist; name a folder or archive of images and labels"):
        look(tmp_path / "nothing")
    put(tmp_path / "flat/a.jpg", encoded(image(), ".jpg"))
    with pytest.raises(ValueError, match="flat has no layout that is known, which are images/<split>/ with annotat"):
        look(tmp_path / "flat")
    with pytest.raises(ValueError, match=r"are one, two, none of them for training and validation; call them training"):
        look(labelled(tmp_path / "splits", filled(0, 1), filled(0, 1), splits=("one", "two")))
    with pytest.raises(ValueError, match="its labels hold the id 0 alone; two classes"):
        look(labelled(tmp_path / "single", filled(0), filled(0, 0)))
    with pytest.raises(ValueError, match="some label files hold colours and some class ids"):
        look(labelled(tmp_path / "mixed", filled((1, 2, 3), (4, 5, 6)), filled(1, 2)))
    photograph = np.arange(12 * 16 * 3).reshape(12, 16, 3) % 251
    with pytest.raises(ValueError, match="a.png has more than 64 colours; a label file has one a class"):
        look(labelled(tmp_path / "photographs", photograph, photograph))
    torn = {**coco(), "images": [{"id": 1}]}
    for split in ("train", "val"):
        put(tmp_path / f"torn/annotations/instances_{split}.json", json.dumps(torn).encode())
    with pytest.raises(
        ValueError, match=r"do not hold COCO's categories, images and annotations \(KeyError: 'height'\)"
    ):
        look(tmp_path / "torn")
