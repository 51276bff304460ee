from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.params.load import load_params
from pipeline.provenance.run_key import settings_key
from pipeline.runs.curve_file import point_line, read_curve
from pipeline.runs.outcome import evaluation_dir, write_note
from pipeline.storage.results.folder import write_result
from pipeline.tracking import client as mlflow_client
from pipeline.tracking import sender
from pipeline.tracking.curve import Curve
from pipeline.tracking.mlflow_runs import catch_up, open_run, set_tags
from pipeline.tracking.sender import SystemLoad
from stages.track import main as track
from tests.helpers.made_up import CPU, checkpoint, evaluated_seed, evaluation, trained_seed, training
from tests.helpers.mlflow_server import Server, free_port
from tests.helpers.shared import PROJECT
from tests.helpers.waiting import LIMIT_S, until

FOREVER = 10**9
PARAMS = str(PROJECT / "params.yaml")


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, storage: Path, empty_mlflow: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of the test's own, with an empty database of MLflow's; the storage root lies in it."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
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
    return mlflow_client.mlflow_client()


def history(run_id: str, metric: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client().get_metric_history(run_id, metric)]


def test_the_default_store_is_a_database_in_the_working_folder(workspace: Path) -> None:
    assert mlflow_client.tracking_uri() == f"sqlite:///{workspace}/mlflow.db"


