from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.params.schema import Params
from pipeline.storage.results import Aliases, BestVersion, RegisteredVersion, Registration, Reused
from tests.helpers.report_rows import evaluated, page_of, trained, written


def test_registered_models_and_runs_are_named_and_no_password_is_shown(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow.example:5000/base")
    best = BestVersion(version=7, seed=0, run_key="k0", figure="miou", value=0.7)
    by_hand = RegisteredVersion(version=3, seed=None, run_key=None, figure=None, value=None)
    aliases = Aliases(best=best, median=by_hand)
    registered = Registration(row="ours", model="d-r50", aliases=aliases, tracking_uri="https://mlflow.example:5000")
    written(tmp_path, trained("ours", 1, mlflow_run_id="1f00"), evaluated("ours", [0.7]), registered)
    page = page_of(params, tmp_path)
    assert "models:/d-r50@best: version 7, seed 0, mIoU 70.00" in page
    assert "models:/d-r50@median: version 3, not said of which seed" in page
    assert "<dd>https://mlflow.example:5000/base</dd>" in page and "1f00" in page
    assert "secret" not in page


def test_a_training_that_is_reused_for_another_key_is_told_with_reason_and_differences(
    params: Params, tmp_path: Path
) -> None:
    reused = Reused(
        run_key="k0",
        instead_of="newer",
        reason="a module was <renamed>",
        differences=("code, or initial weights",),
        reused_s=0,
        note="runs/newer/reused.json",
    )
    result = trained("ours", 1, reused=reused)
    written(tmp_path, result)
    written(tmp_path, evaluated("ours", [0.7]))
    told = "accepted instead of <code>newer</code>: a module was &lt;renamed&gt; (code, or initial weights)"
    assert told in page_of(params, tmp_path)
    assert "| k0 (reused) |" in (tmp_path / "reports" / "results.md").read_text()
