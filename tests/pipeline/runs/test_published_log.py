"""Published training logs of both formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.runs.published_log import logged_step_s, read_log
from tests.helpers.shared import shared


def test_a_real_mmengine_log_becomes_points_by_step() -> None:
    points = read_log(shared("reference/mmengine_training_log.json"))
    assert list(points) == [5, 10, 15, 20]
    assert points[10]["loss"] == pytest.approx(108.76382980346679)
    assert points[10]["val_miou"] == pytest.approx(0.0242)
    assert points[20]["lr"] == 0.0  # base_lr: what the decoders learn at


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<html>", "line 1 is not a JSON object"),
        ('{"step": 1}\n{"exp": "\udcfc"}', "log.json is no training log: line 2 is not a JSON object"),
        ('{"step": 1}\n', "no line has a step with a loss"),
        ("", "no line"),
    ],
)
def test_what_is_no_log_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "log.json").write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=message):
        read_log(tmp_path / "log.json")


def test_the_time_of_a_step_is_the_median_of_a_logs_training_lines(tmp_path: Path) -> None:
    log = tmp_path / "log.json"
    lines = [{"loss": 9.0, "time": time, "step": 50} for time in (2.0, 0.5, 0.4)]  # the first one is slow
    log.write_text("\n".join(json.dumps(line) for line in [*lines, {"mIoU": 70.0, "time": 99.0, "step": 150}]))
    assert logged_step_s(log) == 0.5
    log.write_text(json.dumps({"loss": 90.5, "step": 50}))
    assert logged_step_s(log) is None
    assert logged_step_s(shared("reference/mmengine_training_log.json")) == pytest.approx(
        (1.9282 + 3.4677) / 2, abs=1e-4
    )


def train_line(iteration: int, epoch: int = 1, **values: Any) -> dict[str, Any]:
    """As mmcv 1 writes it."""
    of_all = {"mode": "train", "epoch": epoch, "iter": iteration, "lr": 1e-5, "memory": 13000, "time": 0.5}
    return {**of_all, "loss_cls": 2.0, "d0.loss_cls": 3.0, "loss": 40.0, **values}


VALIDATION = {"mode": "val", "epoch": 1, "iter": 625, "lr": 1e-5, "bbox_mAP": 0.21, "segm_mAP": 0.2, "segm_mAP_s": -1.0}
"""Its `iter` counts batches."""
PANOPTIC = {"PQ": 30.5, "SQ": 75.0, "PQ_th": 33.0, "RQ_st": 40.0, "segm_mAP_copypaste": "0.2 0.3"}


def written(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_a_validation_of_mmcv_belongs_to_the_step_before_it(tmp_path: Path) -> None:
    lines = [train_line(4950), train_line(5000, loss=38.0), {**VALIDATION, **PANOPTIC}, train_line(5050)]
    log = written(tmp_path / "log.json", {"env_info": "GPU: A100", "seed": 42}, *lines)
    points = read_log(log)
    assert list(points) == [4950, 5000, 5050]
    assert points[4950] == {"loss_class": 2.0, "loss": 40.0, "memory_mib": 13000.0}  # lr is the backbone's
    validated = {"val_pq": 0.305, "val_sq": 0.75, "val_pq_things": 0.33, "val_rq_stuff": 0.4, "val_ap": 0.2}
    assert points[5000] == pytest.approx({"loss_class": 2.0, "loss": 38.0, "memory_mib": 13000.0, **validated})
    assert logged_step_s(log) == 0.5


def test_metrics_of_mmengine_are_found_behind_their_prefix(tmp_path: Path) -> None:
    training = {"base_lr": 1e-4, "lr": 1e-5, "loss": 30.0, "loss_mask": 1.0, "time": 0.4, "step": 5000}
    validation = {"coco_panoptic/PQ": 31.0, "coco/segm_mAP": 0.25, "coco/bbox_mAP": 0.3, "time": 0.1, "step": 5000}
    points = read_log(written(tmp_path / "log.json", training, validation))
    assert points == {5000: {"lr": 1e-4, "loss": 30.0, "loss_mask": 1.0, "val_pq": 0.31, "val_ap": 0.25}}


def test_a_training_that_was_resumed_goes_back_and_one_that_counts_by_epoch_is_refused(tmp_path: Path) -> None:
    resumed = [train_line(100), train_line(150, loss=9.0), train_line(150), train_line(200)]
    assert read_log(written(tmp_path / "log.json", *resumed))[150]["loss"] == 40.0
    with pytest.raises(ValueError, match=r"counts iterations anew in epoch 2 \(line 2\); only a log that counts them"):
        read_log(written(tmp_path / "log.json", train_line(7300), train_line(50, epoch=2)))


def test_a_line_of_other_values_says_how_to_do_without_the_log(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'line 1 is not a JSON .*, give its entry in checkpoints.yaml: log_url: ""$'):
        read_log(written(tmp_path / "log.json", train_line(50, loss="high")))
