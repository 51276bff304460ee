from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.images.codecs import decode_segments
from pipeline.data.records import Instance, Labelled, Record
from pipeline.data.shards import writer
from tests.helpers.images import JPEG, encoded, image, labels, put


def test_a_shard_counts_as_finished_with_the_facts_that_were_written_only(tmp_path: Path) -> None:
    records = [Record(f"p{index}", "a.jpg", "a.png", lambda: Labelled(JPEG, labels() % 3, None)) for index in range(2)]
    facts = writer.make_shard(writer.ShardJob("a-0", "a", records, 3, frozenset(), "encoded", "stop", ()), tmp_path)
    assert facts.labels == writer.ImageLabels(label_types=("semantic",), file="a.jpg")
    assert writer.finished_shard(tmp_path, "a-0") == facts
    beside = tmp_path / "a-0.json"
    written = json.loads(beside.read_text())
    missing = {key: value for key, value in written.items() if key != "sizes"}
    for wrong in (missing, {**written, "pixel": []}, {**written, "bytes": "10"}, {**written, "bytes": 10}, [], "torn"):
        beside.write_text("{" if wrong == "torn" else json.dumps(wrong))
        assert writer.finished_shard(tmp_path, "a-0") is None
    assert writer.finished_shard(tmp_path, "a-1") is None


def test_a_host_that_does_not_see_the_sources_skips_nothing(tmp_path: Path, storage: Path) -> None:
    job = writer.ShardJob("a-0", "a", [], 3, frozenset(), "encoded", "skip", (tmp_path / "gone.zip",))
    with pytest.raises(OSError, match=r"host \S+ does not see .*gone\.zip; on a cluster the storage root and"):
        writer.make_shard(job, storage)


@pytest.mark.parametrize("pixels", ["encoded", "raw"])
def test_the_bytes_that_are_expected_of_a_record_are_about_those_it_takes(tmp_path: Path, pixels: Any) -> None:
    for index, read in enumerate((many_segments, two_cars, partial(_objects, (HALF,) * 40), many_classes)):
        record = Record("a", "a.png", "a.txt", read)
        job = writer.ShardJob(f"a-{index}", "a", [record] * 30, 300, frozenset({1, 2}), pixels, "stop", ())
        taken = writer.make_shard(job, tmp_path).bytes / 30
        assert 0.6 * taken < writer.expected_bytes(record, pixels) < 1.4 * taken


def test_raw_ids_of_more_than_255_segments_are_wide() -> None:
    stored = writer.verify(Record("a", "a.png", "a.txt", many_segments), 3, pixels="raw")
    ids = np.frombuffer(stored.row["segments"], "<u2").reshape(20, 20)
    np.testing.assert_array_equal(ids, many_segments().segments)


def test_raw_pictures_are_turned_as_their_camera_says(tmp_path: Path) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned right
    Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg", exif=exif)
    data = (tmp_path / "a.jpg").read_bytes()
    record = Record("a", "a.jpg", "a.png", lambda: Labelled(data, np.zeros((6, 4), np.uint8), None))
    stored = writer.verify(record, 3, pixels="raw")
    assert (stored.row["height"], stored.row["width"], len(stored.row["image"])) == (6, 4, 72)


def many_segments() -> Labelled:
    ids = np.arange(400, dtype=np.int32).reshape(20, 20) % 300
    ids[0, 0] = 65535
    return Labelled(encoded(image(20, 20)), ids, tuple(range(3)) * 100)


def many_classes() -> Labelled:
    """Class ids 0 to 299, and nothing in the first pixel."""
    return many_segments()._replace(segment_classes=None)


@pytest.mark.parametrize("pixels", ["encoded", "raw"])
def test_class_ids_of_more_than_255_classes_are_stored_wide(pixels: Any) -> None:
    stored = writer.verify(Record("a", "a.png", "a.txt", many_classes), 300, pixels=pixels)
    data = stored.row["segments"]
    ids = np.frombuffer(data, "<u2").reshape(20, 20) if pixels == "raw" else decode_segments(data, "")
    np.testing.assert_array_equal(ids, many_classes().segments)
    assert (stored.pixels[0], stored.pixels[255], stored.pixels[300]) == (1, 1, 1)  # 0: also at 300, 255: once


def test_more_than_255_segments_are_stored_wide() -> None:
    stored = writer.verify(Record("a", "a.png", "a.txt", many_segments), 3)
    ids = decode_segments(stored.row["segments"], "")
    assert ids.dtype == np.uint16
    assert ids[0, 0] == 65535
    assert ids[ids != 65535].max() == 299
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
        writer.verify(Record("a", "a.png", "a.txt", partial(wrong_segments, (0, 1))), 3)
    with pytest.raises(ValueError, match=r"a\.txt names a class outside 0 to 2"):
        writer.verify(Record("a", "a.png", "a.txt", partial(wrong_segments, (0, 1, 3))), 3)


def two_cars(crowd: tuple[bool, ...] = ()) -> Labelled:
    """A car in the first column, one of two pixels at the end of the last row, a third without pixels, and road."""
    ids = np.full((4, 6), 3)
    ids[:, 0] = 0
    ids[3, 4:] = 1
    return Labelled(encoded(image(4, 6)), ids, (2, 2, 2, 1), crowd)


def test_segments_get_boxes_and_those_of_things_are_counted() -> None:
    record = Record("a", "a.png", "a.txt", two_cars)
    stored = writer.verify(record, 3, frozenset({2}))
    # x1, y1, x2, y2 behind the last pixel
    assert stored.row["segment_boxes"] == [0, 0, 1, 4, 4, 3, 6, 4, 0, 0, 0, 0, 1, 0, 6, 4]
    assert (stored.row["segment_crowd"], stored.row["things"]) == (None, 3)
    assert stored.instances.tolist() == [0, 0, 3]
    assert stored.labels == ("instances", "panoptic", "semantic")
    stored = writer.verify(record, 3)
    assert (stored.row["things"], stored.labels) == (0, ("panoptic", "semantic"))


