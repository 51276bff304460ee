from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from m2f.metrics import PanopticMetric
from tests.helpers.pretend_gpu import PretendGpu

REFERENCE = Path(__file__).parents[1] / "reference"
NOTHING = {"pq": None, "sq": None, "rq": None}


def reference() -> dict[str, Any]:
    return json.loads((REFERENCE / "pq.json").read_text())


def reference_metric(images: range = range(6)) -> PanopticMetric:
    """The reference's pictures; classes are places in the list of things and then stuff."""
    described = reference()
    things = len(described["things"])
    classes = {category: i for i, category in enumerate(described["things"] + described["stuff"])}
    metric = PanopticMetric(num_classes=len(classes), thing_ids=range(things))
    with np.load(REFERENCE / "pq.npz") as arrays:
        for i in images:
            maps, labels = [], []
            for side in ("prediction", "truth"):
                segments = described["images"][i][side]
                place = {0: -1} | {segment["id"]: k for k, segment in enumerate(segments)}
                maps.append(np.vectorize(place.__getitem__)(arrays[f"{side}_{i}"]))
                labels.append([classes[segment["category_id"]] for segment in segments])
            crowd = [bool(segment["iscrowd"]) for segment in described["images"][i]["truth"]]
            metric.update(maps[0], labels[0], maps[1], labels[1], crowd=crowd)
    return metric


def one_row(text: str) -> np.ndarray:
    """A picture of one row: a digit is a segment, a dot is void."""
    return np.array([[-1 if letter == "." else int(letter) for letter in text]])


def counted(
    prediction: str, predicted_labels: list[int], truth: str, true_labels: list[int], *, crowd: list[bool] | None = None
) -> dict[int, tuple[int, int, int]]:
    """TP, FP and FN of the classes that have any; classes 0 and 1 are stuff, 2 and 3 things."""
    metric = PanopticMetric(num_classes=4, thing_ids=[2, 3])
    metric.update(one_row(prediction), predicted_labels, one_row(truth), true_labels, crowd=crowd)
    return {c: (tp, fp, fn) for c, (tp, fp, fn, _) in enumerate(metric.counts.tolist()) if tp + fp + fn}


def test_metrics_equal_the_official_evaluators():
    described = reference()
    expected, result = described["result"], reference_metric().result()
    for name, ours in (("all", result), ("things", result["things"]), ("stuff", result["stuff"])):
        assert [ours[key] for key in ("pq", "sq", "rq")] == pytest.approx(
            [expected[name][key] for key in ("pq", "sq", "rq")], abs=1e-12
        )
    per_class = result["per_class"]
    for c, category in enumerate(described["things"] + described["stuff"]):
        theirs = expected["per_class"].get(str(category), {"tp": 0, "fp": 0, "fn": 0, "iou": 0.0})
        counts = {key: per_class[key][c] for key in ("tp", "fp", "fn")}
        assert counts == {key: theirs[key] for key in ("tp", "fp", "fn")}
        assert (per_class["sq"][c] or 0) * counts["tp"] == pytest.approx(theirs["iou"], abs=1e-11)
        assert (per_class["pq"][c] is None) == (str(category) not in expected["per_class"])


def test_metrics_are_those_worked_out_by_hand():
    metric = PanopticMetric(num_classes=4, thing_ids=[2, 3])
    # class 0: 4 true, 3 predicted, all common; class 2: 4 true, 5 predicted, 4 common
    metric.update(one_row("00011111"), [0, 2], one_row("00001111"), [0, 2])
    # class 2: one more, missed; class 3: predicted once, never true
    metric.update(one_row("0000"), [3], one_row("0000"), [2])
    result = metric.result()
    assert result["per_class"] == {
        "pq": [pytest.approx(3 / 4), None, pytest.approx(4 / 5 / 1.5), 0.0],
        "sq": [pytest.approx(3 / 4), None, pytest.approx(4 / 5), 0.0],
        "rq": [1.0, None, pytest.approx(1 / 1.5), 0.0],
        "tp": [1, 0, 1, 0],
        "fp": [0, 0, 0, 1],
        "fn": [0, 0, 1, 0],
    }
    assert result["pq"] == pytest.approx((3 / 4 + 4 / 5 / 1.5 + 0) / 3)
    assert result["sq"] == pytest.approx((3 / 4 + 4 / 5 + 0) / 3)
    assert result["things"]["pq"] == pytest.approx((4 / 5 / 1.5 + 0) / 2)
    assert result["stuff"] == {"pq": pytest.approx(3 / 4), "sq": pytest.approx(3 / 4), "rq": 1.0}


