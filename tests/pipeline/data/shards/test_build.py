from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import zipfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.data.images.codecs import decode_image, decode_segments
from pipeline.data.images.draw import class_colours
from pipeline.data.loader.train_batches import TrainingOrder, training_batches
from pipeline.data.loader.val_pictures import validation_pictures
from pipeline.data.records import Instance, Labelled, Record
from pipeline.data.shards import build as shards
from pipeline.data.shards import writer
from pipeline.data.shards.manifest import MadeShards, class_table, counted, manifest_digest
from pipeline.data.shards.sample_sheet import sample_places
from pipeline.params.load import load_params
from pipeline.params.schema import AugmentationConfig, TestConfig
from pipeline.storage.files import sha256
from pipeline.storage.results import FetchedSource, Manifest, PictureSizes, Samples, Source
from tests.helpers.coco_files import CONFIG as COCO
from tests.helpers.coco_files import write_coco
from tests.helpers.manifests import made_up_manifest
from tests.helpers.pictures import config, encoded, image, labels, put, write_folder
from tests.helpers.shard_folders import build, facts_of, rows
from tests.helpers.shared import PROJECT, shared


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
    assert manifest.pixels == {"train": (3 * 82, 3 * 82, 3 * 16), "val": (2 * 82, 2 * 82, 2 * 16)}
    assert manifest.ignored_pixels == {"train": 36, "val": 24}
    assert manifest.pictures == {"train": (3, 3, 3), "val": (2, 2, 2)}
    assert manifest.picture_sizes["val"] == PictureSizes(height=(12, 12, 12), width=(16, 16, 16))
    assert manifest.things_per_picture == {"train": {0: 3}, "val": {0: 2}}
    assert (manifest.pixel_layout, manifest.skipped) == ("encoded", {"train": (), "val": ()})
    assert manifest.bytes["train"] == sum(shard.bytes for shard in manifest.splits["train"].shards)
    assert manifest.class_names == ("sky", "road", "car")
    assert (manifest.thing_classes, manifest.ignore_label) == (("car",), 255)
    assert manifest.labels == ("semantic",)  # ids are classes: cars that touch are one region, and nobody counts it
    assert manifest.instances == {"train": (0, 0, 0), "val": (0, 0, 0)}
    (source,) = facts_of(tmp_path / "d")
    assert manifest.sources == (Source(name=source.name, bytes=source.bytes, sha256=source.sha256),)
    for split, count in (("train", 3), ("val", 2)):
        assert manifest.splits[split].records == count
        for shard in manifest.splits[split].shards:
            path = storage / shard.path
            assert (path.stat().st_size, sha256(path)) == (shard.bytes, shard.sha256)
    assert manifest.digest == manifest_digest(manifest)
    assert manifest.digest != manifest_digest(dataclasses.replace(manifest, class_names=("a", "b", "c")))
    # neither how samples are painted nor how the terms are worded changes what is trained on
    others = Samples(path="elsewhere.png", bytes=1, sha256="5a")
    assert manifest.digest == manifest_digest(dataclasses.replace(manifest, samples=others, terms="others"))


def test_a_manifests_digest_is_what_it_has_always_been() -> None:
    # worked out by the code that wrote manifests before they had types: json.dumps(..., sort_keys=True) of the same
    # values without digest, samples and terms
    manifest = made_up_manifest(things_per_picture={"train": {2: 1, 10: 4}, "val": {0: 1}})
    assert manifest_digest(manifest) == "a665f0c496f40b9acac33532bba4cf6ad817b497ac4a26d0430c8019418a3226"


def test_a_new_field_changes_a_manifests_digest_only_where_it_is_used() -> None:
    manifest = made_up_manifest()
    newer = dataclasses.make_dataclass("Newer", [("depth", tuple[int, ...], ())], bases=(Manifest,), frozen=True)
    fields = {entry.name: getattr(manifest, entry.name) for entry in dataclasses.fields(manifest)}
    assert manifest_digest(newer(**fields)) == manifest_digest(manifest)
    assert manifest_digest(newer(**fields, depth=(3,))) != manifest_digest(manifest)


def test_the_class_table_has_a_line_for_every_class_and_split(tmp_path: Path, storage: Path) -> None:
    table = class_table(build(write_folder(tmp_path / "d"), class_names=("sky", "road, wet", "car")))
    assert table.splitlines() == [
        "class,split,pixels,pictures,instances",
        "sky,train,246,3,0",
        '"road, wet",train,246,3,0',
        "car,train,48,3,0",
        "sky,val,164,2,0",
        '"road, wet",val,164,2,0',
        "car,val,32,2,0",
    ]


