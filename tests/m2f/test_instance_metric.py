from __future__ import annotations

import contextlib
import io
import json
import pickle
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch

from m2f.metrics import InstanceMetric, instance
from m2f.metrics.instance import run_lengths
from tests.helpers.pretend_gpu import PretendGpu
from tests.helpers.shared import PROJECT


def box(rows: tuple[int, int], columns: tuple[int, int], size: tuple[int, int] = (10, 10)) -> torch.Tensor:
    """A mask of one rectangle; ends are outside."""
    mask = torch.zeros(size, dtype=torch.bool)
    mask[slice(*rows), slice(*columns)] = True
    return mask


LEFT, RIGHT = box((0, 10), (0, 5)), box((0, 10), (5, 10))
CORNER = box((0, 3), (0, 10))


def result_of(
    masks: list[torch.Tensor],
    scores: list[float],
    true_masks: list[torch.Tensor],
    **settings: Any,
) -> dict[str, Any]:
    """One picture of one class."""
    metric = InstanceMetric(num_classes=1)
    stacked, true = (torch.stack(m) if m else torch.zeros(0, 10, 10, dtype=torch.bool) for m in (masks, true_masks))
    metric.update(stacked, [0] * len(masks), scores, true, [0] * len(true_masks), image_id=1, **settings)
    return metric.result()


def random_image(seed: int) -> dict[str, Any]:
    """Blobs of several sizes, half of the predictions close to a true one; ties among the scores."""
    generator = np.random.default_rng(seed)

    def blobs(count: int) -> np.ndarray:
        masks = np.zeros((count, 180, 200), dtype=bool)
        for mask in masks:
            y, x = generator.integers(0, 100, 2)
            height, width = generator.integers(8, 180, 2)
            mask[y : y + height, x : x + width] = True
        return masks

    true = blobs(6)
    near = np.roll(true[:4], generator.integers(0, 5), axis=2)
    masks = np.concatenate((near, blobs(4)))
    labels = generator.integers(0, 3, 6)
    return {
        "masks": masks,
        "labels": np.concatenate((labels[:4], generator.integers(0, 3, 4))),
        "scores": generator.integers(1, 20, 8) / 20,
        "true_masks": true,
        "true_labels": labels,
        "crowd": generator.random(6) < 0.2,
    }


def counted(images: Iterable[int]) -> InstanceMetric:
    metric = InstanceMetric(num_classes=4)
    for image_id in images:
        metric.update(**random_image(image_id), image_id=image_id)
    return metric


def test_a_perfect_prediction_has_ap_1():
    result = result_of([LEFT, RIGHT], [0.9, 0.1], [RIGHT, LEFT])
    assert result["ap"] == result["ap50"] == result["ap75"] == result["ap_small"] == pytest.approx(1)
    assert result["per_class"] == [pytest.approx(1)]
    assert result["ap_medium"] is None
    assert result["ap_large"] is None


def test_a_wrong_prediction_between_two_right_ones_costs_what_was_worked_out_by_hand():
    # right, wrong, right: precision 1 up to recall 1/2 (51 of the 101 recalls from 0 to 1), then 2/3
    result = result_of([LEFT, CORNER, RIGHT], [0.9, 0.8, 0.7], [LEFT, RIGHT])
    assert result["ap"] == pytest.approx((51 * 1 + 50 * 2 / 3) / 101)


def test_the_thresholds_of_iou_are_those_of_coco():
    # 36 of 50 pixels: IoU 0.72 passes 0.5, 0.55, 0.6, 0.65 and 0.7 of ten thresholds
    part = LEFT & (torch.arange(100).view(10, 10).T < 36)
    assert part.sum() == 36
    result = result_of([part], [0.5], [LEFT])
    assert (result["ap"], result["ap50"], result["ap75"]) == (pytest.approx(0.5), pytest.approx(1), 0)


def test_a_missed_instance_bounds_recall():
    # recall stops at 1/2: 51 of 101 recalls have precision 1
    assert result_of([LEFT], [0.9], [LEFT, RIGHT])["ap"] == pytest.approx(51 / 101)
    assert result_of([], [], [LEFT])["ap"] == 0


def test_predictions_on_a_crowd_do_not_count():
    inside = box((0, 4), (6, 9))
    with_crowd = result_of([inside, LEFT], [0.9, 0.5], [LEFT, RIGHT], crowd=[False, True])
    without = result_of([inside, LEFT], [0.9, 0.5], [LEFT, RIGHT])
    assert with_crowd["ap"] == pytest.approx(1)
    assert without["ap"] == pytest.approx(51 / 101 / 2)  # wrong, right: precision 1/2 up to recall 1/2


