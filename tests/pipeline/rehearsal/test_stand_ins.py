"""Stand-in data sets."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.datasets import coco, folder, voc
from pipeline.data.images.codecs import IGNORE
from pipeline.data.shards.build import LAYOUTS
from pipeline.params.load import load_params
from pipeline.params.schema import DatasetConfig
from pipeline.rehearsal.stand_ins import scene, write_stand_ins
from tests.helpers.shared import PROJECT

IMAGES = {"train": 2, "val": 1}


def published(dataset: str) -> DatasetConfig:
    return load_params(PROJECT / "params.yaml").dataset(dataset)


@pytest.mark.parametrize(
    ("dataset", "archives"),
    [
        ("ade20k", ["ADEChallengeData2016.zip"]),
        ("cityscapes", ["gtFine_trainvaltest.zip", "leftImg8bit_trainvaltest.zip"]),
        ("cityscapes_objects", ["gtFine_trainvaltest.zip", "leftImg8bit_trainvaltest.zip"]),
        ("ade20k_objects", ["ADEChallengeData2016.zip", "annotations_instance.zip"]),
        ("vistas", ["mapillary-vistas.zip"]),
        (
            "coco",
            [
                "annotations_trainval2017.zip",
                "panoptic_annotations_trainval2017.zip",
                "train2017.zip",
                "val2017.zip",
            ],
        ),
        ("nuclei", ["nuclei.zip"]),
    ],
)
def test_they_have_the_archives_and_the_layout_of_the_published_ones(
    dataset: str, archives: list[str], tmp_path: Path
) -> None:
    config = published(dataset)
    written = write_stand_ins(config, tmp_path, size=(48, 64), images=IMAGES)
    assert sorted(path.name for path in written) == archives
    read = LAYOUTS[config.layout].records
    for split, count in IMAGES.items():
        assert len(read(config, written, split)) == count


@pytest.mark.parametrize("dataset", ["ade20k", "cityscapes"])
def test_their_labels_are_read_as_the_classes_that_were_drawn(dataset: str, tmp_path: Path) -> None:
    config = published(dataset)
    written = write_stand_ins(config, tmp_path, size=(48, 64), images=IMAGES)
    (record,) = LAYOUTS[config.layout].records(config, written, "val")
    segments = record.read().segments
    drawn = scene((48, 64), len(config.class_names), seed=1000).classes
    assert segments is not None
    assert (segments == np.where(drawn < 0, IGNORE, drawn)).all()
    assert len(np.unique(drawn)) > 3


@pytest.mark.parametrize("dataset", ["cityscapes_objects", "ade20k_objects", "vistas"])
def test_objects_are_the_shapes_of_things(dataset: str, tmp_path: Path) -> None:
    config = published(dataset)
    written = write_stand_ins(config, tmp_path, size=(48, 64), images=IMAGES)
    (record,) = LAYOUTS[config.layout].records(config, written, "val")
    read = record.read()
    drawn = scene((48, 64), len(config.class_names), seed=1000)
    assert read.segments is not None and read.segment_classes is not None
    classes = np.array([*read.segment_classes, *[-1] * (256 - len(read.segment_classes))])[read.segments]
    assert (classes == drawn.classes).all()
    things = [config.class_names.index(name) for name in config.thing_classes]
    shown = np.unique(drawn.shapes[np.isin(drawn.classes, things)])
    assert sum(class_id in things for class_id in read.segment_classes) == len(shown) > 1


def test_cocos_have_things_and_stuff_and_masks_that_are_the_maps_segments(tmp_path: Path) -> None:
    config = published("coco")
    written = write_stand_ins(config, tmp_path, size=(48, 64), images=IMAGES)
    (record,) = coco.records(config, written, "val")
    read = record.read()
    drawn = scene((48, 64), len(config.class_names), seed=1000)
    assert read.segment_classes is not None and read.instances is not None
    things = [config.class_names.index(name) for name in config.thing_classes]
    shown = np.unique(drawn.shapes[drawn.shapes > 0]).tolist()
    areas = sorted(float((drawn.shapes == shape).sum()) for shape in shown if drawn.class_of[shape] in things)
    assert sorted(instance.area for instance in read.instances) == areas
    assert list(read.segment_classes) == [drawn.class_of[shape] for shape in shown]


def test_a_users_colours_offsets_and_lists_of_files_are_kept_to(tmp_path: Path) -> None:
    names = ("sky", "road")
    palette = {"sky": ((0, 0, 255),), "road": ((90, 90, 90),), "ignore": ((255, 0, 255),)}
    coloured = DatasetConfig(layout="voc", class_names=names, palette=palette, splits={"val": "val"})
    shifted = DatasetConfig(
        layout="folder", class_names=names, label_offset=-1, label_suffix="_mask", splits={"val": "validation"}
    )
    drawn = scene((48, 64), 2, seed=0).classes
    for config, read in ((coloured, voc.records), (shifted, folder.records)):
        place = tmp_path / config.layout
        place.mkdir()
        written = write_stand_ins(config, place, size=(48, 64), images={"val": 1})
        (record,) = read(config, written, "val")
        assert (record.read().segments == np.where(drawn < 0, IGNORE, drawn)).all()


def test_more_than_255_classes_have_labels_of_16_bits(tmp_path: Path) -> None:
    many = DatasetConfig(
        layout="folder",
        class_names=tuple(f"c{index}" for index in range(400)),
        splits={"val": "validation"},
        ignore_label=65535,
    )
    written = write_stand_ins(many, tmp_path, size=(64, 64), images={"val": 1})
    (record,) = folder.records(many, written, "val")
    segments = record.read().segments
    drawn = scene((64, 64), 400, seed=0).classes
    assert segments is not None and drawn.max() > 255
    assert (segments[drawn >= 0] == drawn[drawn >= 0]).all()


def test_the_same_seed_draws_the_same_scene() -> None:
    one, same, other = scene((32, 32), 5, 0), scene((32, 32), 5, 0), scene((32, 32), 5, 1)
    assert all((getattr(one, field.name) == getattr(same, field.name)).all() for field in dataclasses.fields(one)[:3])
    assert (one.image != other.image).any()
