from __future__ import annotations

import dataclasses
import shutil
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data.images.codecs import decode_image, decode_segments
from pipeline.data.loader.train_batches import TrainingOrder, training_batches
from pipeline.data.loader.val_images import validation_images
from pipeline.data.records import Labelled, Record
from pipeline.data.shards import build as shards
from pipeline.data.shards import writer
from pipeline.data.shards.manifest import MadeShards
from pipeline.params.load import load_params
from pipeline.params.schema import AugmentationConfig, TestConfig
from pipeline.storage.files import sha256
from pipeline.storage.results.data import FetchedSource, Manifest
from tests.helpers.coco_files import CONFIG as COCO
from tests.helpers.coco_files import write_coco
from tests.helpers.images import JPEG, config, encoded, image, labels, put, write_folder
from tests.helpers.shard_folders import build, rows
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
@pytest.mark.long
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
    assert build(folder, shard_mib=2, terms="others", max_pixels=192).digest == whole.digest
    assert made == []
    assert len(list((tmp_path / "other/shards").iterdir())) == 1
    changes: list[dict[str, Any]] = [
        {"pixels": "raw"},
        {"label_offset": 3},
        {"thing_classes": ("car",)},
        {"exif": "ignore"},
        {"value_range": (0, 1)},
    ]
    for change in changes:
        made.clear()
        with suppress(KeyboardInterrupt, ValueError):
            build(folder, shard_mib=2, **change)
        assert change.keys() == {"label_offset"} or len(made) == 3


