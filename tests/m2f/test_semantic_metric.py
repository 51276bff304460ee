from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from m2f.metrics import SemanticMetric
from tests.helpers.pretend_gpu import GpuTensor, PretendGpu

REFERENCE = Path(__file__).parents[1] / "reference"


def reference_images() -> tuple[np.ndarray, np.ndarray]:
    with np.load(REFERENCE / "miou.npz") as arrays:
        return arrays["prediction"], arrays["label"]


def counted(*images: tuple[object, object], num_classes: int = 19, **settings: int) -> SemanticMetric:
    metric = SemanticMetric(num_classes=num_classes, **settings)
    for prediction, label in images:
        metric.update(prediction, label)
    return metric


def test_metrics_equal_the_reference_implementations():
    expected = json.loads((REFERENCE / "miou.json").read_text())
    result = counted(*zip(*reference_images(), strict=True)).result()
    assert result["miou"] == pytest.approx(expected["mIoU"], abs=1e-6)
    assert result["mean_accuracy"] == pytest.approx(expected["mAcc"], abs=1e-6)
    assert result["pixel_accuracy"] == pytest.approx(expected["aAcc"], abs=1e-6)
    for ours, theirs in (("iou", "IoU"), ("accuracy", "Acc"), ("dice", "Dice")):
        values = result["per_class"][ours]
        assert [v is None for v in values] == [v is None for v in expected[theirs]]
        assert [v or 0 for v in values] == pytest.approx([v or 0 for v in expected[theirs]], abs=1e-6)


def test_metrics_are_those_worked_out_by_hand():
    metric = counted(([[0, 0, 1, 2, 9]], [[0, 0, 0, 255, 255]]), ([1, 2], [1, 1]), num_classes=4)
    assert metric.confusion.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    result = metric.result()
    # class 0: both 2, true 3, predicted 2; class 1: both 1, true 2, predicted 2; class 2: predicted once, never true;
    # class 3: neither
    assert result["per_class"]["iou"] == [2 / 3, 1 / 3, 0.0, None]
    assert result["per_class"]["accuracy"] == [2 / 3, 1 / 2, None, None]
    assert result["per_class"]["dice"] == [4 / 5, 2 / 4, 0.0, None]
    assert result["miou"] == pytest.approx((2 / 3 + 1 / 3 + 0) / 3)
    assert result["mean_accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert result["pixel_accuracy"] == 3 / 5


@pytest.mark.parametrize("cut", [0, 1, 3])
def test_merged_parts_equal_the_whole_exactly(cut):
    images = list(zip(*reference_images(), strict=True))
    whole, first, second = counted(*images), counted(*images[:cut]), counted(*images[cut:])
    first.merge(second)
    assert torch.equal(first.confusion, whole.confusion)
    assert first.result() == whole.result()
    again = SemanticMetric(num_classes=19, confusion=whole.confusion)
    assert again.result() == whole.result()


def test_a_state_in_json_and_back_is_the_same_metric_to_the_last_bit():
    images = list(zip(*reference_images(), strict=True))
    whole, first, again = counted(*images), counted(*images[:2]), counted(*images[2:])
    again.add_state(json.loads(json.dumps(first.state())))
    assert torch.equal(again.confusion, whole.confusion)
    with pytest.raises(ValueError, match="confusion must be int64 of shape"):
        SemanticMetric(num_classes=3).add_state(first.state())


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64, torch.uint8, torch.int32])
def test_any_integer_type_and_shape_counts_alike(dtype):
    prediction, label = reference_images()
    if isinstance(dtype, torch.dtype):
        converted = [torch.from_numpy(x).to(dtype) for x in (prediction, label)]
    else:
        converted = [x.astype(dtype)[:, ::-1, ::-1] for x in (prediction, label)]  # negative strides
    assert torch.equal(counted(tuple(converted)).confusion, counted((prediction.ravel(), label.ravel())).confusion)


def test_the_ignore_label_is_a_setting_and_may_be_a_class_id():
    metric = counted((np.array([0, 1, 1]), np.array([0, 1, 0])), num_classes=2, ignore_label=0)
    assert metric.confusion.tolist() == [[0, 0], [0, 1]]


def test_nothing_counted_gives_none_and_not_nan():
    for metric in (SemanticMetric(num_classes=2), counted((np.array([7, 7]), np.array([255, 255])), num_classes=2)):
        assert metric.result() == {
            "miou": None,
            "mean_accuracy": None,
            "pixel_accuracy": None,
            "per_class": {"iou": [None, None], "accuracy": [None, None], "dice": [None, None]},
        }


@pytest.mark.parametrize(
    ("prediction", "label", "message"),
    [
        ([3, 0, 3], [1, 1, 255], r"prediction 3 is outside the classes 0 to 2 \(1 of 2 pixels that count\)"),
        ([-1], [0], "prediction -1 is outside the classes"),
        ([0, 0], [7, 0], r"label 7 is outside the classes 0 to 2 \(1 of 2"),
        ([0, 0], [0], r"must have one shape, got \(2,\) and \(1,\)"),
        ([0.5], [0], "prediction must hold integers, got float64"),
        ([0], [True], "label must hold integers, got bool"),
    ],
)
def test_wrong_values_are_refused_and_nothing_is_counted(prediction, label, message):
    metric = SemanticMetric(num_classes=3)
    with pytest.raises(ValueError, match=message):
        metric.update(np.array(prediction), np.array(label))
    assert metric.confusion.sum() == 0


def test_metrics_of_other_classes_and_wrong_states_are_refused():
    with pytest.raises(ValueError, match="cannot merge a metric of 3 classes ignoring 255 into one of 2 classes"):
        SemanticMetric(num_classes=2).merge(SemanticMetric(num_classes=3))
    with pytest.raises(ValueError, match=r"must be int64 of shape \(2, 2\), got torch.float32 of shape \(2, 3\)"):
        SemanticMetric(num_classes=2, confusion=torch.zeros(2, 3))


def test_pictures_are_counted_on_the_gpu_of_the_predictions_and_the_host_waits_once_for_each():
    images = [tuple(map(torch.from_numpy, image)) for image in zip(*reference_images(), strict=True)]
    with PretendGpu() as gpu:
        metric = SemanticMetric(num_classes=19)
        for prediction, label in images:
            there = gpu.put(prediction)
            _, waits = gpu.waits_of(lambda there=there, label=label: metric.update(there, label))
            assert waits == ["aten._local_scalar_dense.default"]
        assert isinstance(metric.confusion, GpuTensor)
        assert torch.equal(metric.confusion.cpu(), counted(*images).confusion)
        assert metric.result() == counted(*images).result()
        sent = pickle.loads(pickle.dumps(metric))
        assert type(sent.confusion) is torch.Tensor
        metric.merge(sent)
        assert metric.confusion.tolist() == (2 * sent.confusion).tolist()


def test_wrong_values_on_a_gpu_are_refused_and_nothing_is_counted():
    with PretendGpu() as gpu:
        metric = SemanticMetric(num_classes=3)
        with pytest.raises(ValueError, match=r"prediction 3 is outside the classes 0 to 2 \(1 of 2"):
            metric.update(gpu.put(torch.tensor([3, 0, 3])), torch.tensor([1, 1, 255]))
        assert metric.confusion.sum() == 0
