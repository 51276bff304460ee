"""What Ray is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ray.exceptions import RayTaskError, WorkerCrashedError

from pipeline.compute import ray_session
from pipeline.compute.ray_session import connect, cores_here, ray_storage, refuse_password, tasks_said


@pytest.mark.parametrize("uri", ["http://me:secret@mlflow:5000", "postgresql+psycopg2://me:secret@db/mlflow"])
def test_a_tracking_uri_with_a_password_is_refused_before_ray_shows_it(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ValueError, match="holds a password, .* set MLFLOW_TRACKING_USERNAME and") as refused:
        connect()
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "uri", ["http://mlflow:5000", "http://me@mlflow:5000/a:b", "sqlite:////tmp/a:b@c.db", "/a:b@c"]
)
def test_a_tracking_uri_without_a_password_is_not(uri: str) -> None:
    refuse_password(uri)


def test_ray_keeps_its_notes_in_a_folder_or_a_file_system_of_its_own(tmp_path: Path) -> None:
    assert ray_storage(tmp_path / "ray") == {"storage_path": f"{tmp_path}/ray", "storage_filesystem": None}


def test_ray_that_does_not_start_is_said_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * 108)))  # its sockets' paths may have 107 bytes
    with pytest.raises(
        ValueError, match=r"Ray does not start on this machine \(.*107 bytes.*; M2F_WORKERS=0 trains and"
    ):
        connect()


@pytest.mark.parametrize(
    ("limits", "cores"),
    [
        ({"cpu.max": "300000 100000"}, 3),
        ({"cpu.max": "250000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({}, 8),
    ],
)
def test_a_container_has_no_more_cores_than_its_share(
    limits: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu").mkdir()
    for file, text in limits.items():
        (tmp_path / file).write_text(f"{text}\n")
    monkeypatch.setattr(ray_session, "CGROUPS", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)))
    assert cores_here() == cores


def test_what_a_task_says_to_the_user_is_raised_as_it_was_and_a_bug_as_rays_error() -> None:
    for cause in (ValueError("x.png is torn"), FileNotFoundError("x.png"), torch.OutOfMemoryError("no memory")):
        with pytest.raises(type(cause), match=str(cause)) as raised, tasks_said("seed 0 of a row"):
            raise RayTaskError("make_parts", "a traceback", cause)
        assert raised.value is cause
    with pytest.raises(RayTaskError), tasks_said("seed 0 of a row"):
        raise RayTaskError("make_parts", "a traceback", KeyError("a bug"))


def test_workers_that_ray_cannot_replace_any_more_are_one_sentence() -> None:
    with (
        pytest.raises(
            ValueError, match=r"^seed 0 of a row: a worker was lost and could not be replaced \(.*run the same"
        ),
        tasks_said("seed 0 of a row"),
    ):
        raise WorkerCrashedError
