"""A run folder has one owner: another process ends with a sentence, unless the owner is dead."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.runs.outcome import Owner, write_note
from pipeline.runs.owner import owned, owner_of
from pipeline.storage.files import files_below
from pipeline.storage.stores import StoredPath
from tests.helpers.shared import PROJECT

OWNING = """
import os, sys, time
from pathlib import Path
from pipeline.runs.owner import owned
with owned([Path(sys.argv[1])]):
    if sys.argv[2:] and os.fork() == 0:  # as a process that loads pictures, which ends some time after
        time.sleep(float(sys.argv[2]))
        os._exit(0)
    print("owned", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def start_owner() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a process that owns a run folder until it is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(run_dir: Path, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", OWNING, str(run_dir), *words]
        environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "owned\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_process_is_told_who_trains_and_takes_over_once_that_one_is_dead(
    tmp_path: Path, start_owner: Callable[..., subprocess.Popen[str]]
) -> None:
    first = start_owner(tmp_path / "k1")
    said = f"^run k1 is being trained by process {first.pid} on host {socket.gethostname()}; wait for it to end, or end"
    with pytest.raises(ValueError, match=said), owned([tmp_path / "k0", tmp_path / "k1"]):
        pass
    assert not (tmp_path / "k0").exists()  # all or none
    first.kill()
    first.wait()
    assert owner_of(tmp_path / "k1") is not None
    with owned([tmp_path / "k0", tmp_path / "k1"]):
        now = owner_of(tmp_path / "k1")
        assert now is not None and now.process == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_what_a_dead_owner_has_started_is_waited_for(
    tmp_path: Path, start_owner: Callable[..., subprocess.Popen[str]]
) -> None:
    first = start_owner(tmp_path / "k1", "1.5")
    first.kill()
    first.wait()
    begun_s = time.monotonic()
    with owned([tmp_path / "k1"]):
        assert time.monotonic() - begun_s > 0.2  # its child still has the lock open


def test_what_lies_in_the_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "k1").mkdir()
    (tmp_path / "k1/curve.jsonl").write_text("{}\n")
    with owned([tmp_path / "k1"]):
        pass
    assert files_below(tmp_path) == {"k1/curve.jsonl": 3}


def test_a_process_that_has_the_number_of_a_dead_owner_is_not_taken_for_it(bucket: StoredPath) -> None:
    # In a bucket, where nothing is locked. The number is this test's parent's, which began at another time.
    parent = psutil.Process().parent()
    assert parent is not None
    alive = Owner(process=parent.pid, node=socket.gethostname(), started_s=parent.create_time())
    dead = Owner(process=parent.pid, node=socket.gethostname(), started_s=parent.create_time() - 100)
    write_note(bucket / "runs/k1", alive)
    with pytest.raises(ValueError, match=f"^run k1 is being trained by process {parent.pid} on host "):
        owned([bucket / "runs/k1"]).__enter__()
    write_note(bucket / "runs/k1", dead)
    with owned([bucket / "runs/k1"]):
        now = owner_of(bucket / "runs/k1")
        assert now is not None and now.process == os.getpid()
    assert owner_of(bucket / "runs/k1") is None