def test_an_overlap_of_exactly_half_the_union_is_no_match():
    assert counted("00..", [0], "0000", [0]) == {0: (0, 1, 1)}
    assert counted("000.", [0], "0000", [0]) == {0: (1, 0, 0)}


def test_segments_of_different_classes_do_not_match():
    assert counted("0000", [2], "0000", [3]) == {2: (0, 1, 0), 3: (0, 0, 1)}


def test_void_truth_leaves_the_union():
    # of 5 predicted pixels 3 are void: IoU 2 / 2, not 2 / 5
    metric = PanopticMetric(num_classes=1, thing_ids=[])
    metric.update(one_row("00000"), [0], one_row("00..."), [0])
    assert metric.result()["per_class"]["sq"] == [1.0]


def test_a_prediction_mostly_on_void_is_not_wrong():
    assert counted("00000", [2], "00...", [3]) == {3: (0, 0, 1)}  # 3 of 5
    assert counted("0000", [2], "00..", [3]) == {2: (0, 1, 0), 3: (0, 0, 1)}  # exactly half


def test_a_crowd_is_neither_matched_nor_missed_and_excuses_its_class_only():
    assert counted("0000", [2], "0000", [2], crowd=[True]) == {}
    assert counted("0000", [3], "0000", [2], crowd=[True]) == {3: (0, 1, 0)}
    # 2 pixels on the crowd and 1 on void are over half of 5; 2 alone are not
    assert counted("00000", [2], "00.11", [2, 3], crowd=[True, False]) == {3: (0, 0, 1)}
    assert counted("00000", [2], "00111", [2, 3], crowd=[True, False]) == {2: (0, 1, 0), 3: (0, 0, 1)}
    # a crowd stays in the union: 2 / 4 is no match
    assert counted("0000", [2], "0011", [2, 2], crowd=[False, True]) == {2: (0, 1, 1)}


def test_of_two_crowds_of_a_class_the_last_one_excuses_as_in_the_official_evaluator():
    assert counted("0000", [2], "0001", [2, 2], crowd=[True, True]) == {2: (0, 1, 0)}
    assert counted("0000", [2], "0111", [2, 2], crowd=[True, True]) == {}


def test_a_true_segment_without_pixels_is_missed():
    assert counted("00", [2], "00", [2, 3]) == {2: (1, 0, 0), 3: (0, 0, 1)}


def test_a_picture_may_have_no_segments():
    assert counted("....", [], "0000", [2]) == {2: (0, 0, 1)}
    assert counted("0000", [2], "....", []) == {}
    assert counted("....", [], "....", []) == {}


@pytest.mark.parametrize("cut", [0, 1, 4])
def test_merged_parts_equal_the_whole_exactly_in_any_order(cut):
    whole, first, second = reference_metric(), reference_metric(range(cut)), reference_metric(range(cut, 6))
    second.merge(first)
    assert torch.equal(second.counts, whole.counts)
    assert second.result() == whole.result()
    again = PanopticMetric(num_classes=133, thing_ids=range(80), counts=first.counts + reference_metric().counts)
    again.counts -= first.counts
    assert again.result() == whole.result()