def test_sizes_and_things_of_several_shards_are_one_histogram() -> None:
    facts = writer.ShardFacts(
        records=3,
        bytes=10,
        sha256="5a",
        pixels=(1, 2, 3),
        pictures=(1, 0),
        instances=(4, 0),
        things_per_picture={0: 1, 10: 2},
        sizes=((5, 9, 3),),
        labels=None,
        skipped=(),
    )
    other = dataclasses.replace(facts, things_per_picture={2: 1, 10: 1}, sizes=((4, 7, 1), (6, 9, 1)))
    counts = counted([facts, other])
    # heights 4 5 5 5 6, widths 7 9 9 9 9
    assert counts.picture_sizes == PictureSizes(height=(4, 5, 6), width=(7, 9, 9))
    assert list(counts.things_per_picture.items()) == [(0, 1), (2, 1), (10, 3)]
    assert (counts.pixels, counts.ignored_pixels) == ((2, 4), 6)
    assert (counts.instances, counts.bytes) == ((8, 0), 20)


def test_samples_are_spread_over_the_shards() -> None:
    # 8 of 15 records: 0, 2, 4, ... 14, in shards that begin at 0, 5 and 10
    assert sample_places([5, 5, 5]) == [(0, 0), (0, 2), (0, 4), (1, 1), (1, 3), (2, 0), (2, 2), (2, 4)]
    assert sample_places([1, 0, 1]) == [(0, 0), (2, 0)]


