from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline import shards
from pipeline.datasets.source import Instance, Labelled, Record
from pipeline.files import sha256
from pipeline.pictures import decode_segments
from tests.pipeline.pictures import config, encoded, image, labels, put, write_folder
from tests.shared import shared

FACTS = [{"name": "mine", "path": "archives/00/folder.json", "bytes": 1, "sha256": "00"}]


def build(folder: Path, **changes: Any) -> dict[str, Any]:
    return shards.build("mine", config(**changes), [folder], facts=FACTS)


def rows(storage: Path, manifest: dict[str, Any], split: str) -> list[dict[str, Any]]:
    files = [storage / shard["path"] for shard in manifest["splits"][split]["shards"]]
    return [row for file in files for row in pa.ipc.open_file(pa.memory_map(str(file))).read_all().to_pylist()]


def leftovers(storage: Path) -> list[str]:
    return [path.name for path in (storage / "shards").iterdir()]


def test_every_record_comes_back_as_it_was(tmp_path: Path, storage: Path) -> None:
    manifest = build(write_folder(tmp_path / "d"))
    read = rows(storage, manifest, "train")
    assert [row["name"] for row in read] == ["p0", "p1", "p2"]
    assert read[2]["image"] == encoded(image(seed=2), ".jpg")
    assert (read[2]["height"], read[2]["width"]) == (12, 16)
    ids = decode_segments(read[2]["segments"], "")
    assert ids.dtype == np.uint8
    np.testing.assert_array_equal(ids, np.where(labels() == 9, 255, labels()))
    assert len({row["digest"] for row in read}) == 3
    without = ("segment_classes", "segment_crowd", "segment_boxes", "instances")
    assert [read[2][key] for key in without] == [None] * 4
    assert read[2]["things"] == 0


def test_the_manifest_counts_pixels_pictures_and_bytes(tmp_path: Path, storage: Path) -> None:
    manifest = build(write_folder(tmp_path / "d"), thing_classes=("car",))
    # one picture, 12 x 16: column 0 ignored (12); car 4 x 4 = 16; sky 6 x 15 - 8 = 82; road the same
    assert manifest["pixels"] == {"train": [3 * 82, 3 * 82, 3 * 16], "val": [2 * 82, 2 * 82, 2 * 16]}
    assert manifest["ignored_pixels"] == {"train": 36, "val": 24}
    assert manifest["pictures"] == {"train": [3, 3, 3], "val": [2, 2, 2]}
    assert manifest["picture_sizes"]["val"] == {"height": [12, 12], "width": [16, 16]}
    assert manifest["class_names"] == ["sky", "road", "car"]
    assert (manifest["thing_classes"], manifest["ignore_label"]) == (["car"], 255)
    assert manifest["labels"] == ["semantic"]  # ids are classes: cars that touch are one region, and nobody counts it
    assert manifest["instances"] == {"train": [0, 0, 0], "val": [0, 0, 0]}
    assert manifest["sources"] == [{"name": "mine", "bytes": 1, "sha256": "00"}]
    for split, count in (("train", 3), ("val", 2)):
        assert manifest["splits"][split]["records"] == count
        for shard in manifest["splits"][split]["shards"]:
            path = storage / shard["path"]
            assert (path.stat().st_size, sha256(path)) == (shard["bytes"], shard["sha256"])
    assert manifest["digest"] == shards.manifest_digest(manifest)
    assert manifest["digest"] != shards.manifest_digest({**manifest, "class_names": ["a", "b", "c"]})


def test_the_same_input_gives_the_same_bytes_and_mends_altered_shards(tmp_path: Path, storage: Path) -> None:
    folder = write_folder(tmp_path / "d")
    first = build(folder)
    path = storage / first["splits"]["train"]["shards"][0]["path"]
    path.write_bytes(b"altered")
    assert build(folder) == first
    assert sha256(path) == first["splits"]["train"]["shards"][0]["sha256"]
    assert len(leftovers(storage)) == 1
    put(folder / "annotations/training/p0.png", encoded(np.zeros((12, 16), np.uint8)))
    assert build(folder)["digest"] != first["digest"]


