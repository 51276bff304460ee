from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pipeline.params.schema import Params
from pipeline.storage.results.rows import Aliases, BestVersion, RegisteredVersion, Registration, Reused
from tests.helpers import made_up
from tests.helpers.report_rows import evaluated, figures, page_of, trained, written


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
    server, run = "https://mlflow.example:5000", "https://mlflow.example:5000/base/#/runs/1f00"
    best_page, median_page = (f'<a href="{server}/#/models/d-r50/versions/{version}">' for version in (7, 3))
    assert f"{best_page}models:/<wbr>d-r50@best: version 7</a>, seed 0, mIoU 70.00</dd>" in page
    assert f"{median_page}models:/<wbr>d-r50@median: version 3</a>, not said of which seed</dd>" in page
    assert f'<td><code><a href="{run}">1f00</a></code></td>' in page
    assert page.count("links to MLflow at https://mlflow.example:5000/base.") == 1
    assert "secret" not in page


def test_runs_in_a_local_database_are_links_to_where_mlflow_ui_shows_it(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    seeds = [
        made_up.evaluated_seed(seed, figures("semantic", 0.7), mlflow_run_id=run)
        for seed, run in ((0, "1f00"), (1, None))
    ]
    written(tmp_path, made_up.evaluation("ours", seeds))
    page = page_of(params, tmp_path)
    assert '<td><code><a href="http://127.0.0.1:5000/#/runs/1f00">k0</a></code></td>' in page
    assert "<td><code>k1</code></td>" in page
    sentence = (
        "links to MLflow at http://127.0.0.1:5000. Start mlflow ui first, in the folder of the database: mlflow ui"
    )
    assert page.count(f"{sentence} --backend-store-uri sqlite:///mlflow.db<") == 1


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
    told = "reused instead of <code>newer</code>: a module was &lt;renamed&gt; (code, or initial weights)"
    assert told in page_of(params, tmp_path)
    assert "| k0 (reused) |" in (tmp_path / "reports" / "results.md").read_text()


def test_a_tasks_rows_are_a_link_to_their_table_in_mlflow_and_a_row_to_its_run(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    page = page_of(params, tmp_path)
    assert "in MLflow</a>" not in page  # nothing has run
    written(tmp_path, evaluated("ours", [0.7], mlflow_run_id="1f00", mlflow_experiment_id="4"))
    page = page_of(params, tmp_path)
    table = "https://mlflow.example/#/experiments/4/runs?viewStateShareKey=semantic-rows"
    assert page.count(f'<a href="{table}">These rows and their seeds in MLflow</a>') == 1
    assert '<dt>row in MLflow</dt><dd><a href="https://mlflow.example/#/runs/1f00">1f00</a>' in page


def test_the_page_says_with_which_kernels_a_training_ran(params: Params, tmp_path: Path) -> None:
    environment = dataclasses.replace(made_up.A100, kernels="compiled", deterministic=True)
    written(tmp_path, trained("ours", 1, environment=environment), evaluated("ours", [0.7]))
    assert "TF32 convolutions; compiled kernels; deterministic; torch 2.0" in page_of(params, tmp_path)
    written(tmp_path, trained("ours", 1, environment=made_up.A100))
    assert "TF32 convolutions; torch 2.0" in page_of(params, tmp_path)
