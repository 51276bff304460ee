"""A local database of MLflow's: made once, whole, and used only where it is sound."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.tracking.client import attempt, mlflow_client
from pipeline.tracking.database import UnusableDatabase, database_of
from pipeline.tracking.experiments import experiment_id
from tests.helpers.shared import PROJECT

AT_ONCE = 10


@pytest.fixture
def database(tmp_path: Path, storage: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where MLflow's database of the test belongs; there is none."""
    path = tmp_path / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
    return path


def change(database: Path, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.execute(statement)


def experiments(database: Path) -> dict[str, str]:
    """Names and places of the experiments in a database."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return dict(connection.execute("select name, artifact_location from experiments"))


TEN_PROCESSES = """
import multiprocessing, os, sys
from pathlib import Path
from pipeline.tracking.client import mlflow_client
from pipeline.tracking.experiments import experiment_id

def open_database(database, go, number):
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{database}"
    os.chdir("elsewhere")
    go.wait()
    experiment_id(mlflow_client())

if __name__ == "__main__":
    at_once, rounds = int(sys.argv[1]), int(sys.argv[2])
    Path("elsewhere").mkdir()
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{Path('first.db').absolute()}"
    experiment_id(mlflow_client())  # imports all that the processes need, once
    context = multiprocessing.get_context("fork")
    for round in range(rounds):
        database, go = Path(f"{round}/mlflow.db").absolute(), context.Event()
        arguments = [(database, go, number) for number in range(at_once)]
        processes = [context.Process(target=open_database, args=each) for each in arguments]
        for process in processes:
            process.start()
        go.set()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * at_once, round
"""


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [5, pytest.param(20, marks=pytest.mark.full)])
def test_ten_processes_at_once_make_one_database_and_all_of_them_can_use_it(
    tmp_path: Path, storage: Path, rounds: int
) -> None:
    (tmp_path / "ten.py").write_text(TEN_PROCESSES)
    command = [sys.executable, "ten.py", str(AT_ONCE), str(rounds)]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    for number in range(rounds):
        assert [path.name for path in (tmp_path / str(number)).iterdir()] == ["mlflow.db"]
        found = experiments(tmp_path / f"{number}/mlflow.db")
        # beside the database, although the process that made it works elsewhere; and in the storage root
        places = {
            "Default": f"file://{tmp_path}/{number}/mlruns/0",
            "mask2former": f"file://{storage}/mlflow/mask2former",
        }
        assert found == places


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_makes_the_database_leaves_none_and_the_next_one_makes_it(
    tmp_path: Path, database: Path
) -> None:
    code = "from pipeline.tracking.client import mlflow_client; mlflow_client()"
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as process:
        while not any(path.stat().st_size for path in tmp_path.glob(".mlflow.db.*.part")):
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert not database.exists()
    assert experiment_id(mlflow_client())
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob("*.lock"))


def half_made(database: Path) -> None:
    change(database, "create table _alembic_tmp_tags (key text)")


def not_begun_to_upgrade(database: Path) -> None:
    change(database, "delete from alembic_version")


def older(database: Path) -> None:
    change(database, "update alembic_version set version_num = '451aebb31d03'")


def newer(database: Path) -> None:
    change(database, "update alembic_version set version_num = 'ffffffffffff'")


def garbage(database: Path) -> None:
    database.write_bytes(b"nothing of the kind" * 100)


def cut_short(database: Path) -> None:
    database.write_bytes(database.read_bytes()[:3000])


def a_folder(database: Path) -> None:
    database.unlink()
    database.mkdir()


def a_pipe(database: Path) -> None:
    database.unlink()
    os.mkfifo(database)


def of_another_program(database: Path) -> None:
    database.unlink()
    change(database, "create table notes (text text)")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (half_made, "it is half made: whoever made or upgraded it was interrupted; "),
        (not_begun_to_upgrade, "it is half made: whoever made or upgraded it was interrupted; "),
        (older, "it is of another version of MLflow (its tables are at 451aebb31d03, MLflow "),
        (newer, "it is of another version of MLflow (its tables are at ffffffffffff, MLflow "),
        (garbage, "it is no database that MLflow can use (file is not a database); "),
        (cut_short, "it is no database that MLflow can use (database disk image is malformed); "),
        (a_folder, "it is no database that MLflow can use (unable to open database file); "),
        (a_pipe, "it is a device, a pipe or a socket; "),
        (of_another_program, "it is a database of another program; "),
    ],
)
def test_a_database_that_cannot_be_used_is_warned_of_once_and_left_as_it_is(
    database: Path,
    empty_mlflow: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    spoil: object,
    said: str,
) -> None:
    monkeypatch.delenv("M2F_SAID_OF_DATABASE", raising=False)
    shutil.copy(empty_mlflow, database)
    assert callable(spoil)
    spoil(database)
    before = database.read_bytes() if database.is_file() else None
    for name in ("seed 1", "seed 2"):
        assert attempt(f"{name} is not tracked", lambda: experiment_id(mlflow_client())) is None
    printed = capfd.readouterr().err
    assert (
        printed.startswith(f"warning: seed 1 is not tracked (sqlite:///{database}: {said}") and printed.count("\n") == 1
    )
    if spoil in (older, newer):
        assert f"take a backup of it, then run 'mlflow db upgrade sqlite:///{database}'" in printed
    assert "another program" in printed or "move the database away: python -m stages.track then makes a new" in printed
    assert (database.read_bytes() if database.is_file() else None) == before
    assert database.is_fifo() == (spoil is a_pipe)


def test_a_database_is_found_again_once_it_is_mended(database: Path, empty_mlflow: Path) -> None:
    garbage(database)
    with pytest.raises(UnusableDatabase):
        mlflow_client()
    shutil.copy(empty_mlflow, database)
    assert mlflow_client().search_experiments()


def test_an_empty_file_is_made_a_database(database: Path) -> None:
    database.touch()
    assert experiment_id(mlflow_client())


@pytest.fixture
def other_user() -> Iterator[None]:
    """A user who may write nothing of ours."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    os.seteuid(65534)
    yield
    os.seteuid(0)


@pytest.mark.parametrize("there", [True, False])
def test_a_database_that_may_not_be_written_is_said_in_a_sentence(
    database: Path, empty_mlflow: Path, there: bool, request: pytest.FixtureRequest
) -> None:
    if there:
        shutil.copy(empty_mlflow, database)
    for folder in (database.parent, *database.parent.parents[:2]):
        folder.chmod(0o755)
    request.getfixturevalue("other_user")
    with pytest.raises(UnusableDatabase, match="^it cannot be written .*; let this user write it and its"):
        mlflow_client()


def test_the_files_of_a_moved_storage_root_are_missed_until_there_is_a_link(
    database: Path, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = experiment_id(mlflow_client())
    moved = storage.with_name("moved")
    storage.rename(moved)
    monkeypatch.setenv("M2F_STORAGE", str(moved))
    with pytest.raises(UnusableDatabase) as raised:
        experiment_id(mlflow_client())
    assert str(raised.value) == (
        f"it keeps files below {storage}, but the storage root is {moved}, which was moved; run mkdir -p "
        f"{storage.parent} && ln -s {moved} {storage}, or move the database away: python -m stages.track then makes "
        "a new one of the run folders, and dvc repro -f register@<row> registers a row's models in it"
    )
    subprocess.run(f"mkdir -p {storage.parent} && ln -s {moved} {storage}", shell=True, check=True)
    assert experiment_id(mlflow_client()) == known


def test_a_copy_of_a_project_does_not_write_among_the_files_of_the_original(
    database: Path, storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment_id(mlflow_client())
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy(database, copy / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{copy}/mlflow.db")
    monkeypatch.setenv("M2F_STORAGE", str(copy / "storage"))
    with pytest.raises(UnusableDatabase, match=f"is a copy or another one; set M2F_STORAGE={storage}, or move"):
        experiment_id(mlflow_client())
    monkeypatch.setenv("M2F_STORAGE", str(storage))  # a copy that shares the storage root is not meant
    assert experiment_id(mlflow_client())


def test_a_place_that_somebody_chose_is_nobody_elses_business(database: Path, tmp_path: Path) -> None:
    known = mlflow_client().create_experiment("mask2former", artifact_location=(tmp_path / "mine").as_uri())
    assert experiment_id(mlflow_client()) == known


@pytest.mark.parametrize(
    ("uri", "found"),
    [
        ("sqlite:////a/b.db", Path("/a/b.db")),
        ("sqlite:////a/b.db?timeout=3", Path("/a/b.db")),
        ("sqlite:///:memory:", None),
        ("http://host:5000", None),
        ("postgresql://host/mlflow", None),
    ],
)
def test_a_database_is_local_where_its_address_names_a_file(uri: str, found: Path | None) -> None:
    assert database_of(uri) == found
