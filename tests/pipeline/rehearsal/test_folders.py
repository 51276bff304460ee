"""The folders of a rehearsal are deleted however it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pipeline.rehearsal import folders
from pipeline.rehearsal.folders import folders_of
from tests.helpers.shared import PROJECT
from tests.helpers.waiting import LIMIT_S, until


@pytest.fixture(autouse=True)
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A storage root that holds something; the temporary folder lies beside it."""
    monkeypatch.setenv("M2F_STORAGE", str(tmp_path / "storage"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    (tmp_path / "storage/runs").mkdir(parents=True)
    return tmp_path / "storage"


def left(storage: Path) -> set[str]:
    """What is there besides the folders that were there before."""
    return {str(path.relative_to(storage.parent)) for path in storage.parent.rglob("*")} - {
        "storage", "storage/runs", "temporary"
    }  # fmt: skip


def test_nothing_is_left_when_a_rehearsal_fails(storage: Path) -> None:
    def failing() -> None:
        with folders_of("shapes_tiny") as (folder, below):
            (folder / "params.yaml").touch()
            (below / "runs").mkdir()
            assert len(left(storage)) == 5
            raise RuntimeError("stage")

    with pytest.raises(RuntimeError, match="stage"):
        failing()
    assert not left(storage)


REHEARSAL = """
import os, signal, subprocess, time
from pipeline.rehearsal.folders import folders_of
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it
with folders_of("shapes_tiny") as (folder, storage):
    (storage / "file").touch()
    stage = subprocess.Popen(["sleep", "600"], env={**os.environ, "M2F_STORAGE": str(storage)})
    print(stage.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_rehearsal_that_is_killed_leaves_neither_folders_nor_stages(storage: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", REHEARSAL],
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    stage = int(process.stdout.readline())
    assert left(storage)
    process.send_signal(number)
    process.wait(LIMIT_S)
    until(lambda: not left(storage))
    with pytest.raises(ProcessLookupError):
        os.kill(stage, 0)


def test_an_interruption_of_the_deletion_leaves_nothing(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(folders, "delete_folders", interrupted)
    with pytest.raises(KeyboardInterrupt), folders_of("shapes_tiny"):
        assert left(storage)
    until(lambda: not left(storage))


@pytest.mark.parametrize("host", ["machine", "gpu-node-1"])
def test_what_is_left_all_the_same_is_deleted_by_the_next_and_a_running_ones_is_not(
    storage: Path, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    old, running, foreign = (f"a-row-{host}-{ended.pid}", f"row-{host}-{os.getppid()}", f"row-elsewhere-{ended.pid}")
    for name in (old, running, foreign):
        (storage / "preflight" / name).mkdir(parents=True)
        (storage.parent / "temporary" / f"m2f-preflight-{name}-x_1").mkdir()
    stage = subprocess.Popen(["sleep", "600"], env={"M2F_STORAGE": str(storage / "preflight" / old)})
    with folders_of("shapes_tiny"):
        assert stage.poll() is not None
    kept = {f"{place}{name}{end}" for name in (running, foreign)
            for place, end in (("storage/preflight/", ""), ("temporary/m2f-preflight-", "-x_1"))}  # fmt: skip
    assert left(storage) == kept | {"storage/preflight"}


@pytest.mark.parametrize("was_there", [True, False])
def test_an_empty_storage_root_stays_and_one_that_was_made_goes(storage: Path, *, was_there: bool) -> None:
    (storage / "runs").rmdir()
    if not was_there:
        storage.rmdir()
    with folders_of("shapes_tiny"):
        assert (storage / "preflight").exists()
    assert storage.exists() == was_there


def test_two_at_once_take_a_storage_root_away_that_they_have_made(storage: Path) -> None:
    (storage / "runs").rmdir()
    storage.rmdir()
    with folders_of("a"):
        with folders_of("b") as (_, below):
            assert below.exists()
        assert storage.exists()
    assert not storage.exists()


def test_a_storage_root_that_takes_no_folder_ends_it_at_once(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (storage / "file").touch()
    monkeypatch.setenv("M2F_STORAGE", str(storage / "file"))
    with pytest.raises(NotADirectoryError, match="file"), folders_of("shapes_tiny"):
        pass
    assert left(storage) == {"storage/file"}
