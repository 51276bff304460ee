from __future__ import annotations

import itertools
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from m2f.draws import mix
from pipeline import loader, shards
from pipeline.datasets.source import Labelled, Record
from pipeline.loader import Batch, epoch_order, training_batches, validation_pictures
from pipeline.params import AugmentationConfig, TestConfig
from pipeline.pictures import decode_image
from tests.pipeline.pictures import config, encoded, image, labels, put, write_folder

TEST = TestConfig(short_side=24, long_side_max=100)


def augmentation(**changes: Any) -> AugmentationConfig:
    settings: dict[str, Any] = {"crop": (32, 32), "short_sides": (12, 24, 36), "long_side_max": 100}
    return AugmentationConfig(**{**settings, **changes})


@pytest.fixture
def manifest(tmp_path: Path, storage: Path) -> dict[str, Any]:
    """Seven training and five validation pictures of 12 x 16."""
    return shards.build("mine", config(), [write_folder(tmp_path / "d", train=7, val=5)], facts=[])


def batches(manifest: dict[str, Any], **changes: Any) -> list[Batch]:
    settings: dict[str, Any] = {
        "seed": 5,
        "first_step": 0,
        "steps": 4,
        "global_batch": 4,
        "picture_range": range(4),
        **changes,
    }
    return list(training_batches(manifest, augmentation(), **settings))


def pictures_of(items: list[Batch]) -> dict[int, tuple[Any, ...]]:
    """Everything that belongs to each position."""
    found = {}
    for batch in items:
        for place, position in enumerate(batch.positions):
            height, width = batch.sizes[place].tolist()
            found[position] = (
                batch.names[place],
                batch.seeds[place],
                (height, width),
                batch.labels[place].tolist(),
                batch.images[place, :, :height, :width].numpy().tobytes(),
                batch.segments[place].numpy().tobytes(),
            )
    return found


