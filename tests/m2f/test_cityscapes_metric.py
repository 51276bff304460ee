from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from m2f.metrics import CityscapesInstanceMetric
from pipeline.data.datasets import cityscapes
from pipeline.params.class_names import CLASS_NAMES
from pipeline.params.schema import DatasetConfig
from tests.helpers.cityscapes_files import instance_ids, predictions
from tests.helpers.images import encoded, image, put

IMAGES = 6
CLASSES = CLASS_NAMES["cityscapes"]


def labelled(ids: np.ndarray, folder: Path) -> Any:
    """A picture with these instance ids, as the layout reads it."""
    for top, file, pixels in (
        ("leftImg8bit", "_leftImg8bit.png", image(*ids.shape)),
        ("gtFine", "_gtFine_instanceIds.png", ids),
    ):
        put(folder / top / f"val/ulm/ulm_000000_000019{file}", encoded(pixels))
    config = DatasetConfig(layout="cityscapes", class_names=CLASSES, thing_classes=CLASSES[11:], splits={"val": "val"})
    (record,) = cityscapes.records(config, [folder], "val")
    return record.read()


def counted(images: range, folder: Path) -> CityscapesInstanceMetric:
    """The metric over some images of the 19 classes, where stuff is no instance."""
    metric = CityscapesInstanceMetric(num_classes=19)
    for number in images:
        ids = instance_ids(number)
        truth = labelled(ids, folder)
        of_things = [class_id if class_id >= 11 else -1 for class_id in truth.segment_classes]
        masks, labels, scores = predictions(ids, number)
        metric.update(
            masks,
            labels,
            scores,
            truth.segments,
            of_things,
            image_id=number,
            crowd=truth.segment_crowd or None,
            of_no_class=None if truth.label_map is None else truth.label_map == len(CLASSES),
        )
    return metric


RECORDED = {
    "ap": 0.12166543490030246,
    "ap50": 0.2564379039998914,
    "person": 0.09602761018774666,
    "car": 0.10071283724692814,
    "bus": 0.14992570627194124,
    "bicycle": 0.13999558589459382,
}
"""What cityscapesScripts 2.3.0 gives for these images (the last test)."""


def test_it_gives_what_cityscapesscripts_gave(tmp_path: Path) -> None:
    result = counted(range(IMAGES), tmp_path).result()
    assert (result["ap"], result["ap50"]) == pytest.approx((RECORDED["ap"], RECORDED["ap50"]), abs=1e-12)
    by_name = dict(zip(CLASSES, result["per_class"], strict=True))
    for name, ap in by_name.items():
        assert ap == (pytest.approx(RECORDED[name], abs=1e-12) if name in RECORDED else None), name


# Hand-sized: strips of a 20 x 40 image. A has 200 pixels, B 100, C 80; then a column of void, a group, stuff, and void

A, B, C, GROUP, STUFF = range(5)
TRUTH = np.full((20, 40), 255, np.uint8)
TRUTH[:, :10], TRUTH[:, 10:15], TRUTH[:, 15:19] = A, B, C
TRUTH[:, 20:30], TRUTH[:, 30:35] = GROUP, STUFF
ONE_CLASS, CROWD = [0, 0, 0, 0, -1], [False, False, False, True, False]


def strip(first: int, last: int) -> np.ndarray:
    """The mask of whole columns, `last` outside."""
    mask = np.zeros(TRUTH.shape, bool)
    mask[:, first:last] = True
    return mask


def result_of(*predicted: tuple[np.ndarray, float], **settings: Any) -> dict[str, Any]:
    metric = CityscapesInstanceMetric(num_classes=1)
    masks = np.stack([mask for mask, _ in predicted]) if predicted else np.zeros((0, *TRUTH.shape), bool)
    scores = [score for _, score in predicted]
    metric.update(masks, [0] * len(scores), scores, TRUTH, ONE_CLASS, image_id=0, crowd=CROWD, **settings)
    return dict(metric.result())


