from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.records import Instance, Labelled, Record
from pipeline.data.shards import build
from pipeline.data.shards.writer import verify
from pipeline.params.schema import DatasetConfig
from pipeline.storage.results.data import EmptyThings, Manifest, manifest_digest
from tests.helpers.coco_files import CONFIG, INSTANCES, write_coco
from tests.helpers.images import encoded, image
from tests.helpers.shard_folders import facts_of, rows


def built(folder: Path, objects: list[dict[str, Any]], config: DatasetConfig = CONFIG) -> Manifest:
    """Of two pictures of 6 x 8, whose objects are in picture a."""
    annotations = [{**INSTANCES["annotations"][0], "id": place, **fields} for place, fields in enumerate(objects)]
    write_coco(folder, {**INSTANCES, "annotations": annotations}, None)
    return build.build("mine", config, [folder], facts=facts_of(folder))


EMPTY: dict[str, Any] = {"segmentation": []}
CROWD = {"iscrowd": 1}


def name(place: int) -> str:
    return f"d: annotations/instances_val2017.json: annotation {place}, image a"


def test_objects_without_a_pixel_are_counted_and_the_first_five_named(tmp_path: Path, storage: Path) -> None:
    manifest = built(tmp_path / "d", [{}, *[EMPTY] * 5, {**EMPTY, **CROWD}])
    assert manifest.empty_things == {"val": EmptyThings(count=6, first=tuple(map(name, range(1, 6))))}
    assert manifest.instances == {"val": (0, 6, 0, 0)}  # as annotated, crowds not counted
    assert rows(storage, manifest, "val")[0]["things"] == 7
    whole = built(tmp_path / "whole", [{}])
    assert whole.empty_things == {}
    assert manifest.digest == manifest_digest(manifest)


def test_a_warning_begins_above_two_percent(tmp_path: Path, storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built(tmp_path / "d", [EMPTY, *[{}] * 49])  # 1 of 50
    assert "no pixel" not in capsys.readouterr().err
    built(tmp_path / "d", [EMPTY, *[{}] * 48])
    warning = "mine val: 1 of 49 annotated objects have no pixel, and no training sees them: "
    assert f"{warning}{name(0)}\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ([EMPTY, EMPTY], r"none of the 2 annotated .* val of mine .*: 2 have no pixel, 0 are crowds .* 0, image a; "),
        ([CROWD, CROWD], r"none of the 2 annotated .* val of mine .*: 0 have no pixel, 2 are crowds"),
        ([CROWD, EMPTY], "none of the 2 annotated .*: 1 have no pixel, 1 are crowds"),
    ],
)
def test_a_split_of_objects_that_can_be_no_targets_is_an_error(
    tmp_path: Path, storage: Path, objects: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        built(tmp_path / "d", objects)
    assert not list(storage.glob("shards/*/build.json"))


def test_crowds_alone_are_allowed_where_a_split_may_be_empty(tmp_path: Path, storage: Path) -> None:
    allowed = dataclasses.replace(CONFIG, on_empty="allow")
    assert built(tmp_path / "d", [CROWD], allowed).instances == {"val": (0, 0, 0, 0)}


def test_a_split_without_any_object_is_left_to_the_looks_at_its_classes(tmp_path: Path, storage: Path) -> None:
    assert built(tmp_path / "d", []).empty_things == {}


def test_segments_of_things_without_a_pixel_are_named_too() -> None:
    def read() -> Labelled:
        ids = np.zeros((4, 4), np.int64)
        return Labelled(encoded(image(4, 4)), ids, (1, 1, 0), (False, False, False))

    stored = verify(Record("a", "a.png", "a.txt", read), 2, frozenset({1}))
    assert (stored.targets, stored.empty) == (1, ("a.txt: segment 1, image a",))  # segment 2 is stuff


def test_an_instance_without_a_name_is_counted_by_its_place() -> None:
    objects = (Instance(1, (0, 0, 4, 4), 16.0, False, b"0`0"), Instance(1, (0, 0, 4, 4), 16.0, False, b"`0"))
    record = Record("a", "a.png", "a.json", lambda: Labelled(encoded(image(4, 4)), None, None, instances=objects))
    stored = verify(record, 2, frozenset({1}))
    assert (stored.targets, stored.empty) == (1, ("a.json: instance 1, image a",))


def test_categories_that_class_names_leaves_out_are_in_the_manifest(tmp_path: Path, storage: Path) -> None:
    manifest = built(tmp_path / "d", [{}])
    assert manifest.left_out == ()
    categories = [*INSTANCES["categories"], {"id": 5, "name": "tram"}, {"id": 6, "name": "bus"}]
    annotations = [{**INSTANCES["annotations"][0], "category_id": number} for number in (5, 3)]
    content = {**INSTANCES, "categories": categories, "annotations": annotations}
    manifest = build.build("mine", CONFIG, [write_coco(tmp_path / "more", content, None)], facts=[])
    assert manifest.left_out == ("tram",)  # no picture holds a bus
    assert manifest.instances == {"val": (0, 1, 0, 0)}