def test_an_epoch_is_a_permutation_and_the_next_one_another() -> None:
    orders = [epoch_order(5, epoch, 50) for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert epoch_order(6, 0, 50) != orders[0] == epoch_order(5, 0, 50)


def test_steps_walk_through_epoch_after_epoch(manifest: dict[str, Any]) -> None:
    # 7 pictures in steps of 4: 16 positions hold two whole epochs and two pictures of the third
    names = [name for batch in batches(manifest) for name in batch.names]
    expected = [f"p{index}" for epoch in range(3) for index in epoch_order(5, epoch, 7)]
    assert names == expected[:16]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("processes", [1, 2])
def test_loader_processes_change_nothing(manifest: dict[str, Any], processes: int) -> None:
    # OpenCV's own threads are running here: processes forked now must not wait for them
    cv2.setNumThreads(4)
    cv2.GaussianBlur(np.zeros((2000, 2000, 3), np.uint8), (0, 0), 3)
    alone, others = batches(manifest), batches(manifest, processes=processes)
    assert [batch.positions for batch in alone] == [batch.positions for batch in others]
    assert pictures_of(alone) == pictures_of(others)
    shown = [list(validation_pictures(manifest, TEST, processes=count)) for count in (0, processes)]
    assert [picture.name for picture in shown[0]] == [picture.name for picture in shown[1]]
    assert all(torch.equal(a.image, b.image) for a, b in zip(*shown, strict=True))


def test_workers_and_restarts_see_the_same_pictures(manifest: dict[str, Any]) -> None:
    whole = pictures_of(batches(manifest))
    shared = pictures_of(batches(manifest, picture_range=range(2))) | pictures_of(
        batches(manifest, picture_range=range(2, 4))
    )
    restarted = pictures_of(batches(manifest, steps=1)) | pictures_of(batches(manifest, first_step=1, steps=3))
    assert whole == shared == restarted
    assert whole != pictures_of(batches(manifest, seed=6))


def test_every_picture_carries_its_seed(manifest: dict[str, Any]) -> None:
    for batch in batches(manifest, picture_range=range(1, 3)):
        assert batch.seeds == tuple(mix(5, 3, position) for position in batch.positions)


def test_segments_index_the_labels_that_are_there_and_padding_is_nothing(manifest: dict[str, Any]) -> None:
    for batch in batches(manifest, steps=20):
        assert batch.images.shape == (4, 3, 32, 32)
        assert batch.images.dtype == batch.segments.dtype == torch.uint8
        for place in range(4):
            height, width = batch.sizes[place].tolist()
            padding = torch.ones(32, 32, dtype=torch.bool)
            padding[:height, :width] = False
            assert (batch.segments[place][padding] == 255).all()
            present = torch.unique(batch.segments[place])
            assert present[present != 255].tolist() == list(range(len(batch.labels[place])))
            assert batch.labels[place].tolist() == sorted(batch.labels[place].tolist())


def test_a_picture_smaller_than_the_crop_comes_through_unchanged(manifest: dict[str, Any], tmp_path: Path) -> None:
    plain = augmentation(short_sides=(12,), flip=0.0, photometric=False)
    (batch,) = training_batches(manifest, plain, seed=0, first_step=0, steps=1, global_batch=1, picture_range=range(1))
    stored = decode_image((tmp_path / f"d/images/training/{batch.names[0]}.jpg").read_bytes(), "")
    assert batch.sizes.tolist() == [[12, 16]]
    np.testing.assert_array_equal(batch.images[0, :, :12, :16].permute(1, 2, 0).numpy(), stored)
    np.testing.assert_array_equal(batch.segments[0, :12, :16].numpy(), np.where(labels() == 9, 255, labels()))


def test_a_picture_with_no_labelled_pixel_has_no_labels(tmp_path: Path, storage: Path) -> None:
    folder = write_folder(tmp_path / "d", train=1, val=1)
    for split in ("training", "validation"):
        put(folder / f"annotations/{split}/p0.png", encoded(np.full((12, 16), 9, np.uint8)))
    manifest = shards.build("mine", config(), [folder], facts=[])
    for batch in batches(manifest):
        assert [len(found) for found in batch.labels] == [0, 0, 0, 0]
        assert (batch.segments == 255).all()
    (picture,) = validation_pictures(manifest, TEST)
    assert picture.labels.tolist() == []
    assert (picture.label_map == 255).all()


def test_validation_pictures_are_shared_out_and_resized_but_their_truth_is_not(manifest: dict[str, Any]) -> None:
    whole = [picture.name for picture in validation_pictures(manifest, TEST)]
    assert whole == ["p0", "p1", "p2", "p3", "p4"]
    shares = [[p.name for p in validation_pictures(manifest, TEST, worker=w, workers=3)] for w in range(3)]
    assert shares == [["p0", "p3"], ["p1", "p4"], ["p2"]]
    picture = next(validation_pictures(manifest, TEST))
    assert picture.image.shape == (3, 24, 32)  # 12 x 16, short side to 24
    assert picture.original_size == (12, 16)
    np.testing.assert_array_equal(picture.label_map.numpy(), np.where(labels() == 9, 255, labels()))
    assert picture.labels.tolist() == [0, 1, 2]


def panoptic(count: int) -> Labelled:
    """`count` segments in turn over 20 x 20 pixels, of the classes 2, 1, 0, 2, ...; the last pixel is nothing."""
    ids = (np.arange(400) % count).reshape(20, 20)
    ids[-1, -1] = 255 if count <= 255 else 65535
    return Labelled(encoded(image(20, 20)), ids, tuple(2 - index % 3 for index in range(count)))


def panoptic_records(counts: tuple[int, ...], *_: Any) -> list[Record]:
    return [Record(f"p{index}", "", "", partial(panoptic, count)) for index, count in enumerate(counts)]


def test_panoptic_segments_keep_their_classes_also_when_there_are_many(
    storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for counts, dtype, nothing in (((4, 7), torch.uint8, 255), ((4, 300), torch.int32, -1)):
        listed = type("Layout", (), {"records": staticmethod(partial(panoptic_records, counts))})
        monkeypatch.setattr(shards, "LAYOUTS", {"folder": listed})
        manifest = shards.build("mine", config(), [], facts=[])
        plain = augmentation(short_sides=(20,), flip=0.0)
        settings: dict[str, Any] = {
            "seed": 0,
            "first_step": 0,
            "steps": 1,
            "global_batch": 2,
            "picture_range": range(2),
        }
        (batch,) = training_batches(manifest, plain, **settings)
        assert batch.segments.dtype == dtype
        for place, name in enumerate(batch.names):
            count = counts[int(name[1:])]
            assert batch.labels[place].tolist() == [2 - index % 3 for index in range(count)]
            expected = np.arange(400) % count
            expected[-1] = nothing
            np.testing.assert_array_equal(batch.segments[place, :20, :20].numpy().ravel(), expected)
            assert (batch.segments[place, 20:] == nothing).all()
        shown = list(validation_pictures(manifest, TEST))
        assert [len(picture.labels) for picture in shown] == list(counts)
        assert shown[1].label_map[0, :4].tolist() == [2, 1, 0, 2]
        assert shown[1].label_map[-1, -1] == 255


def shard_path(storage: Path, manifest: dict[str, Any]) -> Path:
    return storage / manifest["splits"]["train"]["shards"][0]["path"]


@pytest.mark.parametrize("truncated", [True, False])
def test_an_altered_shard_is_named_with_both_digests(manifest: dict[str, Any], storage: Path, truncated: bool) -> None:
    path = shard_path(storage, manifest)
    batches(manifest)  # verified now, so the note says that it is whole
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data[:-10] if truncated else data)
    expected = manifest["splits"]["train"]["shards"][0]["sha256"]
    with pytest.raises(
        ValueError, match=rf"train-00000\.arrow is truncated or altered: its sha256 is [0-9a-f]{{64}}, .*{expected}.*"
    ) as caught:
        batches(manifest)
    assert "make it again with: python -m stages.shard mine" in str(caught.value)


def test_a_missing_shard_is_named_with_the_command_that_makes_it(manifest: dict[str, Any], storage: Path) -> None:
    shard_path(storage, manifest).unlink()
    with pytest.raises(ValueError, match=r"train-00000\.arrow is missing .* python -m stages\.shard mine"):
        batches(manifest)


def test_shards_are_verified_once_per_host(manifest: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    monkeypatch.setattr(loader, "sha256", lambda path: read.append(path) or shards.sha256(path))
    for _ in range(3):
        batches(manifest, steps=1)
    assert len(read) == 1
    monkeypatch.setattr("socket.gethostname", lambda: "another-host")
    batches(manifest, steps=1)
    assert len(read) == 2


@pytest.mark.parametrize("processes", [0, 1])
def test_a_record_that_fails_is_named(
    manifest: dict[str, Any], storage: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    path = shard_path(storage, manifest)
    data = path.read_bytes()
    start = data.index(b"\xff\xd8\xff")  # the first picture's JPEG header
    path.write_bytes(data[:start] + b"\0" * 20 + data[start + 20 :])
    monkeypatch.setattr(loader, "verify_shards", lambda *_: None)  # as if it was altered after verification
    with pytest.raises(ValueError, match=r"train-00000\.arrow: p0 does not decode") as caught:
        batches(manifest, processes=processes)
    assert "Traceback" not in str(caught.value)


def test_a_loader_can_be_sent_to_a_spawned_process(manifest: dict[str, Any]) -> None:
    source = loader._Training(loader._Split.of(manifest, "train"), augmentation(), 5, 4, range(4))
    first = source[0]
    copy = pickle.loads(pickle.dumps(source))
    assert pictures_of([copy[0]]) == pictures_of([first])


def test_an_unfinished_loader_can_be_dropped(manifest: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"seed": 0, "first_step": 0, "global_batch": 4, "picture_range": range(4)}
    endless = training_batches(manifest, augmentation(), steps=10**9, processes=1, **settings)
    assert [batch.positions[0] for batch in itertools.islice(endless, 3)] == [0, 4, 8]
    endless.close()


def test_a_split_that_is_not_there_is_named(manifest: dict[str, Any]) -> None:
    del manifest["splits"]["val"]
    with pytest.raises(ValueError, match="dataset mine has no split val"):
        next(validation_pictures(manifest, TEST))
