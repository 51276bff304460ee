from __future__ import annotations

import dataclasses
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.images.codecs import decode_masks
from pipeline.data.loader.val_images import validation_images
from pipeline.params.schema import MsFlipConfig
from pipeline.storage.results.data import Manifest
from tests.helpers.images import image, labels, write_shards
from tests.helpers.loading import TEST, THINGS, crossing, street
from tests.helpers.shared import PROJECT
from tests.helpers.waiting import until


def test_validation_pictures_are_shared_out_and_resized_but_their_truth_is_not(manifest: Manifest) -> None:
    whole = [val_image.name for val_image in validation_images(manifest, TEST)]
    assert whole == ["p0", "p1", "p2", "p3", "p4"]
    shares = [[p.name for p in validation_images(manifest, TEST, places=range(w, len(whole), 3))] for w in range(3)]
    assert shares == [["p0", "p3"], ["p1", "p4"], ["p2"]]
    val_image = next(validation_images(manifest, TEST))
    assert val_image.image.shape == (3, 24, 32)  # 12 x 16, short side to 24
    assert val_image.original_size == (12, 16)
    np.testing.assert_array_equal(val_image.label_map.numpy(), np.where(labels() == 9, 255, labels()))
    assert val_image.labels.tolist() == [0, 1, 2]
    assert val_image.crowd.tolist() == [False, False, False]
    assert (val_image.instances, val_image.original) == (None, None)
    indices = [[p.index for p in validation_images(manifest, TEST, places=range(w, 5, 2))] for w in range(2)]
    assert indices == [[0, 2, 4], [1, 3]]


def test_multi_scale_testing_gets_the_picture_as_it_is(manifest: Manifest) -> None:
    test = dataclasses.replace(TEST, ms_flip=MsFlipConfig(short_sides=(10, 20), long_side_max=100))
    val_image = next(validation_images(manifest, test))
    np.testing.assert_array_equal(val_image.original.permute(1, 2, 0).numpy(), image())


def test_validation_keeps_every_annotation_as_it_is(storage: Path) -> None:
    manifest = write_shards(storage, {"val": [crossing()]}, **{**THINGS, "labels": ("instances",)})
    (val_image,) = validation_images(manifest, TEST, task="instance")
    assert val_image.image.shape == (3, 24, 24)
    assert (val_image.label_map, val_image.segments, val_image.labels.tolist()) == (None, None, [])
    assert val_image.instances.labels.tolist() == [0, 0, 0, 1, 1]
    assert val_image.instances.areas.tolist() == [15.5, 8, 0, 8, 16]
    assert val_image.instances.crowd.tolist() == [False, True, False, False, False]
    assert decode_masks(val_image.instances.run_lengths, (8, 8)).sum(axis=(1, 2)).tolist() == [16, 8, 4, 8, 16]


def test_panoptic_validation_has_segments_with_crowds_and_instances_by_dataset_class(storage: Path) -> None:
    own = {**street(), "instances": crossing()["instances"]}
    manifest = write_shards(storage, {"val": [own, street()]}, **THINGS)
    first, second = validation_images(manifest, TEST, task="panoptic")
    assert first.labels.tolist() == [1, 1, 0, 0]
    assert first.crowd.tolist() == [False, True, False, False]
    assert first.segments[0].tolist() == [2, 2, 0, 0, 1, 1, 3, 3]
    assert first.label_map[0].tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    assert first.instances.labels.tolist() == [1, 1, 1, 2, 2]
    assert second.instances.labels.tolist() == [1, 1]
    assert second.instances.crowd.tolist() == [False, True]


def test_a_split_that_is_not_there_is_named(manifest: Manifest) -> None:
    manifest = dataclasses.replace(manifest, splits={"train": manifest.splits["train"]})
    with pytest.raises(ValueError, match="dataset mine has no split val"):
        next(validation_images(manifest, TEST))


def test_there_are_no_more_loader_processes_than_pictures(manifest: Manifest) -> None:
    before = set(multiprocessing.active_children())  # of other tests
    shown = validation_images(manifest, TEST, places=[3, 1], processes=8)
    assert next(shown).index == 3
    assert len(set(multiprocessing.active_children()) - before) == 2
    assert [val_image.index for val_image in shown] == [1]
    assert list(validation_images(manifest, TEST, places=[], processes=8)) == []


def test_a_validation_that_is_given_up_leaves_no_process(manifest: Manifest) -> None:
    before = set(multiprocessing.active_children())  # of other tests
    shown = validation_images(manifest, TEST, processes=2)
    next(shown)
    assert len(set(multiprocessing.active_children()) - before) == 2
    shown.close()
    assert not set(multiprocessing.active_children()) - before


@pytest.mark.slow
def test_a_validation_that_is_killed_leaves_no_process(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "manifest.pickle").write_bytes(pickle.dumps(manifest))
    code = (
        "import multiprocessing, pickle, time\n"
        "from pipeline.data.loader.val_images import validation_images\n"
        "from tests.helpers.loading import TEST\n"
        f"manifest = pickle.load(open({str(tmp_path / 'manifest.pickle')!r}, 'rb'))\n"
        "shown = validation_images(manifest, TEST, processes=2)\n"
        "next(shown)\n"
        "print(*(child.pid for child in multiprocessing.active_children()), flush=True)\n"
        "time.sleep(3600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2 and all(_runs(pid) for pid in pids)
    process.kill()
    process.wait()
    until(lambda: not any(_runs(pid) for pid in pids))


def _runs(pid: int) -> bool:
    """Whether a process is there and not only waiting to be collected by its parent."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
