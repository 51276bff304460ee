"""Predictions for large pictures in windows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from m2f import Prediction
from m2f.model import MEAN_RGB, STD_RGB
from pipeline.data.images.resize import network_image
from pipeline.evaluation.predict import PredictConfig, predict, predict_batch, predict_windows
from pipeline.evaluation.task_metrics import measure
from pipeline.params.schema import MsFlipConfig, Row, Task, TestConfig
from pipeline.params.tasks import primary
from pipeline.provenance.run_key import settings_facts
from tests.helpers.registered import SIZES, decided_network, manifest_of, row_of

SHOWN = TestConfig(short_side=32, long_side_max=10_000)


class Colours(nn.Module):
    """Sees a red and a green thing (class 1) and what is black (class 0), whatever lies around."""

    def __init__(self) -> None:
        super().__init__()
        self.anything = nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, ...]] = []

    def forward(self, images: Tensor, *, auxiliary: bool) -> Prediction:
        self.seen.append(tuple(images.shape))
        mean, std = (torch.tensor(rgb).view(1, 3, 1, 1) for rgb in (MEAN_RGB, STD_RGB))
        rgb = nn.functional.avg_pool2d((images * std + mean) / 255, 4)
        masks = torch.stack([rgb[:, 0], rgb[:, 1], 1 - rgb.sum(1)], 1)
        probabilities = torch.tensor([[0.05, 0.9, 0.05], [0.04, 0.92, 0.04], [0.94, 0.03, 0.03]])
        return Prediction(probabilities.log().expand(len(images), 3, 3), 20 * (masks - 0.5))


def picture() -> np.ndarray:
    """32 x 96, black, with a red thing from 20 to 76 and a green one from 80 to 88."""
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[8:24, 20:76, 0] = 255
    pixels[4:28, 80:88, 1] = 255
    return pixels


def config_of(task: Task, **window: int) -> PredictConfig:
    test = dataclasses.replace(SHOWN, window=window or None)
    return PredictConfig(test=test, task=task, thing_ids=[1])


def predicted(task: Task, **window: int) -> Any:
    pixels = picture()
    config, model = config_of(task, **window), Colours()
    found = predict(
        model, network_image(pixels, config.test), (32, 96), config, original=torch.from_numpy(pixels).permute(2, 0, 1)
    )
    return found, model


@pytest.mark.parametrize("window", [{"size": 32, "overlap": 16}, {"size": 40, "overlap": 8}])
def test_a_network_that_looks_at_every_pixel_alone_sees_the_same_in_windows(window: dict[str, int]) -> None:
    (whole, model), (parts, windowed) = predicted("panoptic"), predicted("panoptic", **window)
    assert model.seen == [(1, 3, 32, 96)]
    assert len(windowed.seen) > 1
    if window["size"] == 32:  # no scaling, so that edges lie alike
        assert all(shape == (1, 3, 32, 32) for shape in windowed.seen)
        assert torch.equal(parts.labels, whole.labels)
        assert torch.equal(parts.segments.segments >= 0, whole.segments.segments >= 0)
    things = parts.segments.labels[parts.segments.is_thing]
    assert things.tolist() == [1, 1]  # the red one, over several windows, and the green one
    assert sorted(parts.segments.labels.tolist()) == sorted(whole.segments.labels.tolist())
    longest = [sorted(int(mask.any(0).sum()) for mask in found.instances.masks[:2]) for found in (whole, parts)]
    assert longest[0] == longest[1] == [8, 56]


def test_instances_over_several_windows_are_whole() -> None:
    found, _ = predicted("instance", size=32, overlap=16)
    sure = found.instances.scores > 0.5
    boxes = found.instances.boxes[sure].tolist()
    assert sorted(boxes)[-1][0] == 80 and [20, 8, 76, 24] in boxes


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_a_picture_that_fits_into_one_window_is_shown_whole(task: Task) -> None:
    (whole, _), (one, model) = predicted(task), predicted(task, size=96, overlap=16)
    assert model.seen == [(1, 3, 32, 96)]
    for name in ("labels", "segments", "instances"):
        expected, found = getattr(whole, name), getattr(one, name)
        if isinstance(expected, Tensor):
            assert torch.equal(found, expected)
        elif expected is not None:
            assert all(
                torch.equal(getattr(found, each.name), getattr(expected, each.name))
                for each in dataclasses.fields(expected)
            )


def test_every_window_is_counted() -> None:
    counted: list[int] = []
    predict_windows(Colours(), picture(), config_of("semantic", size=32, overlap=16), on_window=counted.append)
    assert counted == [5] * 5  # 0, 16, 32, 48, 64


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_a_row_is_evaluated_in_windows(task: Task, small_row: Row, storage: Path) -> None:
    row, manifest = row_of(task, small_row, window={"size": 64, "overlap": 16}), manifest_of(storage, sizes=SIZES[:3])
    network, shapes = decided_network(row), []
    network.register_forward_hook(lambda module, given, made: shapes.append(given[0].shape))
    found = measure(network, manifest, row)
    # 64 x 96: 2 windows; 67 x 101: 2 x 2; 150 x 33: 3
    assert len(shapes) == 9 and found.figures()[primary(task)] is not None
    assert "window" not in settings_facts(dataclasses.replace(row.test, window=None))


class Multiplies(nn.Module):
    """Gives the type of its products, and scores that are float32's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1))
        self.types: list[torch.dtype] = []

    def forward(self, images: Tensor, *, auxiliary: bool) -> Prediction:
        product = nn.functional.linear(images.flatten(1)[:, :1], self.weight)
        self.types.append(product.dtype)
        masks = torch.full((len(images), 2, images.shape[2] // 4, images.shape[3] // 4), 3.0)
        return Prediction(torch.tensor([[1.0, 1.001, -9.0], [1.0, 1.0, -9.0]]).expand(len(images), 2, 3), masks)


@pytest.mark.parametrize("window", [None, {"size": 32, "overlap": 16}])
@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_rows_precision_for_tests_is_the_networks_alone(
    precision: Any, dtype: torch.dtype, window: dict[str, int] | None
) -> None:
    # class 1 leads by a thousandth: in bf16 the two would be equal, and class 0 the first of them
    flip = MsFlipConfig(short_sides=(32,), long_side_max=96)
    test = dataclasses.replace(SHOWN, precision=precision, window=window, ms_flip=None if window else flip)
    config, model = PredictConfig(test=test, task="semantic", thing_ids=[]), Multiplies()
    original = torch.from_numpy(picture()).permute(2, 0, 1)
    found = predict(model, network_image(picture(), test), (32, 96), config, original=original)
    assert found.labels is not None and found.labels.unique().tolist() == [1]
    assert window or (found.ms_flip_labels is not None and found.ms_flip_labels.unique().tolist() == [1])
    assert set(model.types) == {dtype}
    alike = predict_batch(model, [network_image(picture(), test)] * 2, [(32, 96)] * 2, config)
    assert [each.labels.unique().tolist() for each in alike] == [[1], [1]] and set(model.types) == {dtype}