def test_processes_change_nothing(tmp_path: Path, storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "d", train=20)
    alone = build(folder)
    monkeypatch.setattr(shards, "FEW_RECORDS", 10)
    assert shards.build("mine", config(), [folder], facts=FACTS, processes=2) == alone
    put(folder / "annotations/training/p3.png", encoded(labels(5, 5)))
    with pytest.raises(ValueError, match="p3.png is 5 x 5"):
        shards.build("mine", config(), [folder], facts=FACTS, processes=2)
    assert len(leftovers(storage)) == 1


def test_shards_are_cut_at_their_size_and_keep_the_order(
    tmp_path: Path, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = len(encoded(image(), ".jpg")) + len(encoded(np.where(labels() == 9, 255, labels()).astype(np.uint8)))
    monkeypatch.setattr(shards, "_MIB", record)  # so that shard_mib counts records of about this size
    manifest = build(write_folder(tmp_path / "d", train=7), shard_mib=3)
    entries = manifest["splits"]["train"]["shards"]
    assert sum(entry["records"] for entry in entries) == 7
    assert len(entries) >= 3
    assert [row["name"] for row in rows(storage, manifest, "train")] == [f"p{index}" for index in range(7)]


def torn(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


@pytest.mark.parametrize(
    ("file", "data", "message"),
    [
        ("images/training/p1.jpg", torn(encoded(image(200, 200), ".jpg")), r"images/training/p1\.jpg does not decode"),
        ("images/training/p1.jpg", b"", r"images/training/p1\.jpg does not decode"),
        ("images/training/p1.jpg", b"<html>", r"p1\.jpg does not decode .* truncated or not a picture"),
        (
            "annotations/training/p1.png",
            torn(encoded(labels(200, 200))),
            r"annotations/training/p1\.png does not decode",
        ),
        (
            "annotations/training/p1.png",
            encoded(labels(12, 14)),
            r"annotations/training/p1\.png is 12 x 14 \(height x width\), but its picture .*p1\.jpg is 12 x 16",
        ),
        (
            "annotations/training/p1.png",
            encoded(np.full((12, 16), 5, np.uint8)),
            r"annotations/training/p1\.png holds label 5 on 192 pixels.*0 to 2",
        ),
        ("annotations/validation/p9.png", encoded(labels()), r"annotations/validation/p9\.png has no picture"),
        ("images/validation/p9.jpg", encoded(image(), ".jpg"), r"images/validation/p9\.jpg has no label"),
    ],
)
def test_a_bad_file_is_named_and_nothing_half_written_is_left(
    tmp_path: Path, storage: Path, file: str, data: bytes, message: str
) -> None:
    folder = write_folder(tmp_path / "d")
    put(folder / file, data)
    with pytest.raises(ValueError, match=message) as caught:
        build(folder)
    assert "\n" not in str(caught.value)
    assert not (storage / "shards").exists() or leftovers(storage) == []


def test_a_jpeg_that_lacks_its_last_bytes_is_noticed(tmp_path: Path, storage: Path) -> None:
    folder = write_folder(tmp_path / "d")
    data = encoded(image(64, 64), ".jpg")
    put(folder / "annotations/training/p0.png", encoded(labels(64, 64)))
    put(folder / "images/training/p0.jpg", data[:-20])
    with pytest.raises(ValueError, match=r"p0\.jpg does not decode"):
        build(folder)


def test_an_empty_split_a_wrong_thing_class_and_no_classes_are_refused(tmp_path: Path, storage: Path) -> None:
    with pytest.raises(ValueError, match="has no pictures in images/validation/ for split val"):
        build(write_folder(tmp_path / "d", val=0))
    folder = write_folder(tmp_path / "e")
    with pytest.raises(ValueError, match="thing_classes: bus is not among class_names"):
        build(folder, thing_classes=("bus",))
    with pytest.raises(ValueError, match="lists 0 classes"):
        build(folder, class_names=())


def test_a_picture_without_a_labelled_pixel_is_kept(tmp_path: Path, storage: Path) -> None:
    folder = write_folder(tmp_path / "d", train=1)
    put(folder / "annotations/training/p0.png", encoded(np.full((12, 16), 9, np.uint8)))
    manifest = build(folder)
    assert manifest["pictures"]["train"] == [0, 0, 0]
    assert manifest["ignored_pixels"]["train"] == 192


def many_segments() -> Labelled:
    ids = np.arange(400, dtype=np.int32).reshape(20, 20) % 300
    ids[0, 0] = 65535
    return Labelled(encoded(image(20, 20)), ids, tuple(range(3)) * 100)


def test_more_than_255_segments_are_stored_wide() -> None:
    stored = shards.verify(Record("a", "a.png", "a.txt", many_segments), 3)
    ids = decode_segments(stored.row["segments"], "")
    assert ids.dtype == np.int32
    assert ids[0, 0] == -1
    assert ids.max() == 299
    # ids 0..299 once, 0..99 twice, without the first pixel; class = id % 3
    assert stored.pixels.tolist() == [133, 133, 133, 1]
    boxes = np.array(stored.row["segment_boxes"]).reshape(300, 4)
    # id 299 is only at row 14, column 19; id 19 also at row 0, as all below 100 are twice: 300 pixels = 15 rows on
    assert boxes[299].tolist() == [19, 14, 20, 15]
    assert boxes[19].tolist() == [19, 0, 20, 16]


def wrong_segments(classes: tuple[int, ...]) -> Labelled:
    return Labelled(encoded(image(2, 2)), np.array([[0, 1], [2, 255]]), classes)


def test_segments_must_have_a_known_class() -> None:
    with pytest.raises(ValueError, match=r"a\.txt holds segment 2 on 1 pixels; it has 2"):
        shards.verify(Record("a", "a.png", "a.txt", partial(wrong_segments, (0, 1))), 3)
    with pytest.raises(ValueError, match=r"a\.txt names a class outside 0 to 2"):
        shards.verify(Record("a", "a.png", "a.txt", partial(wrong_segments, (0, 1, 3))), 3)


def two_cars(crowd: tuple[bool, ...] = ()) -> Labelled:
    """A car in the first column, one of two pixels at the end of the last row, a third without pixels, and road."""
    ids = np.full((4, 6), 3)
    ids[:, 0] = 0
    ids[3, 4:] = 1
    return Labelled(encoded(image(4, 6)), ids, (2, 2, 2, 1), crowd)


def test_segments_get_boxes_and_those_of_things_are_counted() -> None:
    record = Record("a", "a.png", "a.txt", two_cars)
    stored = shards.verify(record, 3, frozenset({2}))
    # x1, y1, x2, y2 behind the last pixel
    assert stored.row["segment_boxes"] == [0, 0, 1, 4, 4, 3, 6, 4, 0, 0, 0, 0, 1, 0, 6, 4]
    assert (stored.row["segment_crowd"], stored.row["things"]) == (None, 3)
    assert stored.instances.tolist() == [0, 0, 3]
    assert stored.labels == ("instances", "panoptic", "semantic")
    stored = shards.verify(record, 3)
    assert (stored.row["things"], stored.labels) == (0, ("panoptic", "semantic"))


def test_crowds_are_flagged_and_not_counted_as_instances_but_their_pixels_are() -> None:
    record = Record("a", "a.png", "a.txt", partial(two_cars, (True, False, False, False)))
    stored = shards.verify(record, 3, frozenset({2}))
    assert stored.row["segment_crowd"] == [True, False, False, False]
    assert (stored.row["things"], stored.instances.tolist()) == (3, [0, 0, 2])
    assert stored.pixels.tolist() == [0, 18, 6, 0]
    with pytest.raises(ValueError, match=r"a\.txt has 2 crowd flags for 4 segments"):
        shards.verify(Record("a", "a.png", "a.txt", partial(two_cars, (True, False))), 3)


HALF = Instance(1, (2, 0, 4, 4), 8.0, False, b"88")
"""The right half of 4 x 4 pixels: by columns, a run of 8 outside and one of 8 inside the mask."""


def objects(*instances: Instance) -> Record:
    return Record("a", "a.png", "a.json", partial(_objects, instances))


def _objects(instances: tuple[Instance, ...] | None) -> Labelled:
    return Labelled(encoded(image(4, 4)), None, None, instances=instances)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_id": 0}, "instance 1 has class 0, which is not a thing class"),
        ({"class_id": 3}, "instance 1 has class 3, which is not a thing class"),
        ({"box": (2, 0, 1, 4)}, r"instance 1 has the box \(2, 0, 1, 4\)"),
        ({"box": (0, 0, float("nan"), 4)}, "instance 1 has the box .*nan"),
        ({"area": float("inf")}, "instance 1 .* area inf"),
        ({"area": -1.0}, "instance 1 .* area -1"),
        ({"counts": b"8"}, r"instance 1: its run lengths do not cover 4 x 4 \(height x width\)"),
        ({"counts": b"89"}, "instance 1: its run lengths do not cover"),
        ({"counts": b""}, "instance 1: its compressed run lengths are not as pycocotools"),
    ],
)
def test_a_wrong_instance_is_named(changes: dict[str, Any], message: str) -> None:
    shards.verify(objects(HALF, HALF), 3, frozenset({1, 2}))
    with pytest.raises(ValueError, match=r"^a\.json: " + message):
        shards.verify(objects(HALF, HALF._replace(**changes)), 3, frozenset({1, 2}))


