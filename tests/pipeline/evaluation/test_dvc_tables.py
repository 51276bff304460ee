"""What DVC shows of an evaluated row, worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from pipeline.evaluation.dvc_tables import confusion_lines, confusions, curves, metrics
from tests.helpers import made_up


def test_metrics_are_the_figures_that_a_row_is_known_by_in_percent_over_its_seeds() -> None:
    # The last checkpoints decide; a seed that failed has no figures; none of these pictures has a thing to count.
    seeds = [
        made_up.evaluated_seed(0, made_up.checkpoint("panoptic", 0.5, ap=None), made_up.checkpoint("panoptic", 0.9)),
        made_up.evaluated_seed(1, made_up.checkpoint("panoptic", 0.25, ap=None)),
        made_up.evaluated_seed(2, made_up.checkpoint("panoptic", 0.0), status="failed", checkpoints=None),
    ]
    median = {"pq": 0.375, "sq": 0.375, "ap": None, "miou": 0.375}
    expected = {"median": 37.5, "lowest": 25.0, "highest": 50.0}
    shown = metrics(made_up.evaluation("r", seeds, task="panoptic", median=median))
    assert shown == {"PQ": expected, "mIoU": expected}


def test_a_row_with_several_scales_shows_that_figure_too() -> None:
    seed = made_up.evaluated_seed(0, made_up.checkpoint("semantic", 0.5, miou_ms_flip=0.75))
    shown = metrics(made_up.evaluation("r", [seed], median={"miou": 0.5, "miou_ms_flip": 0.75}))
    assert {name: figures["median"] for name, figures in shown.items()} == {"mIoU": 50.0, "mIoU (ms+flip)": 75.0}


def test_curves_of_seeds_come_before_the_published_one(storage: Path) -> None:
    for run, lines in {
        "k0": ['{"step": 2, "loss": 4.5, "time_ms": 1}', '{"step": 4, "loss": null, "val_miou": 0.25, "time_ms": 2}'],
        "published-ab": ['{"step": 4, "val_miou": 0.5, "lr": 0.1, "time_ms": 3}'],
    }.items():
        (storage / "runs" / run).mkdir(parents=True)
        (storage / "runs" / run / "curve.jsonl").write_text("".join(f"{line}\n" for line in lines))
    trained = made_up.training("r", [made_up.trained_seed(0), made_up.trained_seed(1)])  # seed 1 has left no curve
    checked = made_up.published_evaluation(
        "r", made_up.padded(made_up.checkpoint("semantic", 0.5)), curve="runs/published-ab/curve.jsonl"
    )
    ours = [("seed 0", "loss", 2, "4.5"), ("seed 0", "mIoU in percent", 4, "25")]
    assert list(curves(trained, "semantic", None)) == ours
    assert list(curves(trained, "semantic", checked)) == [*ours, ("published", "mIoU in percent", 4, "50")]


def test_a_long_curve_is_shown_as_means_and_keeps_its_end(storage: Path) -> None:
    (storage / "runs/k0").mkdir(parents=True)
    points = "".join(f'{{"step": {step}, "loss": {step}.0, "time_ms": 1}}\n' for step in range(1, 1001))
    (storage / "runs/k0/curve.jsonl").write_text(points)
    lines = list(curves(made_up.training("r", [made_up.trained_seed(0)]), "semantic", None))
    assert len(lines) == 120 and lines[-1] == ("seed 0", "loss", 1000, "1000")


def test_confusions_are_shares_of_the_pixels_of_all_seeds_together(storage: Path) -> None:
    # Of class a 3 and 1 of 4 pixels are called a: 4 of 8 together. No picture shows c, and nothing is called c.
    for seed, counts in enumerate(([[3, 1, 0], [0, 4, 0], [0, 0, 0]], [[1, 3, 0], [0, 4, 0], [0, 0, 0]])):
        folder = storage / f"runs/k{seed}/evaluations/e0"
        folder.mkdir(parents=True)
        content = {"class_names": ["a", "b", "c"], "true_by_predicted": counts}
        (folder / "confusion.json").write_text(json.dumps(content))
    seeds = [made_up.evaluated_seed(seed, made_up.checkpoint("semantic", 0.5)) for seed in (0, 1)]
    lines = list(confusions(made_up.evaluation("r", seeds)))
    assert lines == [("a", "a", "50.00"), ("a", "b", "50.00"), ("b", "b", "100.00")]


def test_small_confusions_are_left_out_and_a_class_that_is_never_right_is_shown() -> None:
    counts = np.array([[995, 5, 0], [0, 0, 1000], [4, 0, 996]])  # 0.5 % is shown, 0.4 % is not
    lines = [("a", "a", "99.50"), ("a", "b", "0.50"), ("b", "b", "0.00"), ("b", "c", "100.00"), ("c", "c", "99.60")]
    assert list(confusion_lines(counts, "abc")) == lines


def test_instances_have_no_confusions(storage: Path) -> None:
    seed = made_up.evaluated_seed(0, made_up.checkpoint("instance", 0.5))
    assert list(confusions(made_up.evaluation("r", [seed], task="instance"))) == []
