"""The worst pictures are those whose own figure is lowest."""

from __future__ import annotations

from pathlib import Path

import cv2
import pytest

from m2f.metrics import SemanticMetric
from pipeline.browse.worst import scored_images, write_worst
from pipeline.data.loader.val_images import validation_images
from pipeline.evaluation.predict import PredictConfig, predict
from pipeline.params.schema import Row
from tests.helpers.registered import SIZES, decided_network, manifest_of, row_of


@pytest.mark.slow
def test_every_picture_has_its_own_figure_and_the_worst_come_first(
    small_row: Row, storage: Path, tmp_path: Path
) -> None:
    row, manifest = row_of("semantic", small_row), manifest_of(storage, sizes=SIZES[:4])
    network = decided_network(row)
    scored = scored_images(network, manifest, row)
    config = PredictConfig(test=row.test, task="semantic", thing_ids=[2])
    expected = {}
    for val_image in validation_images(manifest, row.test):
        labels = predict(network, val_image.image, val_image.original_size, config).labels
        metric = SemanticMetric(num_classes=3)
        assert labels is not None and val_image.label_map is not None
        metric.update(labels, val_image.label_map)
        expected[val_image.name] = metric.result()["miou"]
    assert {each.name: each.value for each in scored} == expected
    assert [each.value for each in scored] == sorted(expected.values())
    ((worst, path),) = write_worst(tmp_path, network, manifest, row, scored[:1])
    assert worst == scored[0]
    height, width = SIZES[worst.place]
    assert cv2.imread(str(path)).shape == (height, 3 * width + 8, 3)  # picture, prediction, truth, and gaps of 4


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_pictures_are_scored_by_their_row_s_first_figure(task: str, small_row: Row, storage: Path) -> None:
    row, manifest = row_of(task, small_row), manifest_of(storage, sizes=SIZES[:1])
    (scored,) = scored_images(decided_network(row), manifest, row)
    assert scored.name == "p0" and 0 <= scored.value <= 1