def test_sizes_go_by_the_annotated_area_where_there_is_one():
    small = result_of([LEFT], [0.9], [LEFT])
    medium = result_of([LEFT], [0.9], [LEFT], true_areas=[32 * 32 + 1])
    assert (small["ap_small"], small["ap_medium"]) == (pytest.approx(1), None)
    assert (medium["ap_small"], medium["ap_medium"]) == (None, pytest.approx(1))


def test_classes_are_averaged_and_those_without_true_instances_left_out():
    metric = InstanceMetric(num_classes=3)
    metric.update(torch.stack((LEFT, RIGHT)), [0, 2], [0.9, 0.9], torch.stack((LEFT, RIGHT)), [0, 1], image_id=7)
    result = metric.result()
    assert result["per_class"] == [pytest.approx(1), 0, None]
    assert result["ap"] == pytest.approx(1 / 2)


def test_only_the_best_predictions_of_a_picture_and_class_count():
    metric = InstanceMetric(num_classes=1, max_instances=1)
    metric.update(torch.stack((LEFT, RIGHT)), [0, 0], [0.9, 0.8], torch.stack((LEFT, RIGHT)), [0, 0], image_id=1)
    assert metric.result()["ap"] == pytest.approx(51 / 101)


def test_metrics_equal_those_of_pycocotools_own_files_and_summary():
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, predictions, images = [], [], []
    for image_id in range(6):
        image = random_image(image_id)
        images.append({"id": image_id, "height": 180, "width": 200})
        for mask, label, crowd in zip(image["true_masks"], image["true_labels"], image["crowd"], strict=True):
            annotation = {"image_id": image_id, "category_id": int(label), "segmentation": run_lengths(mask[None])[0]}
            truth.append({**annotation, "id": len(truth) + 1, "iscrowd": int(crowd), "area": int(mask.sum())})
        for mask, label, score in zip(image["masks"], image["labels"], image["scores"], strict=True):
            annotation = {"image_id": image_id, "category_id": int(label), "segmentation": run_lengths(mask[None])[0]}
            predictions.append({**annotation, "score": float(score)})
    with contextlib.redirect_stdout(io.StringIO()):
        true = COCO()
        true.dataset = {"images": images, "annotations": truth, "categories": [{"id": c} for c in range(4)]}
        true.createIndex()
        evaluation = COCOeval(true, true.loadRes(predictions), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    result = counted(range(6)).result()
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    expected = [None if value < 0 else value for value in evaluation.stats[:6]]
    assert [result[name] for name in names] == expected
    assert all(value is not None and 0.05 < value < 0.95 for value in expected)  # the pictures are worth comparing


@pytest.mark.parametrize("cut", [0, 1, 3])
def test_merged_parts_equal_the_whole_exactly_in_any_order(cut):
    whole, first, second = counted(range(6)), counted(range(cut)), counted(reversed(range(cut, 6)))
    second.merge(pickle.loads(pickle.dumps(first)))  # as it comes from another worker
    assert len(second) == len(whole) == 6
    assert second.result() == whole.result()


def test_a_state_in_json_and_back_is_the_same_metric_to_the_last_bit():
    whole, again, first = counted(range(6)), counted(range(2, 6)), counted(range(2))
    again.add_state(json.loads(json.dumps(first.state())))
    assert len(again) == 6 and again.result() == whole.result()
    assert again.state()["images"][4:] == first.state()["images"]
    with pytest.raises(ValueError, match="cannot merge: both metrics hold image 0"):
        again.add_state(first.state())


def test_masks_and_their_run_lengths_count_alike_and_results_can_be_asked_for_twice():
    dense, lengths = InstanceMetric(num_classes=4), InstanceMetric(num_classes=4)
    image = random_image(0)
    dense.update(**image, image_id=0)
    runs = {name: run_lengths(torch.from_numpy(image[name])) for name in ("masks", "true_masks")}
    lengths.update(**image | runs, image_id=0)
    assert dense.result() == lengths.result() == lengths.result()


def test_nothing_counted_gives_none_and_no_print(capfd):
    empty = InstanceMetric(num_classes=1)
    nothing_true = InstanceMetric(num_classes=1)
    nothing_true.update([], [], [], [], [], image_id=1, size=(4, 4))
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    for metric in (empty, nothing_true):
        assert metric.result() == dict.fromkeys(names) | {"per_class": [None]}
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"labels": [2]}, "predicted label 2 of image 1 is outside the classes 0 to 1"),
        ({"true_labels": [-1]}, "true label -1 of image 1 is outside the classes 0 to 1"),
        ({"scores": [0.5, 0.5]}, r"image 1 has 1 predicted masks, but \{'score': 2\}"),
        ({"crowd": []}, r"image 1 has 1 true masks, but \{'iscrowd': 0\}"),
        ({"scores": [float("nan")]}, "scores of image 1 are not all finite"),
        ({"masks": LEFT[None, :5]}, r"must have one size, got \[\(5, 10\), \(10, 10\)\]"),
        ({"size": (10, 9)}, r"must have one size, got \[\(10, 9\), \(10, 10\)\]"),
        ({"masks": LEFT[None].float()}, r"must be bool of shape \(N, H, W\), got float32 of shape \(1, 10, 10\)"),
        ({"true_masks": [{"size": [10, 10], "counts": [50, 50]}]}, "or a list of compressed run lengths"),
        ({"masks": [], "labels": [], "scores": [], "true_masks": [], "true_labels": []}, "one size, got none"),
        ({"image_id": 0}, "image 0 was added before"),
    ],
)
def test_wrong_values_are_refused_and_the_picture_is_not_kept(changed, message):
    metric = InstanceMetric(num_classes=2)
    image = {
        "masks": LEFT[None],
        "labels": [0],
        "scores": [0.5],
        "true_masks": LEFT[None],
        "true_labels": [0],
        "image_id": 1,
    }
    metric.update(**image | {"image_id": 0})
    with pytest.raises(ValueError, match=message):
        metric.update(**image | changed)
    assert len(metric) == 1


