from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.params.load import parse_params
from pipeline.params.schema import DatasetConfig, Row
from pipeline.project.own_images import OwnImages
from pipeline.project.own_row import dataset_entry, dataset_name, row_entry, row_name
from pipeline.project.settings import Entries, project_settings
from tests.helpers.shared import PROJECT

FOUND = OwnImages(
    layout="folder",
    splits={"train": "training", "val": "validation"},
    task="semantic",
    class_names=("class_0", "class_1"),
    named=False,
    size=(360, 480),
    read="2 of 2 label files",
)


def parsed(**changes: Any) -> tuple[DatasetConfig, Row]:
    """Dataset and row of a project whose images were found to be so."""
    found = replace(FOUND, **changes)
    own = Entries(dataset_entry("mine", found, source="data/mine"), row_entry("mine", found))
    text = project_settings((PROJECT / "params.yaml").read_text(), own)
    assert max(map(len, text.splitlines())) <= 120
    params = parse_params(yaml.safe_load(text))
    return params.datasets["mine"], params.rows["mine_tiny"]


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("camvid.zip", "camvid"),
        ("my cells.tar.gz", "my_cells"),
        ("2019", "images_2019"),
        ("Shapes", "my_shapes"),
        ("...", "images"),
    ],
)
def test_a_dataset_is_called_as_its_file(file: str, name: str) -> None:
    assert dataset_name(Path("data") / file) == name
    assert row_name(name) == f"{name}_tiny"


def test_sizes_follow_from_those_of_the_images() -> None:
    _, row = parsed()  # 360 is brought to 352: 0.7 to 1.4 times that, in steps of 8
    assert row.train.augmentation.short_sides == (248, 280, 320, 352, 384, 440, 496)
    assert row.train.augmentation.crop == (256, 352)  # 0.75 x 352, and 4 / 3 of that
    assert (row.test.short_side, row.test.long_side_max) == (352, 576)  # 1.25 x 4 / 3 x 352
    _, tall = parsed(size=(480, 360))
    assert tall.train.augmentation.crop == (352, 256)
    _, small = parsed(size=(20, 30))
    assert small.test.short_side == 64
    _, large = parsed(size=(3000, 9000))
    assert large.test.short_side == 352 and large.train.augmentation.crop == (256, 512)


def test_objects_ask_for_more_queries_than_an_image_has_of_them() -> None:
    things = {"layout": "coco", "task": "instance", "thing_classes": ("class_0",), "named": True}
    _, few = parsed(**things, most_objects=12)
    assert few.model.query_decoder.queries == 30  # as the preset has it
    _, many = parsed(**things, most_objects=100)
    assert many.model.query_decoder.queries == 110
    assert many.train.augmentation.max_label_share == 1.0 and many.task == "instance"


def test_a_dataset_says_what_was_found() -> None:
    names = tuple(f"a class with a name of some length {number}" for number in range(20))
    dataset, row = parsed(class_names=names, label_suffix="_L")
    assert dataset.class_names == names and dataset.label_suffix == "_L" and row.model.num_classes == 20
    assert dataset.splits == {"train": "training", "val": "validation"} and dataset.sources == ("data/mine",)
    coloured, _ = parsed(palette={"class_0": (0, 0, 0), "class_1": (255, 0, 255)})
    assert coloured.palette == {"class_0": ((0, 0, 0),), "class_1": ((255, 0, 255),)}
    roboflow, _ = parsed(
        layout="coco",
        task="instance",
        named=True,
        thing_classes=("class_1",),
        annotation_files={"instances": "{folder}/_annotations.coco.json"},
    )
    assert roboflow.annotation_path("instances", "val") == "validation/_annotations.coco.json"


def test_classes_without_names_are_asked_for() -> None:
    assert "in class_names, in the order of their ids" in dataset_entry("mine", FOUND, source="a")
    assert "Give the classes" not in dataset_entry("mine", replace(FOUND, named=True), source="a")
    coloured = replace(FOUND, palette={"class_0": (0, 0, 0), "class_1": (9, 9, 9)})
    assert "call its colours `ignore`" in dataset_entry("mine", coloured, source="a")
