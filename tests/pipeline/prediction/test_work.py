"""Predictions are evaluation's: bit for bit alone, within rounding in batches, and whole after an interruption."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import ray
import torch
from pycocotools.coco import COCO

from pipeline.data.loader.val_images import validation_images
from pipeline.evaluation.predict import PredictConfig, predict
from pipeline.params.schema import Task
from pipeline.prediction import work
from pipeline.prediction.images import find_images
from pipeline.prediction.network import TrainedNetwork
from tests.helpers.images import encoded, image, put
from tests.helpers.registered import SIZES, manifest_of

Make = Callable[..., TrainedNetwork]

pytestmark = pytest.mark.slow


def predicted(network: TrainedNetwork, images: Path, out: Path, **options: Any) -> dict[str, str]:
    settings = {"batch": 1, "palette": False, **options}
    found = find_images(str(images), without=out)
    return work.predict_all(network, found, out, source=str(images), **settings)


def write_images(folder: Path) -> Path:
    """`manifest_of`'s pictures as files."""
    for seed, size in enumerate(SIZES):
        put(folder / f"p{seed}.png", encoded(image(*size, seed=seed)))
    return folder


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_a_picture_gets_the_bits_that_evaluation_measures(
    task: Task, network_of: Make, storage: Path, tmp_path: Path
) -> None:
    network = network_of(task)
    assert not predicted(network, write_images(tmp_path / "in"), tmp_path / "out")
    content = json.loads((tmp_path / "out/predictions.json").read_text())
    config = PredictConfig(test=network.test, task=task, thing_ids=network.thing_ids)
    for val_image in validation_images(manifest_of(storage), network.test, task=task):
        expected = predict(network.network, val_image.image, val_image.original_size, config)
        labels = cv2.imread(str(tmp_path / f"out/labels/{val_image.name}.png"), cv2.IMREAD_UNCHANGED)
        (number,) = (each["id"] for each in content["images"] if each["file_name"] == f"{val_image.name}.png")
        if expected.labels is not None:
            assert np.array_equal(labels, expected.labels.numpy())
        if expected.segments is not None:
            (of_it,) = (each for each in content["annotations"] if each["image_id"] == number)
            assert [each["score"] for each in of_it["segments_info"]] == expected.segments.scores.tolist()
            rgb = cv2.imread(str(tmp_path / f"out/panoptic/{of_it['file_name']}"))[..., ::-1].astype(int)
            assert np.array_equal(rgb @ [1, 256, 65536] - 1, expected.segments.segments.numpy())
        elif expected.instances is not None:
            of_it = [each for each in content["annotations"] if each["image_id"] == number]
            assert [each["score"] for each in of_it] == expected.instances.scores.tolist()
            coco = COCO(str(tmp_path / "out/predictions.json"))
            assert np.array_equal([coco.annToMask(each) for each in of_it], expected.instances.masks.numpy())


def scores_of(out: Path) -> dict[str, list[float]]:
    content = json.loads((out / "predictions.json").read_text())
    files = {each["id"]: each["file_name"] for each in content["images"]}
    found: dict[str, list[float]] = {file: [] for file in files.values()}
    for each in content["annotations"]:
        found[files[each["image_id"]]].append(each["score"])
    return found


def test_pictures_in_batches_have_the_scores_that_they_have_alone(network_of: Make, tmp_path: Path) -> None:
    network = network_of("instance")
    # shown at 70 x 105, 69 x 105 and 70 x 104, all padded to 96 x 128; the last at 70 x 70, padded to 96 x 96
    for name, size in {"a": (64, 96), "b": (65, 99), "c": (70, 104), "d": (64, 64)}.items():
        put(tmp_path / f"in/{name}.png", encoded(image(*size, seed=ord(name))))
    predicted(network, tmp_path / "in", tmp_path / "alone")
    predicted(network, tmp_path / "in", tmp_path / "batches", batch=2)
    alone, batches = scores_of(tmp_path / "alone"), scores_of(tmp_path / "batches")
    assert list(alone) == list(batches) == ["a.png", "b.png", "c.png", "d.png"]
    for name, scores in alone.items():
        assert len(scores) > 3
        assert batches[name] == pytest.approx(scores, abs=1e-5)


def test_only_pictures_of_one_padded_size_go_together_and_none_waits_for_ever(network_of: Make) -> None:
    network = network_of("semantic", short_side=64, long_side_max=128)
    shapes = [(64, 64), (64, 128), (64, 63), (64, 128), (64, 128), (32, 32), (128, 64), (64, 96)]
    pictures = [
        work.Picture(str(place), str(place), "", np.zeros((*shape, 3), np.uint8)) for place, shape in enumerate(shapes)
    ]
    # 64 x 63 is shown at 65 x 64, which is padded to 96 x 64
    names = [[picture.name for picture in batch] for batch in work._batches(pictures, network, 2)]
    assert names == [["1", "3"], ["0", "5"], ["2"], ["4"], ["6"], ["7"]]


