"""What is printed of a tracking server: never its password."""

from __future__ import annotations

import pytest

from pipeline.tracking.client import attempt, mlflow_client, shown_uri


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://me:secret@host:5000", "http://host:5000"),
        ("https://me@host/mlflow", "https://host/mlflow"),
        ("postgresql://me:sec@ret@host/mlflow", "postgresql://host/mlflow"),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
    ],
)
def test_a_tracking_uri_is_shown_without_its_login(uri: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert shown_uri() == shown


def test_a_warning_that_quotes_the_address_quotes_no_password(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Nobody listens on port 9; MLflow's error names the whole address.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    with pytest.raises(Exception, match="me:secret@"):
        mlflow_client().get_experiment("0")
    assert attempt("no run", lambda: mlflow_client().get_experiment("0"), patient=True) is None
    printed = capsys.readouterr().err
    assert printed.startswith("warning: no run (http://127.0.0.1:9: ") and "http://127.0.0.1:9/api" in printed
    assert "secret" not in printed