def test_metrics_of_other_classes_or_with_the_same_picture_are_refused():
    with pytest.raises(ValueError, match="of 3 classes and 100 instances into one of 4 classes and 100 instances"):
        counted([]).merge(InstanceMetric(num_classes=3))
    with pytest.raises(ValueError, match=r"both metrics hold image 2 \(2 in all\)"):
        counted([1, 2, 3]).merge(counted([3, 2]))


def test_metrics_and_network_are_imported_without_pycocotools_and_torchvision():
    code = "import sys, m2f.metrics, m2f.model; print({'pycocotools', 'torchvision'} & {*sys.modules} or False)"
    answer = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert answer.stdout == "False\n"


@pytest.mark.parametrize("part", [1, 3 * 10 * 10, 1 << 28])
def test_run_lengths_made_on_a_gpu_are_those_of_the_host(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instance, "_PART", part)
    generator = torch.Generator().manual_seed(0)
    empty, full = torch.zeros(10, 10, dtype=torch.bool), torch.ones(10, 10, dtype=torch.bool)
    # columns 0 to 4: 50 pixels, with pixel 0 inside; and a mask that ends where the next begins
    masks = torch.stack([LEFT, empty, RIGHT, LEFT, full, full, CORNER, torch.rand(10, 10, generator=generator) > 0.5])
    expected = run_lengths(masks)
    for dtype in (torch.bool, torch.uint8):
        with PretendGpu() as gpu:
            found = run_lengths(gpu.put(masks.to(dtype)))
        assert found == expected
    with PretendGpu() as gpu:
        assert run_lengths(gpu.put(masks[:0])) == []


def test_instances_of_a_picture_make_the_host_wait_for_a_gpu_three_times() -> None:
    picture = {"true_masks": LEFT[None], "true_labels": [0], "image_id": 1}
    masks, labels, scores = torch.stack([LEFT, CORNER, RIGHT]), torch.tensor([0, 0, 0]), torch.tensor([0.9, 0.7, 0.1])
    expected, metric = InstanceMetric(num_classes=1), InstanceMetric(num_classes=1)
    expected.update(masks, labels, scores, **picture)
    with PretendGpu() as gpu:
        predicted = [gpu.put(tensor) for tensor in (masks, labels, scores)]
        _, waits = gpu.waits_of(lambda: metric.update(*predicted, **picture))
    # the masks' run lengths: how many, and where; then labels and scores together
    assert waits == ["aten.nonzero.default", "copy to the host", "copy to the host"]
    assert metric.state() == expected.state()
