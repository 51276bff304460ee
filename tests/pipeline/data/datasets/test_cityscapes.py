from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.data.datasets import cityscapes
from pipeline.params.schema import DatasetConfig
from tests.helpers.images import encoded, image, put, zipped
from tests.helpers.shared import shared

CONFIG = DatasetConfig(
    layout="cityscapes",
    class_names=tuple(f"class {index}" for index in range(19)),
    splits={"train": "train", "val": "val"},
)


def write(folder: Path, ids: np.ndarray) -> tuple[Path, Path]:
    """One training picture of one city, in the two archives' layout."""
    put(folder / "i/leftImg8bit/train/ulm/ulm_000000_000019_leftImg8bit.png", encoded(image(*ids.shape)))
    put(folder / "g/gtFine/train/ulm/ulm_000000_000019_gtFine_labelIds.png", encoded(ids))
    put(folder / "g/gtFine/train/ulm/ulm_000000_000019_gtFine_instanceIds.png", encoded(ids))
    return folder / "i", folder / "g"


@pytest.mark.parametrize("archived", [False, True])
def test_label_ids_become_train_ids_and_all_others_nothing(tmp_path: Path, archived: bool) -> None:
    # road 7 -> 0, sidewalk 8 -> 1, sky 23 -> 10, bicycle 33 -> 18; ego vehicle 1, bridge 15, licence plate 255 -> 255
    sources = write(tmp_path, np.array([[7, 8, 23, 33], [1, 15, 255, 7]], np.uint8))
    if archived:
        sources = zipped(sources[0], tmp_path / "i.zip"), zipped(sources[1], tmp_path / "g.zip")
    for order in (sources, sources[::-1]):
        (record,) = cityscapes.records(CONFIG, order, "train")
        assert record.name == "ulm/ulm_000000_000019"
        assert record.read().segments.tolist() == [[0, 1, 10, 18], [255, 255, 255, 0]]


def test_a_picture_without_label_and_a_missing_archive_are_named(tmp_path: Path) -> None:
    images, truth = write(tmp_path, np.full((2, 2), 7, np.uint8))
    with pytest.raises(ValueError, match="has no folder gtFine/"):
        cityscapes.records(CONFIG, [images], "train")
    with pytest.raises(ValueError, match=r"no images leftImg8bit/val/"):
        cityscapes.records(CONFIG, [images, truth], "val")
    (truth / "gtFine/train/ulm/ulm_000000_000019_gtFine_labelIds.png").unlink()
    with pytest.raises(ValueError, match=r"ulm_000000_000019_leftImg8bit\.png has no label gtFine/train/ulm/ulm"):
        cityscapes.records(CONFIG, [images, truth], "train")


def test_the_real_sample_archives_are_read_in_place() -> None:
    sources = [shared(f"data/{name}_trainvaltest-sample.zip") for name in ("leftImg8bit", "gtFine")]
    assert [len(cityscapes.records(CONFIG, sources, split)) for split in ("train", "val")] == [12, 6]
    read = cityscapes.records(CONFIG, sources, "val")[0].read()
    assert read.segments.shape == (360, 480)
    assert set(np.unique(read.segments)) <= {*range(19), 255}