def test_a_state_in_json_and_back_is_the_same_metric_to_the_last_bit():
    whole, again = reference_metric(), reference_metric(range(2, 6))
    again.add_state(json.loads(json.dumps(reference_metric(range(2)).state())))
    assert torch.equal(again.counts, whole.counts) and again.result() == whole.result()
    with pytest.raises(ValueError, match="counts must be int64 of shape"):
        PanopticMetric(num_classes=3, thing_ids=[]).add_state(whole.state())


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, torch.uint8, torch.int32])
def test_any_integer_type_counts_alike_and_values_that_are_no_segment_are_void(dtype):
    truth, prediction = one_row("0011.."), one_row("00.111")
    truth[truth < 0] = 255
    prediction[prediction < 0] = 200
    if isinstance(dtype, torch.dtype):
        truth, prediction = (torch.from_numpy(x).to(dtype) for x in (truth, prediction))
    else:
        truth, prediction = (x.astype(dtype) for x in (truth, prediction))
    metric = PanopticMetric(num_classes=3, thing_ids=[2])
    metric.update(prediction, torch.tensor([0, 2]), truth, np.array([0, 2]))
    # class 2: 3 predicted, 2 of them on void, 2 true, 1 common: 1 / 2 is no match; 2 of 3 on void is not wrong
    assert metric.counts[:, :3].tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 1]]


def test_nothing_counted_gives_none_and_not_nan():
    result = PanopticMetric(num_classes=2, thing_ids=[1]).result()
    assert result == {
        **NOTHING,
        "things": NOTHING,
        "stuff": NOTHING,
        "per_class": {key: [None, None] for key in ("pq", "sq", "rq")} | {key: [0, 0] for key in ("tp", "fp", "fn")},
    }


@pytest.mark.parametrize(
    ("prediction", "predicted_labels", "truth", "true_labels", "crowd", "message"),
    [
        ([[0]], [0], [[0, 0]], [0], None, r"must have one shape \(H, W\), got \(1, 1\) and \(1, 2\)"),
        ([0], [0], [0], [0], None, r"must have one shape \(H, W\), got \(1,\) and \(1,\)"),
        ([[0.0]], [0], [[0]], [0], None, "prediction must hold integers, got float64"),
        ([[0]], [3], [[0]], [0], None, "predicted_labels: 3 is outside the classes 0 to 2"),
        ([[0]], [0], [[0]], [-1], None, "true_labels: -1 is outside the classes 0 to 2"),
        ([[0]], [[0]], [[0]], [0], None, r"predicted_labels must hold one class per segment, got shape \(1, 1\)"),
        ([[0]], [0, 1], [[0]], [0], None, "predicted segment 1 of 2 has no pixels"),
        ([[0]], [0], [[0]], [0], [True, False], "crowd must hold one flag for each of 1 true segments, got 2"),
    ],
)
def test_wrong_values_are_refused_and_nothing_is_counted(
    prediction, predicted_labels, truth, true_labels, crowd, message
):
    metric = PanopticMetric(num_classes=3, thing_ids=[2])
    with pytest.raises(ValueError, match=message):
        metric.update(np.array(prediction), predicted_labels, np.array(truth), true_labels, crowd=crowd)
    assert metric.counts.sum() == 0


def test_metrics_of_other_classes_and_wrong_states_are_refused():
    with pytest.raises(
        ValueError, match=r"of 3 classes with the things \[2\] into one of 3 classes with the things \["
    ):
        PanopticMetric(num_classes=3, thing_ids=[1]).merge(PanopticMetric(num_classes=3, thing_ids=[2]))
    with pytest.raises(ValueError, match=r"must be int64 of shape \(2, 4\), got torch.float32 of shape \(2, 3\)"):
        PanopticMetric(num_classes=2, thing_ids=[], counts=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="thing_ids names 2, which is outside the classes 0 to 1"):
        PanopticMetric(num_classes=2, thing_ids=[0, 2])


