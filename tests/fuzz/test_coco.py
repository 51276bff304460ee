"""COCO's files, whole and changed: right targets or one sentence."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from tests.fuzz import runs
from tests.fuzz.changes import changed_bytes, changed_tree, inputs
from tests.fuzz.child import Child, Sentence
from tests.fuzz.oracle import check_instance, png_values
from tests.helpers.coco_files import CONFIG, IDS, INSTANCES, PANOPTIC, write_coco

SIZE = (6, 8)
"""Of both pictures of tests.helpers.coco_files."""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COCO folder whose annotation files are written anew for every input."""
    return write_coco(tmp_path_factory.mktemp("coco") / "pictures")


coordinates = st.integers(-1, 9) | st.floats(-1, 9).map(lambda value: round(value, 2))


@st.composite
def segmentations(draw: st.DrawFn) -> Any:
    """Polygons, or run lengths in either form."""
    if draw(st.booleans()):
        points = st.tuples(coordinates, coordinates.map(lambda value: min(value, SIZE[0] + 1)))
        polygons = st.lists(points, min_size=3, max_size=6).map(
            lambda pairs: [value for pair in pairs for value in pair]
        )
        return draw(st.lists(polygons, min_size=1, max_size=3))
    pixels = draw(st.lists(st.booleans(), min_size=48, max_size=48))
    mask = np.array(pixels, np.uint8).reshape(SIZE)
    if draw(st.booleans()):
        return {"size": list(SIZE), "counts": coco_mask.encode(np.asfortranarray(mask))["counts"].decode()}
    starts = [0, *(place for place in range(1, 48) if mask.T.flat[place] != mask.T.flat[place - 1]), 48]
    counts = [int(count) for count in np.diff(starts)]
    return {"size": list(SIZE), "counts": [0, *counts] if mask[0, 0] else counts}


@st.composite
def instances(draw: st.DrawFn) -> dict[str, Any]:
    """An instance file as exporters write it: boxes, areas and flags may be missing or of no use."""
    found = []
    for identity in range(draw(st.integers(1, 4))):
        annotation = {
            "id": identity,
            "image_id": draw(st.sampled_from((2, 7))),
            "category_id": draw(st.sampled_from((3, 18))),
        }
        annotation["segmentation"] = draw(segmentations())
        for key, values in (
            ("bbox", ([0, 0, 8, 6], [1.5, 1.25, 3, 2], [0, 0, 0, 0], [], None, [0.1, 0.1, 0.2, 0.2], [900, 900, 5, 5])),
            ("area", (0, 5, 7.5, None, -1, 1e9)),
            ("iscrowd", (0, 1, "0", "1", False, True, 0.0, "false")),
        ):
            if (place := draw(st.integers(0, len(values)))) < len(values):
                annotation[key] = values[place]
        found.append(annotation)
    square = [[1, 1, 4, 1, 4, 3, 1, 3]]  # a split must hold an object
    found.append({"id": 99, "image_id": 2, "category_id": 3, "segmentation": square})
    return {**INSTANCES, "annotations": found}


Files = Mapping[str, Any]
"""Of each kind its tree, or bytes that are no JSON."""


@st.composite
def changed_files(draw: st.DrawFn) -> Files:
    """One kind of file or both, one of them changed."""
    files: dict[str, Any] = {"instances": draw(st.sampled_from((INSTANCES,)) | instances()), "panoptic": PANOPTIC}
    kind = draw(st.sampled_from(("instances", "instances", "panoptic")))
    if draw(st.booleans()):
        files = {kind: files[kind]}
    if draw(st.integers(0, 9)):
        files[kind] = draw(changed_tree(files[kind]))
    else:
        files[kind] = draw(changed_bytes(json.dumps(files[kind]).encode()))
    return files


