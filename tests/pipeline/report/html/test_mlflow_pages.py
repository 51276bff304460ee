from __future__ import annotations

from pipeline.report.html.mlflow_pages import MlflowPages


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