def scene(rng: np.random.Generator) -> tuple[np.ndarray, list[int]]:
    """Overlapping boxes on 40 x 60 pixels, (segment map with -1 for void, class of every segment): stuff 0 to 2, each
    at most once, and things 3 to 5."""
    segments = np.full((40, 60), -1)
    labels: list[int] = []
    for label in [*rng.permutation(3)[:2].tolist(), *rng.integers(3, 6, 6).tolist()]:
        top, left = rng.integers(0, 30), rng.integers(0, 45)
        segments[top : top + rng.integers(5, 25), left : left + rng.integers(5, 40)] = len(labels)
        labels.append(label)
    return segments, labels


def test_metrics_equal_those_of_torchmetrics_on_random_pictures():
    from torchmetrics.detection import PanopticQuality

    rng = np.random.default_rng(4)
    theirs = PanopticQuality(
        things={3, 4, 5}, stuffs={0, 1, 2}, allow_unknown_preds_category=True, return_per_class=True
    )
    ours = PanopticMetric(num_classes=6, thing_ids=[3, 4, 5])
    for _ in range(20):
        truth, labels = scene(rng)
        found = np.roll(truth, rng.integers(-3, 4), axis=1)  # shifted by a little, one segment mistaken, one forgotten
        guessed = list(labels)
        guessed[-1] = int(rng.integers(3, 6))
        found[found == 2] = 3
        found[found < 0] = 0  # they also forgive what the prediction leaves void, which the official evaluator does not
        maps = []
        for segments, class_ids in ((found, guessed), (truth, labels)):
            # torchmetrics takes (category, instance) at every pixel; category 99 is unknown to it, that is void
            category = np.where(segments < 0, 99, np.array(class_ids)[segments])
            maps.append(torch.from_numpy(np.stack((category, np.where(category < 3, 0, segments)), -1))[None])
        theirs.update(*maps)
        seen = [s for s in range(len(labels)) if (found == s).any()]
        place = {old: new for new, old in enumerate(seen)} | {-1: -1}
        shown = [s for s in range(len(labels)) if (truth == s).any()]  # they know no segment without pixels
        true_place = {old: new for new, old in enumerate(shown)} | {-1: -1}
        ours.update(
            np.vectorize(place.__getitem__)(found),
            [guessed[s] for s in seen],
            np.vectorize(true_place.__getitem__)(truth),
            [labels[s] for s in shown],
        )
    expected, result = theirs.compute()[0].tolist(), ours.result()
    in_their_order = [3, 4, 5, 0, 1, 2]
    assert [result["per_class"]["pq"][c] for c in in_their_order] == pytest.approx(expected, abs=1e-6)
    assert 0.2 < result["pq"] < 0.95 and sum(result["per_class"]["fp"]) > 5 and sum(result["per_class"]["fn"]) > 5


def test_a_picture_is_counted_on_the_gpu_of_the_prediction_and_the_host_waits_once():
    prediction, truth = torch.tensor([[0, 0, 1, 1, -1]]), torch.tensor([[1, 1, 1, 0, -1]])
    expected = PanopticMetric(num_classes=4, thing_ids=[2, 3])
    expected.update(prediction, [2, 0], truth, [0, 2], crowd=[False, False])
    # thing: 2 of 3 pixels; stuff: 1 of 2, which is not over a half
    assert expected.counts[:, :3].tolist() == [[0, 1, 1], [0, 0, 0], [1, 0, 0], [0, 0, 0]]
    with PretendGpu() as gpu:
        metric = PanopticMetric(num_classes=4, thing_ids=[2, 3])
        there, labels = gpu.put(prediction.int()), gpu.put(torch.tensor([2, 0]))
        true_labels, crowd = torch.tensor([0, 2]), torch.tensor([False, False])
        _, waits = gpu.waits_of(lambda: metric.update(there, labels, truth.byte(), true_labels, crowd=crowd))
        assert waits == ["copy to the host"]
        assert torch.equal(metric.counts, expected.counts)