def test_crowds_are_flagged_and_not_counted_as_instances_but_their_pixels_are() -> None:
    record = Record("a", "a.png", "a.txt", partial(two_cars, (True, False, False, False)))
    stored = writer.verify(record, 3, frozenset({2}))
    assert stored.row["segment_crowd"] == [True, False, False, False]
    assert (stored.row["things"], stored.instances.tolist()) == (3, [0, 0, 2])
    assert stored.pixels.tolist() == [0, 18, 6, 0]
    with pytest.raises(ValueError, match=r"a\.txt has 2 crowd flags for 4 segments"):
        writer.verify(Record("a", "a.png", "a.txt", partial(two_cars, (True, False))), 3)


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
    writer.verify(objects(HALF, HALF), 3, frozenset({1, 2}))
    with pytest.raises(ValueError, match=r"^a\.json: " + message):
        writer.verify(objects(HALF, HALF._replace(**changes)), 3, frozenset({1, 2}))


def test_a_record_without_any_labels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a\.json has neither segments nor instances"):
        writer.verify(Record("a", "a.png", "a.json", partial(_objects, None)), 3)
    stored = writer.verify(objects(), 3, frozenset({1}))
    assert (stored.row["instances"], stored.row["things"], stored.labels) == ([], 0, ("instances",))


def test_the_record_digest_covers_every_field() -> None:
    def digest(record: Record) -> str:
        return writer.verify(record, 3, frozenset({1, 2})).row["digest"]

    changes = [{"class_id": 2}, {"box": (2, 0, 4, 3)}, {"area": 7.0}, {"crowd": True}, {"counts": b"0`0"}]
    digests = {digest(objects(HALF)), digest(objects()), digest(objects(HALF, HALF))}
    digests |= {digest(objects(HALF._replace(**change))) for change in changes}
    for flags in ((), (True, False, False, False)):
        digests.add(digest(Record("a", "a.png", "a.txt", partial(two_cars, flags))))
    assert len(digests) == 3 + len(changes) + 2


MEMORY = """
import json, sys
from pathlib import Path
from pipeline.params.schema import DatasetConfig
from pipeline.data.shards.writer import ShardJob, make_shard
from pipeline.data.shards.build import LAYOUTS

folder, pixels, pictures = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
config = DatasetConfig(**json.loads((folder / "config.json").read_text()))
records = LAYOUTS[config.layout].records(config, [folder], "val")
things = frozenset(config.class_names.index(name) for name in config.thing_classes)
out = folder / "out"
out.mkdir(exist_ok=True)

def make(some):
    make_shard(ShardJob("val-0", "val", some, len(config.class_names), things, pixels, "stop", (folder,)), out)

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

make(records[:1])  # the small picture: libraries are loaded now
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the most that was ever resident, begins anew
make(records[1:] * pictures)
print(status("VmHWM") - before)
"""


def image_and_ids(height: int, width: int) -> tuple[bytes, np.ndarray]:
    """A PNG that hardly compresses, and 12 x 25 segments."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    rows, columns = np.arange(height) * 12 // height, np.arange(width) * 25 // width
    return encoded(noise), rows[:, None] * 25 + columns


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux counts it")
@pytest.mark.parametrize("layout", ["folder", "coco"])
def test_a_shard_takes_less_than_40_bytes_for_a_pixel_of_its_largest_picture(tmp_path: Path, layout: str) -> None:
    listing: dict[str, list[Any]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 1, "name": "sky", "isthing": 0}, {"id": 2, "name": "car", "isthing": 1}],
    }
    for name, (height, width) in enumerate(((40, 60), (2000, 3000))):
        data, ids = image_and_ids(height, width)
        if layout == "folder":
            put(tmp_path / f"images/val/{name}.png", data)
            put(tmp_path / f"annotations/val/{name}.png", encoded((ids % 2).astype(np.uint8)))
            continue
        put(tmp_path / f"val2017/{name}.png", data)
        colours = np.stack([ids % 256, ids // 256, np.ones_like(ids)], -1).astype(np.uint8)
        put(tmp_path / f"annotations/panoptic_val2017/{name}.png", encoded(colours))
        listing["images"].append({"id": name, "file_name": f"{name}.png", "height": height, "width": width})
        segments = [{"id": 65536 + index, "category_id": 1 + index % 2, "iscrowd": 0} for index in range(300)]
        listing["annotations"].append({"image_id": name, "file_name": f"{name}.png", "segments_info": segments})
    settings: dict[str, Any] = {"layout": layout, "class_names": ["sky", "car"], "splits": {"val": "val"}}
    if layout == "coco":
        put(tmp_path / "annotations/panoptic_val2017.json", json.dumps(listing).encode())
        settings |= {"splits": {"val": "val2017"}, "thing_classes": ["car"]}
    put(tmp_path / "config.json", json.dumps(settings).encode())

    def bytes_per_pixel(pixels: str, images: int) -> float:
        command = [sys.executable, "-c", MEMORY, str(tmp_path), pixels, str(images)]
        ended = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(ended.stdout) / (2000 * 3000)

    cases = [(pixels, images) for pixels in ("raw", "encoded") for images in (1, 4)]
    found = {case: bytes_per_pixel(*case) for case in cases}
    assert max(found.values()) < 40, found
    assert found["raw", 4] < found["raw", 1] + 6, f"not one picture at a time: {found}"