@pytest.mark.parametrize("pixels", ["encoded", "raw"])
def test_the_sample_sheet_paints_labels_in_their_colours(tmp_path: Path, storage: Path, pixels: str) -> None:
    folder = write_folder(tmp_path / "d", train=1)
    put(folder / "images/training/p0.jpg", encoded(np.full((12, 16, 3), 100, np.uint8), ".jpg"))
    manifest = build(folder, pixels=pixels)
    path = storage / manifest.samples.path
    assert (path.stat().st_size, sha256(path)) == (manifest.samples.bytes, manifest.samples.sha256)
    sheet = decode_image(path.read_bytes(), "")
    # one tile at (32, 8), 30 times as large: row 1, column 3 is sky, its colour and grey 100 in equal parts; column 0
    # is ignored and stays as it is
    sky = class_colours(3)[0].astype(int)
    assert np.abs(sheet[32 + 45, 8 + 105] - (sky + 100) // 2).max() <= 1
    assert np.abs(sheet[32 + 45, 8 + 10].astype(int) - 100).max() <= 2


def test_a_shard_counts_as_finished_with_the_facts_that_were_written_only(tmp_path: Path) -> None:
    records = [Record(f"p{index}", "a.jpg", "a.png", lambda: Labelled(JPEG, labels() % 3, None)) for index in range(2)]
    facts = writer.make_shard(writer.ShardJob("a-0", "a", records, 3, frozenset(), "encoded", "stop", ()), tmp_path)
    assert facts.labels == writer.PictureLabels(kinds=("semantic",), file="a.jpg")
    assert writer.finished_shard(tmp_path, "a-0") == facts
    beside = tmp_path / "a-0.json"
    written = json.loads(beside.read_text())
    missing = {key: value for key, value in written.items() if key != "sizes"}
    for wrong in (missing, {**written, "pixel": []}, {**written, "bytes": "10"}, {**written, "bytes": 10}, [], "torn"):
        beside.write_text("{" if wrong == "torn" else json.dumps(wrong))
        assert writer.finished_shard(tmp_path, "a-0") is None
    assert writer.finished_shard(tmp_path, "a-1") is None


def test_the_same_input_gives_the_same_bytes_and_mends_altered_shards(tmp_path: Path, storage: Path) -> None:
    folder = write_folder(tmp_path / "d")
    first = build(folder)
    path = storage / first.splits["train"].shards[0].path
    path.write_bytes(b"altered")
    assert build(folder) == first
    assert sha256(path) == first.splits["train"].shards[0].sha256
    assert leftovers(storage) == [path.parent.name]
    put(folder / "annotations/training/p0.png", encoded(np.zeros((12, 16), np.uint8)))
    assert build(folder).digest != first.digest


@pytest.mark.ray
def test_processes_change_nothing(tmp_path: Path, storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    folder = write_folder(tmp_path / "d", train=20)
    few_in_a_shard(monkeypatch)
    alone = build(folder, shard_mib=3)
    assert len(alone.splits["train"].shards) == 7
    files = {path.name: path.read_bytes() for path in (storage / "shards").glob("*/*")}
    monkeypatch.setattr(shards, "FEW_RECORDS", 1)
    made: list[str] = []
    monkeypatch.setattr(shards, "_make_here", lambda *_: pytest.fail("made without Ray"))
    monkeypatch.setattr(MadeShards, "add", lambda self, job, facts: made.append(job.name) or add(self, job, facts))
    try:
        for processes in (1, 3):
            monkeypatch.setenv("M2F_STORAGE", str(tmp_path / f"with {processes}"))
            made.clear()
            assert build(folder, processes=processes, shard_mib=3) == alone
            assert len(made) == 8
            assert {path.name: path.read_bytes() for path in (tmp_path / f"with {processes}").glob("*/*/*")} == files

        # the first wrong record by their order, which is that of their names, and what was finished is kept
        put(folder / "annotations/training/p3.png", encoded(labels(5, 5)))
        put(folder / "annotations/training/p12.png", encoded(labels(5, 4)))
        with pytest.raises(ValueError, match=r"^d: annotations/training/p12\.png is 5 x 4") as caught:
            build(folder, processes=3, shard_mib=3)
        assert "Traceback" not in str(caught.value)
        (unfinished,) = (tmp_path / "with 3").glob("shards/.building-*")
        assert (unfinished / "train-00000.json").exists()
        assert list(unfinished.glob(".*.part")) == []

        # records of COCO carry their annotations with them
        monkeypatch.setenv("M2F_STORAGE", str(tmp_path / "coco storage"))
        coco = write_coco(tmp_path / "coco")
        with_ray = shards.build("coco", COCO, [coco], facts=[], processes=2)
        monkeypatch.setattr(shards, "_make_here", make_here)
        monkeypatch.setenv("M2F_STORAGE", str(storage))
        assert shards.build("coco", COCO, [coco], facts=[], processes=0) == with_ray
    finally:
        ray.shutdown()


add, make_here = MadeShards.add, shards._make_here


@pytest.mark.ray
def test_a_shard_whose_process_is_killed_is_begun_again(tmp_path: Path, storage: Path) -> None:
    import ray

    flag, data, ids = tmp_path / "killed", encoded(image()), np.zeros((12, 16), np.uint8)

    def read(deadly: bool) -> Labelled:  # in here, so that it is sent as it is: a process of Ray's knows no tests
        import os

        if deadly and not (flag.exists() and flag.stat().st_size >= 2):
            with open(flag, "a") as file:
                file.write("x")
            os.kill(os.getpid(), 9)
        return Labelled(data, ids, None)

    def job(number: int) -> writer.ShardJob:
        records = [Record(f"{number}{index}", "a.png", "b.png", partial(read, number == 1)) for index in range(3)]
        return writer.ShardJob(f"train-{number:05d}", "train", records, 3, frozenset(), "encoded", "stop", ())

    made = MadeShards("mine", {"train": 9})
    folder = storage / "shards/.building-x"
    folder.mkdir(parents=True)
    try:
        shards._make_with_ray(shards._Work([job(number) for number in range(3)], {"train": 1000.0}, folder, made), 2)
        assert flag.read_text() == "xx"
        assert [made.facts[f"train-{number:05d}"].records for number in range(3)] == [3, 3, 3]
        assert writer.finished_shard(folder, "train-00001") == made.facts["train-00001"]
    finally:
        ray.shutdown()


def few_in_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    """shard_mib counts records."""
    record = Record("p0", "p0.jpg", "p0.png", lambda: Labelled(JPEG, labels() % 3, None))
    monkeypatch.setattr(shards, "_MIB", writer.expected_bytes(record, "encoded"))


JPEG = encoded(image(), ".jpg")


def test_shards_are_runs_of_equal_length_and_keep_the_order(
    tmp_path: Path, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_in_a_shard(monkeypatch)
    manifest = build(write_folder(tmp_path / "d", train=7), shard_mib=3)
    assert [shard.records for shard in manifest.splits["train"].shards] == [3, 2, 2]
    assert [row["name"] for row in rows(storage, manifest, "train")] == [f"p{index}" for index in range(7)]


# Going on


def test_an_interrupted_build_goes_on_with_what_is_whole(
    tmp_path: Path, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_in_a_shard(monkeypatch)
    folder = write_folder(tmp_path / "d", train=8)
    whole = build(folder, shard_mib=2)  # train 0 to 3, val 0
    monkeypatch.setenv("M2F_STORAGE", str(tmp_path / "other"))
    made: list[str] = []

    def make(job: writer.ShardJob, *arguments: Any) -> writer.ShardFacts:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(job.name)
        return writer.make_shard(job, *arguments)

    monkeypatch.setattr(shards, "make_shard", make)
    with pytest.raises(KeyboardInterrupt):
        build(folder, shard_mib=2)
    (unfinished,) = (tmp_path / "other/shards").iterdir()
    assert unfinished.name.startswith(".building-")
    (unfinished / "train-00001.arrow").write_bytes(b"altered")
    (unfinished / "train-00002.json").write_text("{")
    put(unfinished / ".train-00003.arrow.abc.part", b"half")
    made.clear()
    with pytest.raises(KeyboardInterrupt):
        build(folder, shard_mib=2)
    assert made == ["train-00001", "train-00002", "train-00003"]
    made.clear()
    assert build(folder, shard_mib=2) == whole
    assert made == ["val-00000"]
    names = {path.name for path in (tmp_path / "other").glob("shards/*/*")}
    assert names == {path.name for path in storage.glob("shards/*/*")}
    assert not any(name.startswith(".") for name in names)

    # a finished build is taken up too, and settings that decide nothing do not count
    made.clear()
    assert build(folder, shard_mib=2, terms="others").digest == whole.digest
    assert made == []
    assert len(list((tmp_path / "other/shards").iterdir())) == 1
    changes: list[dict[str, Any]] = [{"pixels": "raw"}, {"label_offset": 3}, {"thing_classes": ("car",)}]
    for change in changes:
        made.clear()
        with suppress(KeyboardInterrupt, ValueError):
            build(folder, shard_mib=2, **change)
        assert change.keys() == {"label_offset"} or len(made) == 3


def test_a_build_that_others_are_at_says_so(tmp_path: Path, storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "d")

    def make(*arguments: Any) -> writer.ShardFacts:
        monkeypatch.setattr(shards, "make_shard", writer.make_shard)
        with pytest.raises(
            ValueError, match=r"another process is sharding mine in .*\.building-\w+; wait for it to end"
        ):
            build(folder)
        (building,) = (storage / "shards").iterdir()
        put(building / ".train-00000.arrow.abc.part", b"of a process that was lost")
        return writer.make_shard(*arguments)

    monkeypatch.setattr(shards, "make_shard", make)
    manifest = build(folder)
    assert list(storage.glob("shards/*/.*")) == []
    assert build(folder) == manifest
    assert len(leftovers(storage)) == 1


def test_too_little_room_is_one_sentence(tmp_path: Path, storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(ValueError, match=r"sharding .* takes .* more, but only 0\.0 MiB are free under .*; make room"):
        build(write_folder(tmp_path / "d"))
    assert leftovers(storage) == []


def test_a_host_that_does_not_see_the_sources_skips_nothing(tmp_path: Path, storage: Path) -> None:
    job = writer.ShardJob("a-0", "a", [], 3, frozenset(), "encoded", "skip", (tmp_path / "gone.zip",))
    with pytest.raises(OSError, match=r"host \S+ does not see .*gone\.zip; on a cluster the storage root and"):
        writer.make_shard(job, storage)


# Wrong records


def test_wrong_records_are_skipped_and_listed_up_to_a_twentieth(
    tmp_path: Path, storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "d", train=40)
    put(folder / "annotations/training/p3.png", encoded(labels(5, 5)))
    put(folder / "images/training/p7.jpg", b"<html>")
    manifest = build(folder, on_error="skip")
    assert manifest.splits["train"].records == 38
    # by name: p3 comes after p29, p7 after p39
    assert [record.file for record in manifest.skipped["train"]] == [
        "d: images/training/p3.jpg",
        "d: images/training/p7.jpg",
    ]
    assert "p3.png is 5 x 5 (height x width), but its picture" in manifest.skipped["train"][0].reason
    assert "p7.jpg does not decode" in manifest.skipped["train"][1].reason
    assert "mine: skipped d: images/training/p7.jpg: d: images/training/p7.jpg does not" in capsys.readouterr().err
    assert "p3" not in {row["name"] for row in rows(storage, manifest, "train")}
    # what was left out is not taken over by a build that leaves nothing out
    with pytest.raises(ValueError, match=r"annotations/training/p3\.png is 5 x 5"):
        build(folder)
    put(folder / "images/training/p9.jpg", b"<html>")
    with pytest.raises(
        ValueError, match=r"^3 of the 40 records of split train are wrong, .* at most 5%: d: anno.*p3\.png"
    ):
        build(folder, on_error="skip")


def test_what_stopped_a_build_can_be_skipped_by_the_next(
    tmp_path: Path, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_in_a_shard(monkeypatch)
    folder = write_folder(tmp_path / "d", train=40)
    put(folder / "images/training/p7.jpg", b"<html>")  # the 38th by name
    with pytest.raises(ValueError, match=r"p7\.jpg does not decode"):
        build(folder, shard_mib=10)
    made: list[str] = []
    monkeypatch.setattr(shards, "make_shard", lambda job, *_: made.append(job.name) or writer.make_shard(job, *_))
    manifest = build(folder, shard_mib=10, on_error="skip")
    assert made == ["train-00003", "val-00000"]
    assert [shard.records for shard in manifest.splits["train"].shards] == [10, 10, 10, 9]


# Decoded pictures


def test_raw_shards_hold_rows_of_pixels_and_ids(tmp_path: Path, storage: Path) -> None:
    folder = write_folder(tmp_path / "d")
    plain, raw = build(folder), build(folder, pixels="raw")
    assert raw.pixel_layout == "raw"
    same = ("pixels", "ignored_pixels", "pictures", "instances", "picture_sizes", "labels")
    assert {key: getattr(raw, key) for key in same} == {key: getattr(plain, key) for key in same}
    for before, row in zip(rows(storage, plain, "train"), rows(storage, raw, "train"), strict=True):
        pixels = np.frombuffer(row["image"], np.uint8).reshape(12, 16, 3)
        np.testing.assert_array_equal(pixels, decode_image(before["image"], ""))
        ids = np.frombuffer(row["segments"], np.uint8).reshape(12, 16)
        np.testing.assert_array_equal(ids, np.where(labels() == 9, 255, labels()))
        unchanged = row.keys() - {"image", "segments", "digest"}
        assert {key: row[key] for key in unchanged} == {key: before[key] for key in unchanged}
        assert row["digest"] != before["digest"]


@pytest.mark.parametrize("pixels", ["encoded", "raw"])
def test_the_bytes_that_are_expected_of_a_record_are_about_those_it_takes(tmp_path: Path, pixels: Any) -> None:
    for index, read in enumerate((many_segments, two_cars, partial(_objects, (HALF,) * 40))):
        record = Record("a", "a.png", "a.txt", read)
        job = writer.ShardJob(f"a-{index}", "a", [record] * 30, 3, frozenset({1, 2}), pixels, "stop", ())
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


@pytest.mark.parametrize("pixels", ["encoded", "raw"])
def test_a_jpeg_that_lacks_its_last_bytes_is_noticed(tmp_path: Path, storage: Path, pixels: str) -> None:
    folder = write_folder(tmp_path / "d")
    data = encoded(image(64, 64), ".jpg")
    put(folder / "annotations/training/p0.png", encoded(labels(64, 64)))
    put(folder / "images/training/p0.jpg", data[:-20])
    with pytest.raises(ValueError, match=r"p0\.jpg does not decode"):
        build(folder, pixels=pixels)


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
    assert manifest.pictures["train"] == (0, 0, 0)
    assert manifest.ignored_pixels["train"] == 192


def many_segments() -> Labelled:
    ids = np.arange(400, dtype=np.int32).reshape(20, 20) % 300
    ids[0, 0] = 65535
    return Labelled(encoded(image(20, 20)), ids, tuple(range(3)) * 100)


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


def test_generated_scenes_have_panoptic_labels(storage: Path) -> None:
    names = ("sky", "hill", "road", "pavement", "building", "tree", "car", "person", "sign")
    generate = {"train": 3, "val": 2, "height": 64, "width": 96, "seed": 1}
    shapes = config(layout="shapes", class_names=names, thing_classes=names[6:], generate=generate)
    manifest = shards.build("shapes", shapes, [], facts=[])
    assert manifest.labels == ("instances", "panoptic", "semantic")
    read = rows(storage, manifest, "train")
    kinds = np.array([kind for row in read for kind in row["segment_classes"] if kind >= 6])
    assert manifest.instances["train"] == tuple(np.bincount(kinds, minlength=9).tolist())
    assert sum(row["things"] for row in read) == len(kinds) > 0


SAMPLES = {
    "ade20k": ["ADEChallengeData2016-sample.zip"],
    "cityscapes": ["leftImg8bit_trainvaltest-sample.zip", "gtFine_trainvaltest-sample.zip"],
    "coco": ["coco-panoptic-sample.zip"],
}


def sample(name: str, storage: Path) -> tuple[list[Path], Manifest]:
    """Archives and manifest of a published data set's sample, sharded by its entry in params.yaml, but encoded."""
    archives = [shared(f"data/{archive}") for archive in SAMPLES[name]]
    entry = dataclasses.replace(load_params(PROJECT / "params.yaml").dataset(name), pixels="encoded")
    if name == "coco":
        entry = dataclasses.replace(entry, splits={"val": "val2017"})
    facts = [
        FetchedSource(name=path.name, path=str(path), bytes=path.stat().st_size, sha256=sha256(path))
        for path in archives
    ]
    return archives, shards.build(name, entry, archives, facts=facts)


def published_label(archive: Path, name: str) -> np.ndarray:
    with zipfile.ZipFile(archive) as file:
        (found,) = [entry for entry in file.namelist() if entry.endswith(name)]
        return decode_segments(file.read(found), name)


def test_ade20k_and_cityscapes_samples_reach_the_loader_with_their_labels(storage: Path) -> None:
    from pipeline.data.datasets.cityscapes import TRAIN_IDS

    test = TestConfig(short_side=128, long_side_max=256)
    (archive,), manifest = sample("ade20k", storage)
    pictures = list(validation_pictures(manifest, test))
    assert len(pictures) == 3
    for picture in pictures:
        stored = published_label(archive, f"annotations/validation/{picture.name}.png")
        np.testing.assert_array_equal(picture.label_map.numpy(), stored - np.uint8(1))  # 0 becomes 255
    (_, archive), manifest = sample("cityscapes", storage)
    pictures = list(validation_pictures(manifest, test))
    assert len(pictures) == 6
    for picture in pictures:
        stored = published_label(archive, f"val/{picture.name}_gtFine_labelIds.png")
        expected = np.full(256, 255)
        expected[list(TRAIN_IDS)] = range(19)
        np.testing.assert_array_equal(picture.label_map.numpy(), expected[stored])
    batch = next(
        training_batches(
            TrainingOrder(
                manifest=manifest,
                augmentation=AugmentationConfig(crop=(64, 128), short_sides=(96,), long_side_max=512),
                seed=0,
                global_batch=2,
            ),
            first_step=0,
            steps=1,
            picture_range=range(2),
        )
    )
    assert batch.images.shape == (2, 3, 64, 128)
    assert all(len(kinds) for kinds in batch.labels)


def test_the_coco_sample_reaches_the_loader_with_its_segments(storage: Path) -> None:
    _, manifest = sample("coco", storage)
    pictures = list(validation_pictures(manifest, TestConfig(short_side=128, long_side_max=256), task="panoptic"))
    assert manifest.things_per_picture["val"] == {14: 1, 26: 1}
    things = [sum(int(kind) < 80 for kind in picture.labels) for picture in pictures]
    crowds = [int(picture.crowd.sum()) for picture in pictures]
    assert [thing - crowd for thing, crowd in zip(things, crowds, strict=True)] == [14, 26]
    assert (storage / manifest.samples.path).exists()


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


def picture_and_ids(height: int, width: int) -> tuple[bytes, np.ndarray]:
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
        data, ids = picture_and_ids(height, width)
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

    def bytes_per_pixel(pixels: str, pictures: int) -> float:
        command = [sys.executable, "-c", MEMORY, str(tmp_path), pixels, str(pictures)]
        ended = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(ended.stdout) / (2000 * 3000)

    cases = [(pixels, pictures) for pixels in ("raw", "encoded") for pictures in (1, 4)]
    found = {case: bytes_per_pixel(*case) for case in cases}
    assert max(found.values()) < 40, found
    assert found["raw", 4] < found["raw", 1] + 6, f"not one picture at a time: {found}"
