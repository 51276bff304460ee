"""The stage preflight, as a user calls it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from stages.preflight import _price
from tests.helpers.cluster_files import filled
from tests.helpers.shared import PROJECT
from tests.helpers.waiting import LIMIT_S


def environment(folder: Path, **changes: str) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(PROJECT),
        "M2F_STORAGE": str(folder / "storage"),
        "M2F_WORKERS": "1",
    } | changes


def preflight(folder: Path, *words: str, settings: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    shutil.copy(PROJECT / "params.yaml", folder)
    command = [sys.executable, "-m", "stages.preflight", *words]
    return subprocess.run(
        command, cwd=folder, env=environment(folder, **settings or {}), capture_output=True, text=True, timeout=900
    )


def test_the_price_of_a_gpu_hour_is_given_or_a_cluster_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "head"))
    (tmp_path / "head").mkdir()
    assert _price(None, None) is None  # on no head
    cluster = filled("cluster.yaml", tmp_path, provider__price_per_hour={"p4d_24xlarge": 32.0})  # for 8 GPUs
    assert (_price(None, str(cluster)), _price(3.0, str(cluster))) == (4.0, 3.0)
    shutil.copy(cluster, tmp_path / "head/ray_bootstrap_config.yaml")
    assert _price(None, None) == 4.0
    shutil.copy(PROJECT / "cluster.yaml", tmp_path / "head/ray_bootstrap_config.yaml")  # without prices
    assert _price(None, None) is None
    with pytest.raises(ValueError, match="has no price of p4d_24xlarge"):
        _price(None, str(PROJECT / "cluster.yaml"))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_row_is_rehearsed_to_its_page_with_a_killed_worker_and_nothing_else_is_left(tmp_path: Path) -> None:
    done = preflight(tmp_path, "shapes_tiny", "--steps", "6", "--scale", "0.5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["params.yaml", "reports"]
    page = (tmp_path / "reports/preflight/shapes_tiny.html").read_text()
    assert "was killed, and the run went on from step" in page
    written = json.loads((tmp_path / "reports/preflight/shapes_tiny.json").read_text())
    assert [step["error"] for step in written["steps"]] == [None] * 9
    assert written["measured"]["step_s"] > 0 and written["measured"]["loaded_per_s"] > 0
    names = [figure["name"] for figure in written["figures"]]
    for name in ("training", "training memory", "loader", "whole row", "storage root", "checkpoints"):
        assert name in names


@pytest.mark.slow
def test_a_step_that_fails_ends_it_with_its_sentence_on_the_page_and_exit_code_1(tmp_path: Path) -> None:
    done = preflight(tmp_path, "shapes_tiny", "--scale", "0.5", settings={"M2F_WORKERS": "7"})
    assert done.returncode == 1
    assert "will not hold: ready: " in done.stdout or "will not hold: training: " in done.stdout, done.stdout
    assert "M2F_WORKERS" in (tmp_path / "reports/preflight/shapes_tiny.html").read_text()
    assert not (tmp_path / "storage").exists()


@pytest.mark.slow
def test_a_tracking_server_that_is_down_is_said_and_a_folder_that_takes_no_page_before_anything_else(
    tmp_path: Path,
) -> None:
    address = "http://me:secret@127.0.0.1:9"  # nobody listens at this port
    settings = {"M2F_WORKERS": "7", "MLFLOW_TRACKING_URI": address}  # so many workers end it early
    done = preflight(tmp_path, "shapes_tiny", "--scale", "0.5", settings=settings)
    assert "needs an MLflow that answers: http://127.0.0.1:9 does not (" in done.stdout
    assert "secret" not in done.stdout + (tmp_path / "reports/preflight/shapes_tiny.html").read_text()
    refused = preflight(tmp_path, "shapes_tiny", "--out", "/sys/pages")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("error: /sys/pages cannot be written (")


@pytest.mark.slow
def test_a_rehearsal_that_is_stopped_leaves_nothing(tmp_path: Path) -> None:
    shutil.copy(PROJECT / "params.yaml", tmp_path)
    command = [sys.executable, "-m", "stages.preflight", "shapes_tiny", "--scale", "0.5"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    deadline = time.monotonic() + LIMIT_S
    while "weights" not in process.stdout.readline():
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 143
    assert "stopped; the rehearsal's folders are deleted" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["params.yaml", "reports"]
    assert not list((tmp_path / "reports/preflight").iterdir())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--steps", "1"], "--steps is 1; it must be at least 2"),
        (["--scale", "2"], "--scale is 2; it must be 0.05 to 1"),
        (["--images", "0"], "--images is 0; it must be at least 1"),
        (["--price-per-gpu-hour", "nan"], "--price-per-gpu-hour is nan; it must be above 0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(words: list[str], sentence: str, tmp_path: Path) -> None:
    done = preflight(tmp_path, "shapes_tiny", *words)
    assert (done.returncode, done.stderr) == (1, f"error: {sentence}\n")