def test_a_record_without_any_labels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a\.json has neither segments nor instances"):
        shards.verify(Record("a", "a.png", "a.json", partial(_objects, None)), 3)
    stored = shards.verify(objects(), 3, frozenset({1}))
    assert (stored.row["instances"], stored.row["things"], stored.labels) == ([], 0, ("instances",))


def test_the_record_digest_covers_every_field() -> None:
    def digest(record: Record) -> str:
        return shards.verify(record, 3, frozenset({1, 2})).row["digest"]

    changes = [{"class_id": 2}, {"box": (2, 0, 4, 3)}, {"area": 7.0}, {"crowd": True}, {"counts": b"0`0"}]
    digests = {digest(objects(HALF)), digest(objects()), digest(objects(HALF, HALF))}
    digests |= {digest(objects(HALF._replace(**change))) for change in changes}
    for flags in ((), (True, False, False, False)):
        digests.add(digest(Record("a", "a.png", "a.txt", partial(two_cars, flags))))
    assert len(digests) == 3 + len(changes) + 2


def test_generated_scenes_have_panoptic_labels(storage: Path) -> None:
    names = ("sky", "hill", "road", "pavement", "building", "tree", "car", "person", "sign")
    generate = {"train": 3, "val": 2, "height": 64, "width": 96, "seed": 1}
    shapes = config(layout="shapes", class_names=names, thing_classes=names[6:], generate=generate)
    manifest = shards.build("shapes", shapes, [], facts=[])
    assert manifest["labels"] == ["instances", "panoptic", "semantic"]
    read = rows(storage, manifest, "train")
    kinds = np.array([kind for row in read for kind in row["segment_classes"] if kind >= 6])
    assert manifest["instances"]["train"] == np.bincount(kinds, minlength=9).tolist()
    assert sum(row["things"] for row in read) == len(kinds) > 0


def test_the_real_samples_become_shards(storage: Path) -> None:
    classes = tuple(f"class {index}" for index in range(150))
    ade20k = config(class_names=classes, label_offset=-1, ignore_label=255)
    archive = shared("data/ADEChallengeData2016-sample.zip")
    manifest = shards.build("ade20k", ade20k, [archive], facts=[])
    assert manifest["splits"]["val"]["records"] == 3
    assert manifest["pixels"]["train"] == manifest["pixels"]["val"]
    cityscapes = config(layout="cityscapes", class_names=classes[:19], splits={"train": "train", "val": "val"})
    archives = [shared(f"data/{name}_trainvaltest-sample.zip") for name in ("leftImg8bit", "gtFine")]
    manifest = shards.build("cityscapes", cityscapes, archives, facts=[])
    assert manifest["picture_sizes"]["train"] == {"height": [360, 360], "width": [480, 480]}
