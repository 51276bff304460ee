from __future__ import annotations

import dataclasses
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.datasets import cityscapes
from pipeline.data.records import Labelled
from pipeline.params.class_names import CLASS_NAMES
from pipeline.params.schema import DatasetConfig
from tests.helpers.cityscapes_files import instance_ids
from tests.helpers.images import encoded, image, put, zipped
from tests.helpers.shared import shared

CONFIG = DatasetConfig(
    layout="cityscapes",
    class_names=tuple(f"class {index}" for index in range(19)),
    splits={"train": "train", "val": "val"},
)


CLASSES = CLASS_NAMES["cityscapes"]
PANOPTIC = dataclasses.replace(CONFIG, class_names=CLASSES, thing_classes=CLASSES[11:])


def write(folder: Path, ids: np.ndarray) -> tuple[Path, Path]:
    """One training picture of one city, in the two archives' layout."""
    put(folder / "i/leftImg8bit/train/ulm/ulm_000000_000019_leftImg8bit.png", encoded(image(*ids.shape)))
    wide = ids.astype(np.int32)
    labels = np.where(wide < 1000, wide, wide // 1000).astype(np.uint8)
    put(folder / "g/gtFine/train/ulm/ulm_000000_000019_gtFine_labelIds.png", encoded(labels))
    put(folder / "g/gtFine/train/ulm/ulm_000000_000019_gtFine_instanceIds.png", encoded(ids))
    return folder / "i", folder / "g"


@pytest.mark.parametrize("archived", [False, True])
def test_label_ids_become_train_ids_and_all_others_nothing(tmp_path: Path, archived: bool) -> None:
    # road 7 -> 0, sidewalk 8 -> 1, sky 23 -> 10, bicycle 33 -> 18; ego vehicle 1, bridge 15, licence plate 255 -> 255
    sources = write(tmp_path, np.array([[7, 8, 23, 33], [1, 15, 255, 7]], np.uint8))
    if archived:
        sources = zipped(sources[0], tmp_path / "i.zip"), zipped(sources[1], tmp_path / "g.zip")
    for order in (sources, sources[::-1]):
        (record,) = cityscapes.records(CONFIG, order, "train")
        assert record.name == "ulm/ulm_000000_000019"
        assert record.read().segments.tolist() == [[0, 1, 10, 18], [255, 255, 255, 0]]


def test_a_picture_without_label_and_a_missing_archive_are_named(tmp_path: Path) -> None:
    images, truth = write(tmp_path, np.full((2, 2), 7, np.uint8))
    with pytest.raises(
        ValueError, match=r"no folder gtFine/ in .* \(found leftImg8bit\); layout cityscapes needs it, see docs/data.md"
    ):
        cityscapes.records(CONFIG, [images], "train")
    with pytest.raises(ValueError, match=r"no images leftImg8bit/val/"):
        cityscapes.records(CONFIG, [images, truth], "val")
    (truth / "gtFine/train/ulm/ulm_000000_000019_gtFine_labelIds.png").unlink()
    with pytest.raises(ValueError, match=r"ulm_000000_000019_leftImg8bit\.png has no label gtFine/train/ulm/ulm"):
        cityscapes.records(CONFIG, [images, truth], "train")


def test_the_real_sample_archives_are_read_in_place() -> None:
    sources = [shared(f"data/{name}_trainvaltest-sample.zip") for name in ("leftImg8bit", "gtFine")]
    assert [len(cityscapes.records(CONFIG, sources, split)) for split in ("train", "val")] == [12, 6]
    read = cityscapes.records(CONFIG, sources, "val")[0].read()
    assert read.segments.shape == (360, 480)
    assert set(np.unique(read.segments)) <= {*range(19), 255}


def segments_of(read: Labelled) -> list[tuple[str, int, bool]]:
    """Class, pixels and crowd flag of every segment, by its place."""
    assert read.segments is not None and read.segment_classes is not None
    crowd = read.segment_crowd or (False,) * len(read.segment_classes)
    return [
        (CLASSES[class_id], int((read.segments == place).sum()), flag)
        for place, (class_id, flag) in enumerate(zip(read.segment_classes, crowd, strict=True))
    ]


def test_instance_ids_become_segments_and_groups_crowds(tmp_path: Path) -> None:
    # road; a group of cars, and two cars of their own; a caravan (29) is evaluated no more than the ego vehicle (1)
    ids = np.array([[7, 7, 26, 26001], [26000, 26000, 26000, 1], [29000, 29, 7, 7]], np.uint16)
    (record,) = cityscapes.records(PANOPTIC, write(tmp_path, ids), "train")
    assert record.label_file == "g: gtFine/train/ulm/ulm_000000_000019_gtFine_instanceIds.png"
    read = record.read()
    assert segments_of(read) == [("road", 4, False), ("car", 1, True), ("car", 3, False), ("car", 1, False)]
    assert read.segments.tolist() == [[0, 0, 1, 3], [2, 2, 2, 255], [255, 255, 0, 0]]
    # an object of no class is known as such, a group of them is void as any label that is not evaluated
    assert read.label_map.tolist() == [[0, 0, 13, 13], [13, 13, 13, 255], [19, 255, 0, 0]]


def test_without_objects_of_no_class_segments_say_it_all(tmp_path: Path) -> None:
    (record,) = cityscapes.records(PANOPTIC, write(tmp_path, np.array([[7, 26001]], np.uint16)), "train")
    assert record.read().label_map is None


@pytest.mark.parametrize("value", [34, 999, 34000, 65535])
def test_a_value_that_is_no_instance_id_is_named(tmp_path: Path, value: int) -> None:
    (record,) = cityscapes.records(PANOPTIC, write(tmp_path, np.array([[7, value]], np.uint16)), "train")
    with pytest.raises(ValueError, match=f"instanceIds.png holds {value}, which is no instance id"):
        record.read()


def test_things_are_the_eight_classes_with_objects(tmp_path: Path) -> None:
    wrong = dataclasses.replace(PANOPTIC, thing_classes=("person", "car"))
    with pytest.raises(ValueError, match="has objects of person, rider, .*thing_classes lists person, car"):
        cityscapes.records(wrong, write(tmp_path, np.full((2, 2), 7, np.uint16)), "train")


def test_more_than_255_objects_are_numbered(tmp_path: Path) -> None:
    ids = (26000 + np.arange(300)).reshape(15, 20).astype(np.uint16)
    (record,) = cityscapes.records(PANOPTIC, write(tmp_path, ids), "train")
    assert record.read().segments.ravel().tolist() == list(range(300))


def test_segments_equal_those_of_cityscapesscripts_where_that_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preparation = pytest.importorskip(
        "cityscapesscripts.preparation.createPanopticImgs",
        reason="pip install cityscapesscripts compares with the official conversion",
    )
    maps = [instance_ids(seed) for seed in range(4)]
    with zipfile.ZipFile(shared("data/gtFine_trainvaltest-sample.zip")) as archive:
        for name in archive.namelist():
            if name.endswith(cityscapes.INSTANCE_SUFFIX):
                with archive.open(name) as file:
                    maps.append(np.array(Image.open(file)).astype(np.uint16))
    for number, ids in enumerate(maps):
        name = f"val/ulm/ulm_000000_{number:06d}"
        put(tmp_path / f"leftImg8bit/{name}_leftImg8bit.png", encoded(image(*ids.shape)))
        put(tmp_path / f"gtFine/{name}_gtFine_instanceIds.png", encoded(ids))
    monkeypatch.setenv("CITYSCAPES_DATASET", str(tmp_path))
    preparation.convert2panoptic(useTrainId=True, setNames=["val"])
    official = json.loads((tmp_path / "gtFine/cityscapes_panoptic_val_trainId.json").read_text())
    records = cityscapes.records(PANOPTIC, [tmp_path], "val")
    assert len(records) == len(maps)
    for record, annotation in zip(records, official["annotations"], strict=True):
        read = record.read()
        assert segments_of(read) == [
            (CLASSES[each["category_id"]], each["area"], bool(each["iscrowd"])) for each in annotation["segments_info"]
        ]
        colours = np.array(Image.open(tmp_path / "gtFine/cityscapes_panoptic_val_trainId" / annotation["file_name"]))
        found = np.array([0, *(each["id"] for each in annotation["segments_info"])])
        assert ((colours @ [1, 256, 65536]) == found[np.where(read.segments == 255, 0, read.segments + 1)]).all()


def test_the_sample_archives_give_the_same_classes_with_and_without_instances() -> None:
    sources = [shared(f"data/{name}_trainvaltest-sample.zip") for name in ("leftImg8bit", "gtFine")]
    labelled = [record.read() for record in cityscapes.records(CONFIG, sources, "val")]
    read = [record.read() for record in cityscapes.records(PANOPTIC, sources, "val")]
    assert all({class_id for class_id, _, _ in segments_of(each)} & {*CLASSES[11:]} for each in read)
    for with_things, without in zip(read, labelled, strict=True):
        classes = np.array([*with_things.segment_classes, *[255] * (256 - len(with_things.segment_classes))])
        assert (classes[with_things.segments] == without.segments).all()
