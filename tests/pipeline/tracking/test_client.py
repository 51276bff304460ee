"""What is printed of a tracking server: never its password."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.tracking.client import attempt, mlflow_client, no_answer, shown_uri, tracking_uri
from tests.helpers.mlflow_server import Server, free_port
from tests.helpers.shared import PROJECT


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


def test_an_experiment_in_a_temporary_folder_has_the_projects_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", "/project")
    assert tracking_uri() == "sqlite:////project/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mine/other.db")
    assert tracking_uri() == "sqlite:////project/mine/other.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////elsewhere/mlflow.db")
    assert tracking_uri() == "sqlite:////elsewhere/mlflow.db"


@pytest.mark.slow
def test_whether_a_tracking_server_answers_is_asked_without_making_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    assert no_answer() == ""  # it is made when it is needed
    assert not any(tmp_path.iterdir())
    (tmp_path / "mlflow.db").write_bytes(b"no database, but as long as the head of one would be" * 4)
    assert no_answer().startswith("it is no database that MLflow can use (")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")  # nobody listens at this port
    assert "127.0.0.1" in no_answer() and "secret" not in no_answer()
    port = free_port()
    with Server(tmp_path, port):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        assert no_answer() == ""


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


@pytest.mark.parametrize("state", ["older", "no database"])
def test_a_database_that_mlflow_cannot_use_costs_a_run_its_curve_in_mlflow_and_nothing_else(
    tmp_path: Path, empty_mlflow: Path, state: str
) -> None:
    code = (
        "from pathlib import Path\n"
        "from pipeline.tracking.client import attempt, mlflow_client\n"
        "from pipeline.tracking.curve import Curve\n"
        "print(attempt('the run is not tracked', lambda: mlflow_client().search_experiments()))\n"
        "with Curve(Path('curve.jsonl'), 'a-run', 0) as curve:\n"
        "    curve.log(1, {'loss': 2.0})\n"
        "print(Path('curve.jsonl').read_text())\n"
    )

    def run(text: str) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "PYTHONPATH": str(PROJECT),
            "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        }
        return subprocess.run(
            [sys.executable, "-c", text], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    database = tmp_path / "mlflow.db"
    if state == "no database":
        database.write_text("nothing of the kind")
    else:
        shutil.copy(empty_mlflow, database)
        with contextlib.closing(sqlite3.connect(database)) as connection, connection:
            connection.execute("update alembic_version set version_num = '451aebb31d03'")
    answer = run(code)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("None\n") and '"loss": 2.0' in answer.stdout
    assert answer.stderr.startswith("warning: the run is not tracked (sqlite:///")
    assert "Traceback" not in answer.stderr
