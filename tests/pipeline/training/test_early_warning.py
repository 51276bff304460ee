"""Early warning on curves made by hand, and in short trainings with a published curve that nobody reaches."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline.params.schema import EarlyWarningConfig, Row
from pipeline.storage.results.data import Manifest
from pipeline.storage.results.folder import read_result
from pipeline.storage.results.rows import BelowReference, PublishedEvaluation, TrainingResult
from pipeline.training.early_warning import clearly_below_reference, described
from pipeline.training.seeds import train_row
from tests.helpers.made_up import checkpoint, padded, published_evaluation
from tests.pipeline.conftest import NO_WEIGHTS

PUBLISHED = [(5000, 0.30), (10000, 0.40), (20000, 0.50)]


def judged(
    step: int, value: float, *, published: Any = (), other_seeds: Any = (), **config: Any
) -> BelowReference | None:
    warning = EarlyWarningConfig(**config)
    return clearly_below_reference(
        step, value, steps=20000, published=published, other_seeds=other_seeds, config=warning
    )


def test_a_figure_is_below_the_published_curve_when_it_lacks_more_than_the_points() -> None:
    # at 10000 the published training had 40 %; 5 points below is 35 %
    assert judged(10000, 0.3501, published=PUBLISHED) is None
    assert judged(10000, 0.3499, published=PUBLISHED) == BelowReference(10000, 0.3499, "published", 0.40)
    assert judged(10000, 0.3499, published=PUBLISHED, points=6.0) is None


def test_between_two_published_validations_a_straight_line_is_expected() -> None:
    # half way from (10000, 40 %) to (20000, 50 %)
    found = judged(15000, 0.39, published=PUBLISHED)
    assert found is not None and found.expected == pytest.approx(0.45)


def test_before_its_share_of_the_steps_and_before_the_first_published_validation_nothing_is_judged() -> None:
    # a quarter of 20000 steps
    assert judged(4999, 0.0, published=PUBLISHED, after=0.25) is None
    assert judged(5000, 0.0, published=PUBLISHED, after=0.25) is not None
    assert judged(4999, 0.0, published=PUBLISHED, after=0.0) is None


def test_other_seeds_count_from_two_on_and_at_the_same_step_only() -> None:
    other_seeds = [[(10000, 0.40)], [(10000, 0.44)], [(9000, 0.90)]]  # the median of 40 and 44 is 42 %
    found = judged(10000, 0.30, other_seeds=other_seeds)
    assert found == BelowReference(10000, 0.30, "other seeds", pytest.approx(0.42))
    assert judged(10000, 0.30, other_seeds=other_seeds[:1]) is None
    assert judged(10000, 0.38, other_seeds=other_seeds) is None


def test_the_published_curve_is_named_first_and_without_any_curve_nothing_is_said() -> None:
    other_seeds = [[(10000, 0.60)], [(10000, 0.62)]]
    found = judged(10000, 0.312, published=PUBLISHED, other_seeds=other_seeds)
    assert found is not None
    assert described(found, "mIoU") == "mIoU 31.20 is 8.8 points below the published curve (40.00)"
    assert judged(10000, 0.0) is None


@pytest.fixture
def row_below_reference(two_steps: Row, tmp_path: Path) -> tuple[Row, PublishedEvaluation]:
    """A row of six steps validated after each second, and a published training that had 90 % throughout."""
    folder = tmp_path / "storage" / "runs" / "published-0"
    folder.mkdir(parents=True)
    (folder / "curve.jsonl").write_text('{"step": 1, "val_pq": 0.9}\n{"step": 6, "val_pq": 0.9}\n')
    train = dataclasses.replace(two_steps.train, steps=6, val_interval=2)
    evaluated, curve = padded(checkpoint("panoptic", 0.9)), "runs/published-0/curve.jsonl"
    theirs = published_evaluation("small", evaluated, task="panoptic", curve=curve)
    return dataclasses.replace(two_steps, train=train), theirs


def test_a_training_that_falls_below_its_reference_says_so_is_tagged_and_goes_on(
    row_below_reference: tuple[Row, PublishedEvaluation],
    small_data: tuple[Path, Manifest],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    row, theirs = row_below_reference
    (seed,) = train_row(row, manifest=small_data[1], weights=NO_WEIGHTS, published=theirs).seeds
    assert seed.status == "finished"
    # a quarter of 6 steps is 1.5: all three validations are judged
    assert [(entry.step, entry.reference, entry.expected) for entry in seed.below_reference] == [
        (2, "published", 0.9), (4, "published", 0.9), (6, "published", 0.9)
    ]  # fmt: skip
    assert "small seed 1: warning: step 4: PQ " in (said := capsys.readouterr().err)
    assert "points below the published curve (90.00)" in said
    run = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(seed.mlflow_run_id)
    assert run.data.tags["m2f.below_reference"].startswith("step 6: PQ ")


def test_where_the_user_wants_it_the_second_warning_in_a_row_stops_a_training_until_the_setting_is_off(
    row_below_reference: tuple[Row, PublishedEvaluation], small_data: tuple[Path, Manifest], tmp_path: Path
) -> None:
    row, theirs = row_below_reference
    stopping = dataclasses.replace(row, early_warning=EarlyWarningConfig(stop=True))
    for _ in range(2):  # the second time it is not trained
        with pytest.raises(
            ValueError, match="clearly below its reference at steps 2 and 4 .* rows.small.early_warning.stop to false"
        ):
            train_row(stopping, manifest=small_data[1], weights=NO_WEIGHTS, published=theirs, results=tmp_path)
        (stopped,) = read_result(TrainingResult, "small", results=tmp_path).seeds
        assert stopped.status == "stopped" and [entry.step for entry in stopped.below_reference] == [2, 4]
        folder = tmp_path / "storage" / stopped.run_dir
        assert {path.name for path in (folder / "checkpoints").iterdir()} >= {"step-00000004.safetensors"}
    (seed,) = train_row(row, manifest=small_data[1], weights=NO_WEIGHTS, published=theirs).seeds
    assert seed.status == "finished" and seed.run_key == stopped.run_key
    assert [entry.step for entry in seed.below_reference] == [2, 4, 6]
    assert not (folder / "stopped.json").exists()