def ends_well(child: Child, folder: Path, files: Files) -> list[dict[str, Any]] | None:
    """Shard a folder with these annotation files; its rows, None where it is refused. AssertionError unless the end is
    right."""
    for kind in ("instances", "panoptic"):
        file = folder / f"annotations/{kind}_val2017.json"
        file.unlink(missing_ok=True)
        if kind in files:
            file.write_bytes(files[kind] if isinstance(files[kind], bytes) else json.dumps(files[kind]).encode())
    settings = {field.name: getattr(CONFIG, field.name) for field in dataclasses.fields(CONFIG)}
    with tempfile.TemporaryDirectory() as storage:
        found = child.run(runs.shard, [folder], Path(storage), settings)
        runs.check_storage(Path(storage), refused=isinstance(found, Sentence))
    event("a sentence" if isinstance(found, Sentence) else "targets")
    if isinstance(found, Sentence):
        runs.check_sentence(found, [folder.name, "mine"])
        return None
    trees = {
        kind: json.loads(content.decode("utf-8-sig")) if isinstance(content, bytes) else content
        for kind, content in files.items()
    }
    rows: list[dict[str, Any]] = found["val"]
    check_rows(rows, trees.get("instances"), trees.get("panoptic"))
    return rows


def check_rows(rows: Sequence[Mapping[str, Any]], instances: Any, panoptic: Any) -> None:
    """AssertionError unless the rows are those of the files."""
    listings = [listing for listing in (panoptic, instances) if listing is not None]
    images = {int(entry["id"]): entry for listing in listings for entry in listing["images"]}
    names = [unicodedata.normalize("NFC", images[identity]["file_name"]) for identity in sorted(images)]
    assert [row["name"] for row in rows] == [name.replace("./", "").rpartition(".")[0] for name in names]
    for identity, row in zip(sorted(images), rows, strict=True):
        assert (row["height"], row["width"]) == (images[identity]["height"], images[identity]["width"]) == SIZE
        if instances is None or identity not in [int(entry["id"]) for entry in instances["images"]]:
            assert row["instances"] is None
        else:
            wanted = of_picture(instances, identity)
            kept = [annotation for annotation in wanted if class_of(instances, annotation) is not None]
            assert len(row["instances"]) == len(kept)
            for stored, annotation in zip(row["instances"], kept, strict=True):
                assert stored["class"] == class_of(instances, annotation)
                check_instance(stored, annotation, SIZE)
        if panoptic is None or identity not in [int(entry["id"]) for entry in panoptic["images"]]:
            assert row["segments"] is None
        else:
            (annotation,) = of_picture(panoptic, identity)
            check_segments(row, panoptic, annotation)


def of_picture(listing: Mapping[str, Any], identity: int) -> list[Mapping[str, Any]]:
    return [annotation for annotation in listing["annotations"] if int(annotation["image_id"]) == identity]


def class_of(listing: Mapping[str, Any], entry: Mapping[str, Any]) -> int | None:
    """The class of an annotation or segment; None: it is left out."""
    (name,) = [each["name"] for each in listing["categories"] if int(each["id"]) == int(entry["category_id"])]
    return CONFIG.class_names.index(name) if name in CONFIG.class_names else None


def check_segments(row: Mapping[str, Any], listing: Mapping[str, Any], annotation: Mapping[str, Any]) -> None:
    """AssertionError unless the segments of a row are those of the map IDS."""
    kept = [info for info in annotation["segments_info"] if class_of(listing, info) is not None]
    assert row["segment_classes"] == [class_of(listing, info) for info in kept]
    right = np.full(SIZE, 255)
    for place, info in enumerate(kept):
        right[int(info["id"]) == IDS] = place
    np.testing.assert_array_equal(png_values(row["segments"])[..., 0], right)
    flags = [str(info.get("iscrowd", 0)).strip().lower() in ("1", "1.0", "true") for info in kept]
    assert (row["segment_crowd"] or [False] * len(kept)) == flags


@inputs(30)
@given(content=instances())
def test_objects_of_all_forms_become_the_targets_that_their_masks_say(
    child: Child, folder: Path, content: dict[str, Any]
) -> None:
    assert ends_well(child, folder, {"instances": content}) is not None


@inputs(80)
@given(files=changed_files())
def test_changed_annotation_files_give_right_targets_or_a_sentence(child: Child, folder: Path, files: Files) -> None:
    ends_well(child, folder, files)


@pytest.mark.full
@inputs(300)
@given(content=instances())
def test_many_objects_of_all_forms_become_the_targets_that_their_masks_say(
    child: Child, folder: Path, content: dict[str, Any]
) -> None:
    assert ends_well(child, folder, {"instances": content}) is not None


@pytest.mark.full
@inputs(900)
@given(files=changed_files())
def test_many_changed_annotation_files_give_right_targets_or_a_sentence(
    child: Child, folder: Path, files: Files
) -> None:
    ends_well(child, folder, files)
