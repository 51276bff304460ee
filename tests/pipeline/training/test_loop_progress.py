"""What a training shows on its first worker, and that the others have the same calls."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from torch import tensor

from pipeline.params.schema import Row
from pipeline.runs.run import Run
from pipeline.tracking.curve import Curve
from pipeline.training.early_warning import BelowReference
from pipeline.training.loop_progress import NoCurve, NoProgress, TrainingProgress


@pytest.fixture
def run(small_row: Row, tmp_path: Path) -> Run:
    return Run(row=small_row, seed=5, run_key="k" * 16, run_dir=tmp_path, manifest={})


def test_a_step_is_said_with_the_loss_of_all_groups_as_far_as_this_worker_knows_it(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = TrainingProgress(run, 0, share=0.5, interval_s=0.0)
    progress.step(2, {"loss_mask": tensor(1.0), "loss_dice": tensor(2.0)})  # of half the groups
    said = capsys.readouterr().err
    assert re.fullmatch(
        r"small seed 5: 2 of 6 steps \(33%\), [\d,.]+ steps/s, [\d,.]+ images/s, loss 6.000, 0 s left\n", said
    )


def test_within_the_interval_only_the_last_step_is_said(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    progress = TrainingProgress(run, 3, share=1.0)
    assert capsys.readouterr().err == "small seed 5: going on from step 3\n"
    for done in (4, 5):
        progress.step(done, {"loss_mask": tensor(1.0)})
    assert capsys.readouterr().err == ""
    progress.step(6, {"loss_mask": tensor(1.0)})
    assert re.fullmatch(r"small seed 5: 6 steps, 3 of them in 0 s, [\d,.]+ steps/s\n", capsys.readouterr().err)


def test_a_validation_and_a_warning_are_said_in_words(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    progress = TrainingProgress(run, 0, share=1.0)
    progress.validated(3, {"pq": 0.25, "ap": 0.125, "miou": None})
    progress.warned(BelowReference(3, 0.25, "published", 0.90))
    validated, warned = capsys.readouterr().err.splitlines()
    assert validated.startswith("small seed 5: step 3: validation ") and "PQ 25.00" in validated
    assert warned == ("small seed 5: warning: step 3: PQ 25.00 is 65.0 points below the published curve (90.00)")


@pytest.mark.parametrize(("none", "whole"), [(NoProgress, TrainingProgress), (NoCurve, Curve)])
def test_what_other_workers_have_instead_takes_the_same_calls(none: Any, whole: Any) -> None:
    calls = {name: call for name, call in vars(none).items() if not name.startswith("_")}
    assert calls
    for name, call in calls.items():
        assert inspect.signature(call) == inspect.signature(getattr(whole, name)), name
