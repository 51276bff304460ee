from __future__ import annotations

import json
import re

import pytest

from pipeline.params.tasks import FIGURES, primary
from pipeline.tracking.pages import MlflowPages, experiment_tags


def test_pages_of_a_server_are_below_its_address() -> None:
    pages = MlflowPages("http://tracking.example:5000/base/")
    assert pages.run("1f00") == "http://tracking.example:5000/base/#/runs/1f00"
    assert pages.version("a b/c", 7) == "http://tracking.example:5000/base/#/models/a%20b%2Fc/versions/7"
    assert (
        pages.sentence() == "Run keys and registered models are links to MLflow at http://tracking.example:5000/base."
    )


def test_a_run_that_is_not_known_has_no_page() -> None:
    assert MlflowPages("http://tracking.example").run(None) is None


def test_a_store_that_has_no_pages_is_not_linked() -> None:
    pages = MlflowPages("databricks")
    assert (pages.run("1f00"), pages.version("m", 1)) == (None, None)
    assert "no address to link to" in pages.sentence()


@pytest.mark.parametrize("task", FIGURES)
def test_the_address_of_a_tasks_rows_names_a_table_that_the_experiment_holds(task: str) -> None:
    pages = MlflowPages("http://tracking.example:5000")
    address = pages.rows("7", task)
    found = re.fullmatch(
        r"http://tracking\.example:5000/#/(experiments/7/runs\?viewStateShareKey=([\w-]+))", address or ""
    )
    assert found is not None
    tags = experiment_tags("7")
    assert f"(#/{found[1]})" in tags["mlflow.note.content"]  # the description links it
    table = json.loads(tags[f"mlflow.sharedViewState.{found[2]}"])
    assert table["searchFilter"] == f"tags.`m2f.task` = '{task}'"
    first = primary(task)
    columns = [f"metrics.`{name}/{first}`" for name in ("published", "difference", "test")]
    columns += [f"metrics.`test/{first}_{name}`" for name in ("median", "lowest", "highest")]
    columns += [f"tags.`m2f.{name}`" for name in ("verdict", "status", "seed")]
    assert set(columns) <= set(table["selectedColumns"]) <= set(table["columnOrder"])


def test_rows_that_no_server_has_taken_have_no_page() -> None:
    assert MlflowPages("http://tracking.example").rows(None, "panoptic") is None
    assert MlflowPages("databricks").rows("7", "panoptic") is None


def test_a_link_to_a_local_database_says_what_must_run_first_and_one_to_a_server_nothing() -> None:
    assert MlflowPages("sqlite:///mlflow.db").how == ", after: mlflow ui --backend-store-uri sqlite:///mlflow.db"
    assert MlflowPages("https://tracking.example.org").how == ""