def test_a_build_that_others_are_at_is_waited_for_and_not_made_twice(
    tmp_path: Path, storage: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, made, printed = write_folder(tmp_path / "d"), list[str](), list[str]()
    with ThreadPoolExecutor(1) as others:

        def make(job: writer.ShardJob, *more: Any) -> writer.ShardFacts:
            made.append(job.name)
            if len(made) == 1:  # somebody begins the same while this one is at it
                late.append(others.submit(build, folder))
                while "this one waits" not in "".join(printed):
                    printed.append(capsys.readouterr().err)
                (building,) = (storage / "shards").iterdir()
                put(building / ".train-00000.arrow.abc.part", b"of a process that was lost")
            return writer.make_shard(job, *more)

        late = list[Future[Manifest]]()
        monkeypatch.setattr(shards, "make_shard", make)
        manifest = build(folder)
        assert late[0].result() == manifest
    assert len(made) == len(set(made)) and "mine: another process is sharding it" in "".join(printed)
    assert list(storage.glob("shards/*/.*")) == []
    assert len(leftovers(storage)) == 1


def test_too_little_room_is_one_sentence(tmp_path: Path, storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(ValueError, match=r"sharding .* takes .* more, but only 0\.0 MiB are free under .*; make room"):
        build(write_folder(tmp_path / "d"))
    assert leftovers(storage) == []


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
    assert "p3.png is 5 x 5 (height x width), but its image" in manifest.skipped["train"][0].reason
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


def test_labels_may_have_no_more_pixels_than_pictures(tmp_path: Path, storage: Path) -> None:
    with pytest.raises(ValueError, match=r"training/p0\.png is 12 x 16 .*, 192 pixels, and max_pixels is 191"):
        build(write_folder(tmp_path / "d"), max_pixels=191)


def test_what_stopped_a_build_can_be_skipped_by_the_next(
    tmp_path: Path, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_in_a_shard(monkeypatch)
    folder = write_folder(tmp_path / "d", train=40)
    too_large = Image.new("L", (30_000, 1))  # in a small file
    too_large.save(folder / "images/training/p7.jpg", "PNG")  # the 38th by name
    with pytest.raises(ValueError, match=r"p7\.jpg is 1 x 30000 .*, 30,000 pixels, and max_pixels is 20,000; scale it"):
        build(folder, shard_mib=10, max_pixels=20_000)
    made: list[str] = []
    monkeypatch.setattr(shards, "make_shard", lambda job, *_: made.append(job.name) or writer.make_shard(job, *_))
    manifest = build(folder, shard_mib=10, on_error="skip", max_pixels=20_000)
    assert made == ["train-00003", "val-00000"]
    assert [shard.records for shard in manifest.splits["train"].shards] == [10, 10, 10, 9]


# Decoded pictures


def test_raw_shards_hold_rows_of_pixels_and_ids(tmp_path: Path, storage: Path) -> None:
    folder = write_folder(tmp_path / "d")
    plain, raw = build(folder), build(folder, pixels="raw")
    assert raw.pixel_layout == "raw"
    same = ("pixels", "ignored_pixels", "images", "instances", "image_sizes", "labels")
    assert {key: getattr(raw, key) for key in same} == {key: getattr(plain, key) for key in same}
    for before, row in zip(rows(storage, plain, "train"), rows(storage, raw, "train"), strict=True):
        pixels = np.frombuffer(row["image"], np.uint8).reshape(12, 16, 3)
        np.testing.assert_array_equal(pixels, decode_image(before["image"], ""))
        ids = np.frombuffer(row["segments"], np.uint8).reshape(12, 16)
        np.testing.assert_array_equal(ids, np.where(labels() == 9, 255, labels()))
        unchanged = row.keys() - {"image", "segments", "digest"}
        assert {key: row[key] for key in unchanged} == {key: before[key] for key in unchanged}
        assert row["digest"] != before["digest"]


def torn(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


@pytest.mark.parametrize(
    ("file", "data", "message"),
    [
        ("images/training/p1.jpg", torn(encoded(image(200, 200), ".jpg")), r"images/training/p1\.jpg does not decode"),
        ("images/training/p1.jpg", b"", r"images/training/p1\.jpg does not decode"),
        ("images/training/p1.jpg", b"<html>", r"p1\.jpg does not decode .* truncated or not an image"),
        (
            "annotations/training/p1.png",
            torn(encoded(labels(200, 200))),
            r"annotations/training/p1\.png does not decode",
        ),
        (
            "annotations/training/p1.png",
            encoded(labels(12, 14)),
            r"annotations/training/p1\.png is 12 x 14 \(height x width\), but its image .*p1\.jpg is 12 x 16",
        ),
        (
            "annotations/training/p1.png",
            encoded(np.full((12, 16), 5, np.uint8)),
            r"annotations/training/p1\.png holds label 5 on 192 pixels.*0 to 2",
        ),
        (
            "annotations/training/p1.png",
            encoded(labels(16, 12)),
            r"p1\.jpg is 12 x 16; if the labels were drawn on the images as stored, set exif: ignore in the dataset",
        ),
        ("annotations/validation/p9.png", encoded(labels()), r"annotations/validation/p9\.png has no image"),
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


def test_an_empty_split_and_a_wrong_number_of_classes_are_refused(tmp_path: Path, storage: Path) -> None:
    with pytest.raises(ValueError, match="has no images in images/validation/ for split val"):
        build(write_folder(tmp_path / "d", val=0))
    folder = write_folder(tmp_path / "e")
    with pytest.raises(ValueError, match="lists 0 classes"):
        build(folder, class_names=())
    with pytest.raises(ValueError, match="lists 65536 classes; 1 to 65,535 are possible"):
        build(folder, class_names=tuple(map(str, range(65536))))


def test_a_picture_without_a_labelled_pixel_is_kept(tmp_path: Path, storage: Path) -> None:
    folder = write_folder(tmp_path / "d", train=1)
    put(folder / "annotations/training/p0.png", encoded(np.full((12, 16), 9, np.uint8)))
    manifest = build(folder)
    assert manifest.images["train"] == (0, 0, 0)
    assert manifest.ignored_pixels["train"] == 192


def test_generated_scenes_have_panoptic_labels(storage: Path) -> None:
    names = ("sky", "hill", "road", "pavement", "building", "tree", "car", "person", "sign")
    generate = {"train": 3, "val": 2, "height": 64, "width": 96, "seed": 1}
    shapes = config(layout="shapes", class_names=names, thing_classes=names[6:], generate=generate)
    manifest = shards.build("shapes", shapes, [], facts=[])
    assert manifest.labels == ("instances", "panoptic", "semantic")
    read = rows(storage, manifest, "train")
    class_ids = np.array([class_id for row in read for class_id in row["segment_classes"] if class_id >= 6])
    assert manifest.instances["train"] == tuple(np.bincount(class_ids, minlength=9).tolist())
    assert sum(row["things"] for row in read) == len(class_ids) > 0


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
    images = list(validation_images(manifest, test))
    assert len(images) == 3
    for val_image in images:
        stored = published_label(archive, f"annotations/validation/{val_image.name}.png")
        np.testing.assert_array_equal(val_image.label_map.numpy(), stored - np.uint8(1))  # 0 becomes 255
    (_, archive), manifest = sample("cityscapes", storage)
    images = list(validation_images(manifest, test))
    assert len(images) == 6
    for val_image in images:
        stored = published_label(archive, f"val/{val_image.name}_gtFine_labelIds.png")
        expected = np.full(256, 255)
        expected[list(TRAIN_IDS)] = range(19)
        np.testing.assert_array_equal(val_image.label_map.numpy(), expected[stored])
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
            image_range=range(2),
        )
    )
    assert batch.images.shape == (2, 3, 64, 128)
    assert all(len(class_ids) for class_ids in batch.labels)


def test_the_coco_sample_reaches_the_loader_with_its_segments(storage: Path) -> None:
    _, manifest = sample("coco", storage)
    images = list(validation_images(manifest, TestConfig(short_side=128, long_side_max=256), task="panoptic"))
    assert manifest.things_per_image["val"] == {14: 1, 26: 1}
    things = [sum(int(class_id) < 80 for class_id in val_image.labels) for val_image in images]
    crowds = [int(val_image.crowd.sum()) for val_image in images]
    assert [thing - crowd for thing, crowd in zip(things, crowds, strict=True)] == [14, 26]
    assert (storage / manifest.samples.path).exists()