def test_objects_of_fewer_than_100_pixels_are_neither_missed_nor_wrong() -> None:
    # A and B are found, C need not be; whoever finds it is not wrong
    assert result_of((strip(0, 10), 0.9), (strip(10, 15), 0.8))["ap"] == 1
    assert result_of((strip(0, 10), 0.9), (strip(10, 15), 0.8), (strip(15, 19), 1.0))["ap"] == 1


def test_the_curve_is_summed_step_by_step() -> None:
    # a prediction on stuff alone comes first: precision at its score 0/1, then 1/2 and 2/3 with recall 1/2 and 1.
    # From the last score to the first: precision 2/3, 1/2, 0 and the 1 that is added, with recall 1, 1/2, 0 and 0;
    # half the way between the neighbours: (1 - 1/2)/2, (1 - 0)/2, (1/2 - 0)/2, 0
    result = result_of((strip(30, 35), 0.9), (strip(0, 10), 0.8), (strip(10, 15), 0.7))
    assert result["ap50"] == pytest.approx(2 / 3 / 4 + 1 / 2 / 2)


def test_a_second_prediction_of_the_same_object_is_wrong() -> None:
    # columns 1 to 10 are A but for one: IoU 0.9, under 0.95 only. At 0.5: scores 0.9 right, 0.8 wrong, B missed.
    # From the last score: precision 1/2 and 1, then the 1 that is added; recall 1/2, 1/2, 0; ways 0, 1/4, 1/4
    assert result_of((strip(0, 10), 0.9), (strip(1, 10), 0.8))["ap50"] == pytest.approx(1 / 4 + 1 / 4)


@pytest.mark.parametrize(("first", "last", "excused"), [(35, 40, True), (20, 30, True), (19, 24, True), (30, 40, True),
                                                        (30, 36, False)])  # fmt: skip
def test_a_prediction_with_more_than_the_threshold_on_void_or_a_group_is_not_wrong(
    first: int, last: int, excused: bool
) -> None:
    # 30 to 40 lies half on void: wrong at 0.5, where half is not more, and at no threshold above
    found = ((strip(0, 10), 0.5), (strip(10, 15), 0.5))
    result = result_of(*found, (strip(first, last), 0.9))
    assert (result["ap50"] == 1) == (excused and (first, last) != (30, 40))


def test_an_object_of_no_class_excuses_nothing() -> None:
    found = ((strip(0, 10), 0.5), (strip(10, 15), 0.5), (strip(35, 40), 0.9))
    assert result_of(*found)["ap"] == 1
    assert result_of(*found, of_no_class=strip(35, 40))["ap"] < 1


def test_an_iou_of_exactly_the_threshold_is_no_match() -> None:
    assert result_of((strip(0, 5), 0.9))["ap50"] == 0  # 100 of 200 pixels
    assert result_of((strip(0, 6), 0.9))["ap50"] > 0


def test_without_predictions_ap_is_0_and_without_objects_there_is_none() -> None:
    assert result_of()["ap"] == result_of((strip(0, 0), 0.9))["ap"] == 0
    assert result_of((strip(35, 40), 0.9))["ap"] == 0  # only excused ones, at which cityscapesScripts stops
    nothing = CityscapesInstanceMetric(num_classes=2)
    nothing.update(strip(0, 10)[None], [1], [0.5], TRUTH, ONE_CLASS, image_id=0, crowd=CROWD)
    assert nothing.result()["per_class"] == [0, None]
    assert CityscapesInstanceMetric(num_classes=2).result()["ap"] is None