def test_what_is_there_is_not_made_again_and_what_was_altered_is(
    network_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, images, out = network_of("panoptic"), write_images(tmp_path / "in"), tmp_path / "out"
    made: list[str] = []
    add = work.Folder.add

    def interrupted(self: work.Folder, picture: work.Picture, found: Any) -> None:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(picture.name)
        add(self, picture, found)

    monkeypatch.setattr(work.Folder, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predicted(network, images, out)
    assert made == ["p0", "p1"] and not (out / "predictions.json").exists()
    made.clear()
    monkeypatch.setattr(work.Folder, "add", lambda *given: made.append(given[1].name) or add(*given))
    predicted(network, images, out)
    assert made == ["p2", "p3", "p4"]
    whole = (out / "predictions.json").read_bytes()
    put(images / "p3.png", encoded(image(50, 60, seed=9)))
    (out / "labels/p0.png").unlink()
    predicted(network, images, out)
    assert made == ["p2", "p3", "p4", "p0", "p3"]
    put(images / "p3.png", encoded(image(*SIZES[3], seed=3)))
    predicted(network, images, out)
    assert (out / "predictions.json").read_bytes() == whole


def test_what_cannot_be_read_is_listed_everywhere_and_the_rest_is_made(network_of: Make, tmp_path: Path) -> None:
    put(tmp_path / "in/good.png", encoded(image(64, 96)))
    put(tmp_path / "in/bad & worse.png", b"no picture")
    put(tmp_path / "in/tiny.png", encoded(image(1, 40)))
    failures = predicted(network_of("semantic", pad_multiple=1), tmp_path / "in", tmp_path / "out")
    assert list(failures) == ["bad & worse.png", "tiny.png"]
    with open(tmp_path / "out/summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["good.png", "bad & worse.png", "tiny.png"]
    assert rows[0]["labels"] == "labels/good.png" and not rows[0]["error"]
    assert "does not decode" in rows[1]["error"] and "32 x 32 or more" in rows[2]["error"]
    page = (tmp_path / "out/index.html").read_text()
    assert "2 could not be read" in page and "bad &amp; worse.png" in page and 'src="overlays/good.jpg"' in page


def test_where_no_picture_can_be_predicted_nothing_is_left_behind(network_of: Make, tmp_path: Path) -> None:
    put(tmp_path / "in/v.mp4", b"no video")
    with pytest.raises(ValueError, match=r"no image of .*in could be predicted: .*v\.mp4 is a video without frames"):
        predicted(network_of("semantic"), tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_video_becomes_label_maps_of_its_frames_and_a_video_of_overlays(network_of: Make, tmp_path: Path) -> None:
    from pipeline.prediction.video import frames, write_video

    (tmp_path / "in").mkdir()
    write_video(tmp_path / "in/v.mp4", [image(64, 96, seed=seed) for seed in range(3)], rate=5)
    assert not predicted(network_of("semantic"), tmp_path / "in/v.mp4", tmp_path / "out", batch=2)
    labels = sorted(path.name for path in (tmp_path / "out/labels/v").iterdir())
    assert labels == ["000001.png", "000002.png", "000003.png"]
    assert [frame.shape for frame in frames(tmp_path / "out/overlays/v.mp4")] == [(64, 96, 3)] * 3
    assert 'src="overlays/v.mp4"' in (tmp_path / "out/index.html").read_text()


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_a_large_picture_is_predicted_in_windows_among_others(
    task: Task, network_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = {"size": 64, "overlap": 16}
    monkeypatch.setattr(work.Progress, "done", lambda self, brief=False: counted.append((self.what, self.count)))
    counted: list[tuple[str, int]] = []
    put(tmp_path / "in/large.png", encoded(image(64, 200)))
    put(tmp_path / "in/small.png", encoded(image(64, 40)))
    predicted(network_of(task, window=window), tmp_path / "in", tmp_path / "windows", batch=2)
    assert ("large.png in windows", 4) in counted  # (200 - 16) / (64 - 16) = 3.8
    predicted(network_of(task), tmp_path / "in", tmp_path / "whole", batch=2)
    labels = [
        {name: cv2.imread(str(tmp_path / f"{out}/labels/{name}.png"), 0) for name in ("large", "small")}
        for out in ("windows", "whole")
    ]
    assert labels[0]["large"].shape == (64, 200)
    assert not np.array_equal(labels[0]["large"], labels[1]["large"])
    assert np.array_equal(labels[0]["small"], labels[1]["small"])


@pytest.mark.parametrize(
    ("which", "images"), [("predict_windows", 1), ("predict_batch", 2)], ids=["windows", "a batch of whole pictures"]
)
def test_a_gpu_without_memory_is_one_sentence_with_what_to_give_instead(
    which: str, images: int, network_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(work, which, no_memory)
    for number in range(images):
        put(tmp_path / f"in/{number}.png", encoded(image(64, 200)))
    network = network_of("semantic", window={"size": 64, "overlap": 16} if which == "predict_windows" else None)
    said = f"the GPU has no memory for {images} images? of 200 x 64 pixels at once; give a smaller --batch, --window"
    with pytest.raises(ValueError, match=said):
        predicted(network, tmp_path / "in", tmp_path / "out", batch=images)
    assert not (tmp_path / "out").exists()


def test_a_batch_without_a_picture_is_refused(network_of: Make, tmp_path: Path) -> None:
    put(tmp_path / "in/a.png", encoded(image()))
    with pytest.raises(ValueError, match="--batch is 0; give 1 or more"):
        predicted(network_of("semantic"), tmp_path / "in", tmp_path / "out", batch=0)


@pytest.mark.ray
@pytest.mark.long
def test_workers_write_what_one_process_writes(network_of: Make, tmp_path: Path) -> None:
    network, images = network_of("panoptic"), write_images(tmp_path / "in")
    put(images / "bad.png", b"no picture")
    failures = predicted(network, images, tmp_path / "alone")
    try:
        assert predicted(network, images, tmp_path / "shared", workers=2) == failures
        with pytest.raises(ValueError, match=r"--workers is 999, but Ray has \d+ CPUs here; give \d+ or less"):
            predicted(network, images, tmp_path / "none", workers=999)
        assert not (tmp_path / "none").exists()
    finally:
        ray.shutdown()
    for name in ("predictions.json", "summary.csv", "index.html", "labels/p3.png", "overlays/p3.jpg"):
        assert (tmp_path / "shared" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
