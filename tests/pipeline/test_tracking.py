from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from pipeline import tracking
from pipeline.tracking import Curve, log_files, log_summary, open_run, read_curve, set_status, tracking_uri
from tests.shared import PROJECT

FOREVER = 10**9


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, storage: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of the test's own; the storage root lies in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def opened(run_key: str = "k0", name: str = "seed 0", **settings: Any) -> str:
    run_id = open_run(
        dataset="shapes",
        row="shapes_tiny",
        name=name,
        run_key=run_key,
        params=settings or {"train": {"steps": 10, "lr": 0.1}, "seed": 0},
        tags={"m2f.workers": "2"},
    )
    assert run_id is not None
    return run_id


def client() -> Any:
    return tracking._client()


def history(run_id: str, metric: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client().get_metric_history(run_id, metric)]


def test_the_default_store_is_a_database_in_the_working_folder(workspace: Path) -> None:
    assert tracking_uri() == f"sqlite:///{workspace}/mlflow.db"


@pytest.mark.parametrize("uri", ["http://tracker:5000", "sqlite:////elsewhere/all.db", "databricks"])
def test_a_tracking_uri_from_the_environment_is_used(monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert tracking_uri() == uri


def test_a_relative_database_is_made_absolute_for_workers_in_other_folders(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs/all.db")
    assert tracking_uri() == f"sqlite:///{workspace}/runs/all.db"


def test_a_new_database_is_made_without_a_word(workspace: Path) -> None:
    call = "open_run(dataset='d', row='r', name='n', run_key='k', params={'a': 1}, tags={})"
    code = f"from pipeline.tracking import open_run, set_status; set_status({call}, 'FINISHED', {{}})"
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "PYTHONWARNINGS": "ignore"}
    environment.pop("MLFLOW_DISABLE_TELEMETRY")
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert (answer.stdout, answer.stderr) == ("", "")
    assert (workspace / "mlflow.db").exists()


def test_a_run_holds_its_settings_below_its_rows_run(storage: Path) -> None:
    run = client().get_run(opened())
    parent = client().get_run(run.data.tags["mlflow.parentRunId"])
    experiment = client().get_experiment(run.info.experiment_id)
    assert run.data.params == {"train.steps": "10", "train.lr": "0.1", "seed": "0"}
    assert run.data.tags["m2f.run_key"] == "k0"
    assert run.data.tags["m2f.workers"] == "2"
    assert (run.info.run_name, run.info.status) == ("seed 0", "RUNNING")
    assert (parent.info.run_name, parent.info.status) == ("shapes_tiny", "FINISHED")
    assert experiment.name == "shapes"
    assert experiment.artifact_location == (storage / "mlflow" / "shapes").as_uri()


def test_a_run_is_found_again_by_its_key_and_seeds_share_the_rows_run() -> None:
    first, second = opened("k0"), opened("k1", "seed 1")
    set_status(first, "FAILED", {})
    assert opened("k0") == first != second
    runs = client().search_runs([client().get_experiment_by_name("shapes").experiment_id])
    assert len(runs) == 3  # the row's and two trainings
    assert len({run.data.tags["mlflow.parentRunId"] for run in runs if "m2f.run_key" in run.data.tags}) == 1
    assert client().get_run(first).info.status == "RUNNING"


def test_a_run_found_again_with_another_setting_keeps_the_first_and_gains_new_ones() -> None:
    run_id = opened(steps=10)
    assert opened(steps=10, log_every=5) == opened(steps=10, log_every=7) == run_id
    assert client().get_run(run_id).data.params == {"steps": "10", "log_every": "5"}


def test_a_run_opens_in_an_experiment_that_was_deleted() -> None:
    run_id = opened()
    client().delete_experiment(client().get_run(run_id).info.experiment_id)
    assert opened("k9") != run_id


def test_points_reach_the_disk_at_once_and_mlflow_on_close(workspace: Path) -> None:
    run_id = opened()
    curve = Curve(workspace / "curve.jsonl", run_id, 0)
    curve.log(0, {"loss": 2.0, "lr": 0.1})
    curve.log(10, {"loss": 1.5, "lr": 0.1})
    assert (workspace / "curve.jsonl").read_text() == (
        '{"step": 0, "loss": 2.0, "lr": 0.1}\n{"step": 10, "loss": 1.5, "lr": 0.1}\n'
    )
    curve.close()
    curve.close()
    assert history(run_id, "loss") == [(0, 2.0), (10, 1.5)]
    assert history(run_id, "lr") == [(0, 0.1), (10, 0.1)]


def test_points_are_sent_while_the_run_goes_on(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "SEND_EVERY_S", 0.0)
    run_id = opened()
    with Curve(workspace / "curve.jsonl", run_id, 0) as curve:
        curve.log(0, {"loss": 2.0})
        assert history(run_id, "loss") == [(0, 2.0)]


def test_a_resumed_run_repeats_no_point_on_disk_or_in_mlflow(workspace: Path) -> None:
    path, run_id = workspace / "curve.jsonl", opened()
    with Curve(path, run_id, 0) as curve:
        for step in range(0, 50, 10):
            curve.log(step, {"loss": 100.0 - step})
        curve.log(20, {"val/miou": 0.5})
    # Killed after step 40; its last checkpoint is from step 20, so steps 20 to 40 are made again.
    with Curve(path, opened(), 20) as curve:
        for step in range(20, 70, 10):
            curve.log(step, {"loss": 100.0 - step})
        curve.log(20, {"val/miou": 0.5})
    whole = [(step, 100.0 - step) for step in range(0, 70, 10)]
    assert [(p["step"], p["loss"]) for p in read_curve(path) if "loss" in p] == whole
    assert sorted(history(run_id, "loss")) == whole
    assert history(run_id, "val/miou") == [(20, 0.5)]


def test_a_line_torn_by_a_kill_is_dropped(workspace: Path) -> None:
    path = workspace / "curve.jsonl"
    path.write_text('{"step": 0, "loss": 2.0}\n{"step": 10, "lo')
    assert read_curve(path) == [{"step": 0, "loss": 2.0}]
    with Curve(path, None, 10) as curve:
        curve.log(10, {"loss": 1.0})
    assert read_curve(path) == [{"step": 0, "loss": 2.0}, {"step": 10, "loss": 1.0}]


def test_a_missing_curve_has_no_points(workspace: Path) -> None:
    assert read_curve(workspace / "absent.jsonl") == []


def test_a_value_that_is_not_finite_is_null_on_disk_and_nan_in_mlflow(workspace: Path) -> None:
    run_id = opened()
    with Curve(workspace / "curve.jsonl", run_id, 0) as curve:
        curve.log(3, {"loss": math.nan})
    assert json.loads((workspace / "curve.jsonl").read_text()) == {"step": 3, "loss": None}
    [(step, value)] = history(run_id, "loss")
    assert step == 3
    assert math.isnan(value)


def test_a_long_backlog_is_sent_in_whole_points(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "METRICS_PER_BATCH", 7)  # three points of two metrics each fit
    path = workspace / "curve.jsonl"
    with Curve(path, None, 0) as curve:  # nothing is sent without a run
        for step in range(10):
            curve.log(step, {"loss": float(step), "lr": 0.5})
    run_id = opened()
    Curve(path, run_id, FOREVER).close()  # later, with a run: everything on disk is sent
    assert sorted(history(run_id, "loss")) == [(step, float(step)) for step in range(10)]
    assert sorted(history(run_id, "lr")) == [(step, 0.5) for step in range(10)]


def test_a_summary_is_shown_once_and_updated_when_it_changes() -> None:
    run_id = opened()
    for value in (0.5, 0.5, 0.6):
        log_summary(run_id, {"test/miou": value, "test/iou/traffic light (red)": 0.25})
    assert [value for _, value in history(run_id, "test/miou")] == [0.5, 0.6]
    assert history(run_id, "test/iou/traffic light _red_") == [(0, 0.25)]


def test_files_are_stored_under_the_names_given(workspace: Path, storage: Path) -> None:
    (workspace / "picture.png").write_bytes(b"png")
    run_id = opened()
    log_files(run_id, {"overlays/0.png": workspace / "picture.png", "picture.png": workspace / "picture.png"})
    artifacts = storage / "mlflow" / "shapes" / run_id / "artifacts"
    assert (artifacts / "overlays" / "0.png").read_bytes() == b"png"
    assert (artifacts / "picture.png").read_bytes() == b"png"


def test_a_run_ends_with_its_status_and_tags() -> None:
    run_id = opened()
    set_status(run_id, "FINISHED", {"m2f.steps": "10"})
    run = client().get_run(run_id)
    assert (run.info.status, run.data.tags["m2f.steps"]) == ("FINISHED", "10")


def test_nothing_happens_without_a_run(workspace: Path) -> None:
    log_files(None, {"a": workspace / "a"})
    log_summary(None, {"a": 1.0})
    set_status(None, "FINISHED", {})
    assert not (workspace / "mlflow.db").exists()


def test_a_server_that_refuses_costs_one_warning_line_per_call(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    started = time.monotonic()
    assert open_run(dataset="d", row="r", name="n", run_key="k", params={}, tags={}) is None
    log_summary("run", {"a": 1.0})
    with Curve(workspace / "curve.jsonl", "run", 0) as curve:
        curve.log(0, {"loss": 1.0})
    assert time.monotonic() - started < 15
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"warning: r n is not tracked for now ({uri}")
    assert lines[2].startswith(f"warning: points of the curve are kept on disk and sent when MLflow answers ({uri}")


@pytest.mark.slow
def test_a_server_that_never_answers_costs_five_seconds_and_is_then_left_alone(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # connections are accepted by the kernel, and nobody reads them
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(tracking, "SEND_EVERY_S", 0.0)
        tracking._client()  # importing MLflow is not the server's fault
        curve = Curve(workspace / "curve.jsonl", "run", 0)
        took = []
        for step in range(50):
            started = time.monotonic()
            curve.log(step, {"loss": 1.0})
            took.append(time.monotonic() - started)
    assert 4.0 < took[0] < 6.5  # MLFLOW_HTTP_REQUEST_TIMEOUT is 5 s, without retries
    assert sum(took[1:]) < 0.5


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_points_of_an_outage_arrive_once_when_the_server_is_back(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "SEND_EVERY_S", 0.0)
    monkeypatch.setattr(tracking, "RETRY_AFTER_S", 0.5)
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    with Server(workspace, port):
        run_id = opened()
        curve = Curve(workspace / "curve.jsonl", run_id, 0)
        for step in range(10):
            curve.log(step, {"loss": float(step), "lr": 0.5})
        assert len(history(run_id, "loss")) == 10
        (workspace / "picture.png").write_bytes(b"png")
        log_files(run_id, {"overlays/0.png": workspace / "picture.png"})
        assert [file.path for file in client().list_artifacts(run_id, "overlays")] == ["overlays/0.png"]
    started = time.monotonic()
    for step in range(10, 20):  # the server is gone
        curve.log(step, {"loss": float(step), "lr": 0.5})
    assert time.monotonic() - started < 5
    with Server(workspace, port):
        time.sleep(0.6)
        for step in range(20, 30):
            curve.log(step, {"loss": float(step), "lr": 0.5})
        curve.close()
        for metric in ("loss", "lr"):
            assert [step for step, _ in sorted(history(run_id, metric))] == list(range(30))
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" (")[0] for line in lines] == [
        "warning: points of the curve are kept on disk and sent when MLflow answers",
        "MLflow answers again",
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A real `mlflow server` on loopback, killed without warning at the end of the block."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port

    def __enter__(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/server.db", "--workers", "1"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        environment.pop("MLFLOW_TRACKING_URI")
        log = open(self.folder / "server.log", "a")
        self.process = subprocess.Popen(
            command, env=environment, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
        )
        log.close()
        end = time.monotonic() + 90
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2):
                    return
            except OSError:
                if time.monotonic() > end or self.process.poll() is not None:
                    self.__exit__()
                    raise
                time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