@pytest.mark.parametrize("cut", [1, 4])
def test_merged_parts_equal_the_whole_exactly_in_any_order(cut: int, tmp_path: Path) -> None:
    whole, first, rest = (counted(part, tmp_path) for part in (range(IMAGES), range(cut), range(cut, IMAGES)))
    rest.merge(first)
    assert rest.result() == whole.result()
    again = CityscapesInstanceMetric(num_classes=19)
    again.add_state(json.loads(json.dumps(whole.state())))
    assert again.result() == whole.result()
    assert dict(again.alone()) == dict(whole.alone())


def test_masks_may_be_tensors_and_truth_of_any_integer_type() -> None:
    metric = CityscapesInstanceMetric(num_classes=1)
    truth = torch.from_numpy(np.where(TRUTH == 255, -1, TRUTH.astype(np.int32)))
    metric.update(
        torch.from_numpy(strip(0, 10)[None]), torch.tensor([0]), torch.tensor([0.9]), truth,
        torch.tensor(ONE_CLASS), image_id=0, crowd=torch.tensor(CROWD),
    )  # fmt: skip
    assert metric.result() == result_of((strip(0, 10), 0.9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": [1]}, "predicted label 1 of image 7 is outside the classes 0 to 0"),
        ({"labels": [0, 0]}, "1 masks, 2 labels and 1 scores"),
        ({"scores": [float("nan")]}, "not all finite"),
        ({"masks": np.zeros((1, 3, 3), bool)}, "as the truth"),
        ({"crowd": [True]}, "5 true labels and 1 crowd flags"),
    ],
)
def test_wrong_values_are_refused_and_nothing_is_counted(changes: dict[str, Any], message: str) -> None:
    metric = CityscapesInstanceMetric(num_classes=1)
    right = {"masks": strip(0, 10)[None], "labels": [0], "scores": [0.5], "truth": TRUTH, "true_labels": ONE_CLASS}
    with pytest.raises(ValueError, match=message):
        metric.update(**{**right, **changes}, image_id=7)
    metric.update(**right, image_id=7)
    with pytest.raises(ValueError, match="image 7 was added before"):
        metric.update(**right, image_id=7)
    with pytest.raises(ValueError, match="image 7"):
        metric.merge(metric)
    with pytest.raises(ValueError, match="2 classes into one of 1"):
        metric.merge(CityscapesInstanceMetric(num_classes=2))


def test_it_equals_cityscapesscripts_where_that_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np, "in1d", np.isin, raising=False)  # which NumPy 2.4 has no more, and it still calls
    evaluator = pytest.importorskip(
        "cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling",
        reason="pip install cityscapesscripts compares with the official evaluator",
    )
    monkeypatch.setattr(evaluator, "writeDict2JSON", lambda *_: None)
    truths, predicted = [], []
    for number in range(IMAGES):
        ids = instance_ids(number)
        truths.append(str(tmp_path / f"ulm_000000_{number:06d}_gtFine_instanceIds.png"))
        Image.fromarray(ids).save(truths[-1])
        predicted.append(str(tmp_path / f"ulm_000000_{number:06d}_pred.txt"))
        lines = []
        for place, (mask, label, score) in enumerate(zip(*predictions(ids, number), strict=True)):
            Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / f"{number}_{place}.png")
            lines.append(f"{number}_{place}.png {cityscapes.TRAIN_IDS[label]} {score}\n")
        Path(predicted[-1]).write_text("".join(lines))
    args = evaluator.args
    args.predictionPath, args.quiet, args.JSONOutput = str(tmp_path), True, False
    args.gtInstancesFile = str(tmp_path / "gtInstances.json")
    official = evaluator.evaluateImgLists(predicted, truths, args)["averages"]
    ours = counted(range(IMAGES), tmp_path).result()
    assert ours["ap"] == pytest.approx(official["allAp"], abs=1e-12)
    assert ours["ap50"] == pytest.approx(official["allAp50%"], abs=1e-12)
    for name, values in official["classes"].items():
        known = ours["per_class"][CLASSES.index(name)]
        assert known == (None if np.isnan(values["ap"]) else pytest.approx(values["ap"], abs=1e-12)), name