@pytest.mark.parametrize("uri", ["http://tracker:5000", "sqlite:////elsewhere/all.db", "databricks"])
def test_a_tracking_uri_from_the_environment_is_used(monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert mlflow_client.tracking_uri() == uri


def test_a_password_in_the_uri_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@tracker/a@b")
    assert mlflow_client.shown_uri() == "https://tracker/a@b"


def test_a_relative_database_is_made_absolute_for_workers_in_other_folders(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs/all.db")
    assert mlflow_client.tracking_uri() == f"sqlite:///{workspace}/runs/all.db"


@pytest.mark.slow
def test_a_new_database_is_made_without_a_word(workspace: Path) -> None:
    (workspace / "mlflow.db").unlink()
    call = "open_run(dataset='d', row='r', name='n', run_key='k', params={'a': 1}, tags={})"
    code = f"from pipeline.tracking.mlflow_runs import open_run, set_tags; set_tags({call}, {{}})"
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
    assert (parent.info.run_name, parent.info.status) == ("shapes_tiny", "RUNNING")
    assert experiment.name == "mask2former"
    assert experiment.artifact_location == (storage / "mlflow" / "mask2former").as_uri()


def test_a_run_is_found_again_by_its_key_and_seeds_share_the_rows_run() -> None:
    first, second = opened("k0"), opened("k1", "seed 1")
    client().set_terminated(first, "FAILED")
    assert opened("k0") == first != second
    runs = client().search_runs([client().get_experiment_by_name("mask2former").experiment_id])
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
    begun_ms = int(time.time() * 1000)
    curve.log(0, {"loss": 2.0, "lr": 0.1})
    curve.log(10, {"loss": 1.5, "lr": 0.1})
    now_ms = time.time() * 1000
    first, second = (json.loads(line) for line in (workspace / "curve.jsonl").read_text().splitlines())
    assert begun_ms <= first.pop("time_ms") <= second.pop("time_ms") <= now_ms
    assert (first, second) == ({"step": 0, "loss": 2.0, "lr": 0.1}, {"step": 10, "loss": 1.5, "lr": 0.1})
    curve.close()
    curve.close()
    assert history(run_id, "train/loss") == [(0, 2.0), (10, 1.5)]
    assert history(run_id, "train/lr") == [(0, 0.1), (10, 0.1)]


def test_points_are_sent_while_the_run_goes_on(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "SEND_EVERY_S", 0.05)
    run_id = opened()
    with Curve(workspace / "curve.jsonl", run_id, 0) as curve:
        curve.log(0, {"loss": 2.0})
        until(lambda: history(run_id, "train/loss") == [(0, 2.0)])
        curve.log(10, {"loss": 1.0})
        until(lambda: history(run_id, "train/loss") == [(0, 2.0), (10, 1.0)])


def test_a_training_that_ends_in_an_error_leaves_no_thread_behind(workspace: Path) -> None:
    def train() -> None:
        curve = Curve(workspace / "curve.jsonl", run_id, 0)
        curve.log(0, {"loss": 2.0})
        raise ValueError("no picture")

    run_id = opened()
    with pytest.raises(ValueError, match="no picture"):
        train()
    gc.collect()
    assert history(run_id, "train/loss") == [(0, 2.0)]
    assert "mlflow points" not in [thread.name for thread in threading.enumerate()]


def test_a_point_sent_later_keeps_its_time(workspace: Path) -> None:
    (workspace / "curve.jsonl").write_text('{"step": 0, "loss": 2.0, "time_ms": 1700000000000}\n')
    run_id = opened()
    Curve(workspace / "curve.jsonl", run_id, FOREVER).close()
    assert [point.timestamp for point in client().get_metric_history(run_id, "train/loss")] == [1700000000000]


def test_a_resumed_run_repeats_no_point_on_disk_or_in_mlflow(workspace: Path) -> None:
    path, run_id = workspace / "curve.jsonl", opened()
    with Curve(path, run_id, 0) as curve:
        for step in range(0, 50, 10):
            curve.log(step, {"loss": 100.0 - step})
        curve.log(20, {"val_miou": 0.5, "aux0.loss_mask": 2.0})
    # Killed after step 40; its last checkpoint is from step 20, so steps 20 to 40 are made again.
    with Curve(path, opened(), 20) as curve:
        for step in range(20, 70, 10):
            curve.log(step, {"loss": 100.0 - step})
        curve.log(20, {"val_miou": 0.5, "aux0.loss_mask": 2.0})
    whole = [(step, 100.0 - step) for step in range(0, 70, 10)]
    assert [(p["step"], p["loss"]) for p in read_curve(path) if "loss" in p] == whole
    assert sorted(history(run_id, "train/loss")) == whole
    assert history(run_id, "val/miou") == [(20, 50.0)]


def test_a_line_torn_by_a_kill_is_dropped(workspace: Path) -> None:
    path = workspace / "curve.jsonl"
    path.write_text('{"step": 0, "loss": 2.0, "time_ms": 5}\n{"step": 10, "lo')
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
    assert read_curve(workspace / "curve.jsonl") == [{"step": 3, "loss": None}]
    [(step, value)] = history(run_id, "train/loss")
    assert step == 3
    assert math.isnan(value)


def test_a_long_backlog_is_sent_in_whole_points(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "METRICS_PER_BATCH", 7)  # three points of two metrics each fit
    path = workspace / "curve.jsonl"
    with Curve(path, None, 0) as curve:  # nothing is sent without a run
        for step in range(10):
            curve.log(step, {"loss": float(step), "lr": 0.5})
    run_id = opened()
    Curve(path, run_id, FOREVER).close()  # later, with a run: everything on disk is sent
    assert sorted(history(run_id, "train/loss")) == [(step, float(step)) for step in range(10)]
    assert sorted(history(run_id, "train/lr")) == [(step, 0.5) for step in range(10)]


def test_a_running_training_is_tagged_without_waiting() -> None:
    run_id = opened()
    set_tags(run_id, {"m2f.below_reference": "step 10"})
    until(lambda: client().get_run(run_id).data.tags.get("m2f.below_reference") == "step 10")


def test_nothing_happens_without_a_run(workspace: Path) -> None:
    (workspace / "mlflow.db").unlink()
    set_tags(None, {"a": "b"})
    assert not (workspace / "mlflow.db").exists()


# A run folder and its MLflow run


def trained(run_key: str = "k0", *, seed: int = 0, points: int = 3, evaluated: bool = True) -> Path:
    """The folder that a training and its evaluation leave behind."""
    folder = Path("storage/runs", run_key).absolute()
    folder.mkdir(parents=True)
    lines = [
        point_line(10 * (n + 1), {"loss": 2.0 - n / 10, "lr": 0.1}, 1_700_000_000_000 + n) + "\n" for n in range(points)
    ]
    (folder / "curve.jsonl").write_text("".join(lines))
    write_note(folder, dataclasses.replace(CPU, device="EPYC", git_commit="abc"))
    if evaluated:
        shown = evaluation_dir(folder, "e0")
        (shown / "overlays").mkdir(parents=True)
        (shown / "figures.json").write_text('{"test_miou": 0.5, "test_a (b)": 0.25}')
        (shown / "per_class.png").write_bytes(b"chart")
        (shown / "overlays" / "00000.png").write_bytes(b"picture")
        evaluation_dir(folder, "e1").mkdir()  # of other test settings
        (evaluation_dir(folder, "e1") / "figures.json").write_text('{"test_miou": 0.1}')
    return folder


def described(run_key: str = "k0", **more: Any) -> dict[str, Any]:
    name = {"dataset": "shapes", "row": "shapes_tiny", "name": "shapes_tiny seed 0", "run_key": run_key}
    return {**name, "params": {"seed": 0, "train": {"steps": 30}}, "tags": {"m2f.seed": "0"}, **more}


def assert_all_is_there(run_id: str, *, points: int = 3) -> None:
    run = client().get_run(run_id)
    assert sorted(history(run_id, "train/loss")) == [(10 * (n + 1), 2.0 - n / 10) for n in range(points)]
    assert len(history(run_id, "train/lr")) == points
    assert history(run_id, "test/miou") == [(0, 50.0)]
    assert history(run_id, "test/a _b_") == [(0, 25.0)]
    assert run.data.params == {"seed": "0", "train.steps": "30"}
    known = {"m2f.seed": "0", "m2f.device": "EPYC", "m2f.device_type": "cpu", "m2f.git_commit": "abc"}
    known |= {"mlflow.source.git.commit": "abc", "m2f.status": "finished", "m2f.run_key": "k0"}
    assert known.items() <= run.data.tags.items()
    assert run.info.status == "FINISHED"
    files = [file.path for folder in ("evaluation", "overlays") for file in client().list_artifacts(run_id, folder)]
    assert files == ["evaluation/per_class.png", "overlays/00000.png"]


def test_catching_up_sends_a_whole_run_folder_and_a_second_time_nothing(workspace: Path) -> None:
    folder = trained()
    assert catch_up(folder, status="finished") is None  # nobody has opened a run for it
    first = open_run(**described(), run_dir=folder)
    for _ in range(2):
        assert catch_up(folder, status="finished", evaluations={"last": "e0"}) == first
        assert_all_is_there(first)


def test_a_new_server_is_filled_from_the_run_folder_alone(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = trained()
    open_run(**described(), run_dir=folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///another.db")
    run_id = catch_up(folder, status="finished", evaluations={"last": "e0"})
    assert_all_is_there(run_id)
    info = client().get_run(run_id).info
    assert info.end_time == 1_700_000_000_002  # at its last point
    assert info.start_time == json.loads((folder / "run.json").read_text())["opened_ms"]


@pytest.mark.parametrize(
    ("file", "text", "sentence"),
    [
        ("environment.json", "{", r"environment\.json is not JSON .*training the row again"),
        ("evaluations/e0/figures.json", "{", r"figures\.json is not JSON .* dvc repro -f evaluate@shapes_tiny$"),
        ("evaluations/e0/figures.json", "[1]", r"figures\.json holds no figures by name; .*evaluate@shapes_tiny$"),
        ("evaluations/e0/figures.json", '{"test_miou": "0.5"}', r"figures\.json holds no figures by name; "),
    ],
)
def test_a_torn_file_of_a_run_folder_is_named_and_not_the_server(
    workspace: Path, file: str, text: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained()
    open_run(**described(), run_dir=folder)
    (folder / file).write_text(text)
    with pytest.raises(ValueError, match=sentence):
        catch_up(folder, status="finished", evaluations={"last": "e0"})
    assert "MLflow" not in capsys.readouterr().err


def test_changed_files_and_figures_replace_those_shown(workspace: Path) -> None:
    folder = trained()
    run_id = open_run(**described(), run_dir=folder)
    catch_up(folder, status="finished", evaluations={"last": "e0"})
    shown = evaluation_dir(folder, "e0")
    (shown / "overlays" / "00000.png").write_bytes(b"another picture")
    (shown / "figures.json").write_text('{"test_miou": 0.6}')
    catch_up(folder, status="finished", evaluations={"last": "e0"})
    downloaded = client().download_artifacts(run_id, "overlays/00000.png")
    assert Path(downloaded).read_bytes() == b"another picture"
    assert client().get_run(run_id).data.metrics["test/miou"] == 60.0


@pytest.mark.parametrize(
    ("status", "shown"), [("finished", "FINISHED"), ("failed", "FAILED"), ("diverged", "FAILED"), ("stopped", "KILLED")]
)
def test_a_run_shows_how_its_training_ended(workspace: Path, status: str, shown: str) -> None:
    folder = trained(evaluated=False)
    run_id = open_run(**described(), run_dir=folder)
    catch_up(folder, status=status)
    run = client().get_run(run_id)
    assert (run.info.status, run.data.tags["m2f.status"]) == (shown, status)


def test_a_published_run_joins_the_rows_seeds_and_leaves_the_rows_status(workspace: Path) -> None:
    ours, published = trained("k0"), trained("published-1")
    open_run(**described("k0"), run_dir=ours)
    tags = {"m2f.published": "true"}
    open_run(**described("published-1", tags=tags), run_dir=published, running=False)
    runs = [client().get_run(catch_up(folder)) for folder in (ours, published)]
    parents = {run.data.tags["mlflow.parentRunId"] for run in runs}
    assert len(parents) == 1
    assert client().get_run(parents.pop()).info.status == "RUNNING"  # our seed is still training


def test_the_machines_load_is_sampled_into_the_run_folder_and_sent(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "SEND_EVERY_S", 0.05)
    monkeypatch.setattr(sender, "SAMPLE_EVERY_S", 0.05)
    run_id = open_run(**described(), run_dir=workspace)
    begun_s = int(time.time())
    with Curve(workspace / "curve.jsonl", run_id, 0, run_dir=workspace):
        until(lambda: "system/cpu_utilization_percentage" in client().get_run(run_id).data.metrics)
    (point, *_) = read_curve(workspace / "load.jsonl")
    assert 0 <= point["system/cpu_utilization_percentage"] <= 100
    assert point["system/system_memory_usage_megabytes"] > 0
    assert begun_s <= point["step"] <= time.time()


def test_a_sample_of_the_machines_load_costs_little_more_than_the_kernels_counters(workspace: Path) -> None:
    client()
    load = SystemLoad()

    def counters() -> None:
        psutil.cpu_percent(), psutil.virtual_memory(), psutil.disk_usage("/"), psutil.net_io_counters()

    spent_s = {load.sample: 0.0, counters: 0.0}
    for _ in range(100):
        for call in spent_s:
            begun_s = time.process_time()
            call()
            spent_s[call] += time.process_time() - begun_s
    assert spent_s[load.sample] < 4 * spent_s[counters]  # measured: 1.25 times; a process that is started: 20


def test_one_command_brings_mlflow_up_to_date_with_results(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained("k0"), trained("k1", seed=1)
    for key in ("k0", "k1"):
        open_run(**described(key), run_dir=Path("storage/runs", key))
    settings = settings_key(load_params(PARAMS).row("shapes_tiny"))
    write_result(training("shapes_tiny", [trained_seed(n) for n in (0, 1)], settings), "shapes_tiny")
    evaluated = [evaluated_seed(n, checkpoint("panoptic", 0.5)) for n in (0, 1)]
    write_result(evaluation("shapes_tiny", evaluated, task="panoptic"), "shapes_tiny")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workspace}/empty.db")
    monkeypatch.setattr(sys, "argv", ["track", "--params", str(PROJECT / "params.yaml")])
    for _ in range(2):
        track()
        first, page = capsys.readouterr().out.splitlines()
        assert first == f"shapes_tiny: 3 of 3 runs are up to date in sqlite:///{workspace}/empty.db"
        assert re.fullmatch(
            r"panoptic rows beside each other: http://127.0.0.1:5000/#/experiments/\d+/runs\?"
            r"viewStateShareKey=panoptic-rows, after: mlflow ui --backend-store-uri sqlite:///.+",
            page,
        )
    runs = client().search_runs([client().get_experiment_by_name("mask2former").experiment_id])
    assert sorted((run.info.run_name, run.info.status) for run in runs) == [
        ("shapes_tiny", "FINISHED"), ("shapes_tiny seed 0", "FINISHED"), ("shapes_tiny seed 0", "FINISHED")
    ]  # fmt: skip
    (row,) = [run for run in runs if run.info.run_name == "shapes_tiny"]
    assert row.data.metrics["test/miou_median"] == 50.0


def test_a_torn_file_stops_neither_the_other_seeds_nor_the_other_rows(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = load_params(PARAMS).row("shapes_tiny")
    for key in ("k0", "k1"):
        open_run(**described(key), run_dir=trained(key))
    Path("storage/runs/k0/environment.json").write_text("{")
    write_result(training("shapes_tiny", [trained_seed(n) for n in (0, 1)], settings_key(row)), "shapes_tiny")
    Path("results/train/ade20k_r50.json").write_text("{")
    Path("results/train/earlier_row.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["track", "--params", PARAMS])
    with pytest.raises(ValueError, match="^not all of shapes_tiny, ade20k_r50 is up to date in sqlite:.*above$"):
        track()
    said = capsys.readouterr()
    torn = sorted(said.err.splitlines())
    assert torn[0].startswith("error: ade20k_r50: results/train/ade20k_r50.json is not JSON")
    assert torn[1].startswith("error: shapes_tiny: ") and "k0/environment.json is not JSON" in torn[1]
    assert len(torn) == 2
    assert f"left as they are, because {PARAMS} has no such row: earlier_row" in said.out
    runs = client().search_runs([client().get_experiment_by_name("mask2former").experiment_id])
    keys = {run.data.tags["m2f.run_key"]: run.info.status for run in runs if "m2f.run_key" in run.data.tags}
    assert keys == {"k0": "RUNNING", "k1": "FINISHED"}
    assert [run.data.tags["m2f.seeds"] for run in runs if "m2f.seeds" in run.data.tags] == ["2 finished"]


def test_the_command_leaves_a_row_whose_settings_have_changed_and_says_so(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    open_run(**described("k0"), run_dir=trained("k0"))
    write_result(training("shapes_tiny", [trained_seed(0)], "of other settings"), "shapes_tiny")
    monkeypatch.setattr(sys, "argv", ["track", "--params", PARAMS])
    track()
    first, second, _ = capsys.readouterr().out.splitlines()
    assert first.startswith("shapes_tiny: its trainings are of other settings than params.yaml has now, so the row")
    assert second.startswith("shapes_tiny: 1 of 1 runs are up to date in sqlite:")


def test_the_command_names_a_server_that_takes_nothing(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained("k0")
    uri = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    open_run(**described("k0"), run_dir=Path("storage/runs/k0"))
    settings = settings_key(load_params(PARAMS).row("shapes_tiny"))
    write_result(training("shapes_tiny", [trained_seed(0)], settings), "shapes_tiny")
    monkeypatch.setattr(sys, "argv", ["track", "--params", str(PROJECT / "params.yaml")])
    with pytest.raises(OSError, match=f"{uri} did not take 2 runs; run python -m stages.track again"):
        track()


# Outages, with real servers on loopback


@contextlib.contextmanager
def down(workspace: Path) -> Iterator[int]:
    """A port where nobody listens."""
    yield free_port()


@contextlib.contextmanager
def hanging(workspace: Path) -> Iterator[int]:
    """A port where connections are taken by the kernel, and nobody reads them."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(128)
        yield int(silent.getsockname()[1])


@contextlib.contextmanager
def slow(workspace: Path, *, delay_s: float = 4.0) -> Iterator[int]:
    """A real server behind a wire on which every request takes 4 s."""
    port = free_port()
    with Server(workspace, port), Wire(port, delay_s=delay_s) as wire:
        yield wire


sluggish = functools.partial(slow, delay_s=0.5)


LIFE = """
import json, os, sys, time
from pathlib import Path
from pipeline.tracking import client as mlflow_client
from pipeline.tracking import mlflow_runs as tracking
from pipeline.tracking.curve import Curve
from pipeline.tracking.rows import tracked_row
from pipeline.params.load import load_params
folder, process, pause_s = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
mlflow_client.mlflow_client()  # importing MLflow is not the server's fault
run = json.loads((folder / "described.json").read_text())
spent = 0.0
def timed(call, *args, **kwargs):
    global spent
    begun = time.monotonic()
    result = call(*args, **kwargs)
    spent += time.monotonic() - begun
    return result
if process == "train":
    run_id = timed(tracking.open_run, **run, run_dir=folder)
    curve = timed(Curve, folder / "curve.jsonl", run_id, 10**9, run_dir=folder)
    for n in range(3, 103):
        timed(curve.log, 10 * (n + 1), {"loss": 2.0 - n / 10, "lr": 0.1})
        time.sleep(pause_s)
    timed(curve.close)
timed(tracking.catch_up, folder, status="finished", evaluations={"last": "e0"} if process == "evaluate" else None)
row = load_params(sys.argv[4]).row("shapes_tiny")
timed(tracking.log_row, row, tracked_row(row, None), statuses=["finished"])
print(spent)
"""


@pytest.mark.parametrize(
    "outage",
    [
        pytest.param(down, id="down", marks=pytest.mark.long),
        pytest.param(hanging, id="hanging", marks=pytest.mark.full),
        pytest.param(slow, id="4 s", marks=pytest.mark.full),
        pytest.param(sluggish, id="0.5 s", marks=pytest.mark.full),
    ],
)
def test_an_outage_costs_a_training_and_its_evaluation_ten_seconds_and_loses_nothing(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, outage: Any
) -> None:
    def spent_s(run_key: str, port: int, *, pause_s: float) -> float:
        """In calls of MLflow, by a training and its evaluation, each in a process of its own."""
        folder = trained(run_key)
        (folder / "described.json").write_text(json.dumps(described(run_key)))
        environment = {**os.environ, "PYTHONPATH": str(PROJECT), "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}
        spent = 0.0
        for process in ("train", "evaluate"):
            command = [sys.executable, "-c", LIFE, str(folder), process, str(pause_s), PARAMS]
            answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            spent += float(answer.stdout)
        return spent

    with outage(workspace) as port:
        in_outage_s = spent_s("k0", port, pause_s=0.12)  # long enough for two attempts to send
    port, folder = free_port(), Path("storage/runs/k0").absolute()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    with Server(workspace, port):
        undisturbed_s = spent_s("k1", port, pause_s=0.0)  # what this machine takes for the same calls
        print(f"seconds: {in_outage_s:.1f}, and {undisturbed_s:.1f} with a server")
        assert in_outage_s - undisturbed_s < 10.0
        for _ in range(2):
            run_id = catch_up(folder, status="finished", evaluations={"last": "e0"}, patient=True)
        assert run_id is not None
        assert_all_is_there(run_id, points=103)


TRAINING = """
import json, sys, time
from pathlib import Path
from pipeline.tracking import sender
from pipeline.tracking import mlflow_runs as tracking
from pipeline.tracking.curve import Curve
sender.SEND_EVERY_S, sender.RETRY_AFTER_S = 0.05, 0.2
folder, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
run_id = tracking.open_run(**json.loads(Path("described.json").read_text()), run_dir=folder)
with Curve(folder / "curve.jsonl", run_id, first, run_dir=folder) as curve:
    for step in range(first, last):
        curve.log(step, {"loss": float(step), "lr": 0.5})
        print(step, flush=True)
        time.sleep(0.02)
tracking.catch_up(folder, status="finished")
"""


@pytest.mark.long
def test_every_point_arrives_once_though_training_and_server_are_killed_and_frozen(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("described.json").write_text(json.dumps(described()))
    folder = workspace / "run"
    folder.mkdir()
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "MLFLOW_HTTP_REQUEST_TIMEOUT": "1"}

    def training(first: int, last: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", TRAINING, str(folder), str(first), str(last)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    def reaches(process: subprocess.Popen[str], step: int) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == step:
                return
        raise AssertionError(f"the training ended before step {step}")

    server = Server(workspace, port)
    with server:
        process = training(0, 10**6)
        reaches(process, 150)
        os.killpg(server.process.pid, signal.SIGSTOP)  # requests wait in its sockets, and are worked on later
        reaches(process, 250)
        os.killpg(server.process.pid, signal.SIGCONT)
        reaches(process, 350)
        process.kill()
        process.wait()
    process = training(200, 500)  # its checkpoint was of step 200; the server is gone, and returns meanwhile
    reaches(process, 300)
    with server:
        assert process.wait(LIMIT_S) == 0
        run_id = catch_up(folder, status="finished", evaluations={"last": "e0"}, patient=True)
        assert run_id is not None
        for metric in ("train/loss", "train/lr"):
            assert [step for step, _ in sorted(history(run_id, metric))] == list(range(500))


class Wire:
    """Passes connections on to a port of this machine; what a client says takes `delay_s` to arrive."""

    def __init__(self, port: int, *, delay_s: float) -> None:
        self.port, self.delay_s = port, delay_s

    def __enter__(self) -> int:
        self.listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()
        return int(self.listener.getsockname()[1])

    def __exit__(self, *_: object) -> None:
        self.listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                server = socket.create_connection(("127.0.0.1", self.port))
                for source, target, delay_s in ((client, server, self.delay_s), (server, client, 0.0)):
                    threading.Thread(target=self._pass, args=(source, target, delay_s), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, delay_s: float) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 20):
                time.sleep(delay_s)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
