"""Rows, five seeds and the published curve in MLflow's own pages, in a real browser, from a real server.

The curves are made up; everything that shows them is ours or MLflow's. M2F_SCREENSHOTS keeps the pictures.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from pipeline.evaluation import evaluate_checkpoint
from pipeline.evaluation.task_metrics import TaskMetrics
from pipeline.params.load import load_params
from pipeline.params.schema import Row
from pipeline.provenance.run_key import settings_key
from pipeline.runs.curve_file import point_line, read_points
from pipeline.runs.outcome import Finished, TrackedRun, note_of, write_note
from pipeline.storage.results.folder import write_result
from pipeline.storage.results.rows import BestCheckpoint, EvaluatedSeed, TrainedCheckpoint, TrainedCheckpoints
from pipeline.tracking import mlflow_runs
from pipeline.tracking.sender import SystemLoad
from tests.helpers.browser import CHROMIUM, Browser
from tests.helpers.made_up import (
    A100,
    checkpoint,
    evaluated_seed,
    evaluation,
    padded,
    published_evaluation,
    trained_seed,
    training,
)
from tests.helpers.manifests import made_up_manifest
from tests.helpers.mlflow_server import Server, free_port
from tests.helpers.shared import PROJECT

ROW = "ade20k_swin-t"
OTHER_ROWS = {"ade20k_r50": 0.4765, "ade20k_swin-s": 0.5205, "cityscapes_r50": 0.8010}
"""Rows with results alone, and their mIoU."""
MANIFEST = made_up_manifest(dataset="ade20k")
BEGUN_MS = 1_790_000_000_000
STEP_MS = 350


def curve(row: Row, rng: np.random.Generator, level: float) -> list[tuple[int, dict[str, float]]]:
    """A training as it might be: losses every 500 steps, validation every 5000."""
    points = []
    for step in range(500, row.train.steps + 1, 500):
        left = 1 - step / row.train.steps
        values = {name: share * (14 + 40 * math.exp(-step / 6000) + rng.normal(0, 1.2)) for name, share in LOSSES}
        values |= {"loss": sum(values.values()), "lr": 1e-4 * left**0.9, "grad_norm": 30 + rng.exponential(8)}
        if step % row.train.val_interval == 0:
            miou = level * (1 - 0.55 * math.exp(-step / 22_000)) + rng.normal(0, 0.0035)
            values |= {"val_miou": miou, "val_mean_accuracy": 1.27 * miou, "val_pixel_accuracy": 0.7 + 0.28 * miou}
        points.append((step, values))
    return points


LOSSES = (("loss_class", 0.2), ("loss_mask", 0.3), ("loss_dice", 0.5))


def evaluated(row: Row, names: list[str], rng: np.random.Generator) -> TaskMetrics:
    """Metrics of a network that confuses some classes."""
    classes = len(names)
    metrics = TaskMetrics(row, made_up_manifest(class_names=tuple(names), thing_classes=()))
    pixels = 1e7 * np.exp(-np.arange(classes) / 30)
    right = np.clip(0.9 - 0.004 * np.arange(classes) + rng.normal(0, 0.05, classes), 0.05, 0.97)
    shares = np.random.default_rng(5).dirichlet(np.full(classes, 0.04), classes) * (1 - right)[:, None]
    shares[np.arange(classes), np.arange(classes)] += right
    for metric in (metrics.semantic, metrics.ms_flip):
        assert metric is not None
        metric.confusion = torch.from_numpy((shares * pixels[:, None]).astype(np.int64))
    return metrics


def leave_behind(folder: Path, row: Row, names: list[str], seed: int, *, key: str, published: bool) -> EvaluatedSeed:
    """Write what a training and its evaluation leave in a run folder; the evaluated seed."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    made = curve(row, rng, 0.4866 + (0 if published else rng.normal(0, 0.006)))
    lines = [point_line(step, values, BEGUN_MS + step * STEP_MS) for step, values in made]
    (folder / "curve.jsonl").write_text("\n".join([*lines, ""]))
    if published:
        tags = {"m2f.published": "true", "m2f.task": row.task, "mlflow.source.name": f"stages.published {row.name}"}
        mlflow_runs.open_run(
            dataset=row.dataset,
            row=row.name,
            name=f"published {row.name}",
            run_key=key,
            params={},
            tags=tags,
            run_dir=folder,
            running=False,
        )
    else:
        mlflow_runs.open_training(folder, row, seed=seed, run_key=key, manifest=MANIFEST, workers=8)
        write_note(folder, dataclasses.replace(A100, git_commit="0" * 40))
        (sample,) = read_points([SystemLoad().sample() + "\n"])
        load = {name: value for name, value in sample.items() if name.startswith("system/")}
        load |= {"system/gpu_0_utilization_percentage": 97.0, "system/gpu_0_memory_usage_megabytes": 21_000.0}
        lines = []
        for n in range(200):
            values = {name: value * (1 + 0.02 * rng.normal()) for name, value in load.items()}
            time_ms = BEGUN_MS + n * 280_000
            lines.append(point_line(time_ms // 1000, values, time_ms))
        (folder / "load.jsonl").write_text("\n".join([*lines, ""]))
    remembered = note_of(folder, TrackedRun)
    assert remembered is not None
    write_note(folder, dataclasses.replace(remembered, opened_ms=BEGUN_MS))
    metrics = evaluated(row, names, rng)
    title = f"{'published' if published else f'seed {seed} of'} {row.name}, step {row.train.steps}"
    lines = [
        {"image": f"ADE_val_{n:08d}", "miou": rng.beta(4, 4), "pixel_accuracy": rng.beta(8, 2)} for n in range(200)
    ]
    figures = evaluate_checkpoint.keep(folder, "e0", metrics, step=row.train.steps, title=title, images=lines)
    if not published:
        write_note(folder, finished(row, seed, key))
    return evaluated_seed(seed, figures, run_key=key)


def finished(row: Row, seed: int, key: str) -> Finished:
    """A training whose last checkpoint is its best."""
    last = TrainedCheckpoint(step=row.train.steps, path="checkpoints/last.safetensors", sha256=f"{seed}" * 64)
    best = BestCheckpoint(**dataclasses.asdict(last), figure="miou", value=0.5)
    return Finished(
        run_key=key,
        seed=seed,
        steps=row.train.steps,
        checkpoints=TrainedCheckpoints(last=last, best=best),
        metrics={},
        below_reference=(),
        peak_memory_mib=None,
        train_s=56_000.0,
        images_per_s=45.0,
    )


def leave_results(runs: Path, row: Row, level: float) -> None:
    """Results of three seeds, and run folders that say how their runs are opened."""
    keys = [f"{row.name}-{seed}" for seed in (0, 1, 2)]
    for seed, key in enumerate(keys):
        manifest = made_up_manifest(dataset=row.dataset)
        mlflow_runs.open_training(runs / key, row, seed=seed, run_key=key, manifest=manifest, workers=8)
    seeds = [
        evaluated_seed(n, checkpoint(row.task, level + 0.001 * (n - 1)), run_key=key) for n, key in enumerate(keys)
    ]
    write_result(
        training(row.name, [trained_seed(n, run_key=key) for n, key in enumerate(keys)], settings_key(row)), row.name
    )
    write_result(evaluation(row.name, seeds, parameters=44_000_000), row.name)


@pytest.mark.full
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_five_seeds_and_the_published_curve_are_compared_in_mlflows_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("M2F_STORAGE", str(tmp_path / "storage"))
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    shots = Path(os.environ.get("M2F_SCREENSHOTS") or tmp_path / "screenshots")
    shots.mkdir(parents=True, exist_ok=True)

    params = load_params(PROJECT / "params.yaml")
    row = params.row(ROW)
    row = dataclasses.replace(row, train=dataclasses.replace(row.train, log_every=500))
    names = list(params.dataset(row.dataset).class_names)
    runs = tmp_path / "storage" / "runs"
    # The folders exist before any server does, as after a long outage; then one command fills it.
    monkeypatch.setattr("pipeline.tracking.mlflow_runs.attempt", lambda *_, **__: None)
    seeds = [
        leave_behind(runs / f"key{seed}", row, names, seed, key=f"key{seed}", published=False) for seed in row.seeds
    ]
    leave_behind(runs / "published-1", row, names, 9, key="published-1", published=True)
    write_result(training(ROW, [trained_seed(seed, key="key") for seed in row.seeds], settings_key(row)), ROW)
    write_result(evaluation(ROW, seeds, parameters=47_400_000), ROW)
    for name, level in OTHER_ROWS.items():
        leave_results(runs, params.row(name), level)
    theirs = padded(checkpoint(row.task, 0.4866))
    write_result(published_evaluation(ROW, theirs, curve="runs/published-1/curve.jsonl"), ROW)

    with Server(tmp_path, port):
        command = [sys.executable, "-m", "stages.track", "--params", str(PROJECT / "params.yaml")]
        environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
        answer = subprocess.run(command, env=environment, capture_output=True, text=True)
        *tracked, page = answer.stdout.splitlines()
        assert f"{ROW}: 7 of 7 runs are up to date in http://127.0.0.1:{port}" in tracked, answer.stderr
        assert len(tracked) == 1 + len(OTHER_ROWS) and page.startswith("semantic rows beside each other: http://")

        client = MlflowClient(f"http://127.0.0.1:{port}")
        (experiment,) = [found for found in client.search_experiments() if found.name == "mask2former"]
        found = {run.info.run_name: run.info.run_id for run in client.search_runs([experiment.experiment_id])}
        children = [f"seed {seed} of {ROW}" for seed in row.seeds] + [f"published {ROW}"]
        assert {ROW, *OTHER_ROWS, *children} <= set(found)
        here = f"http://127.0.0.1:{port}/#/experiments/{experiment.experiment_id}"
        ids = [found[name] for name in children]
        query = f"runs={json.dumps(ids)}&experiments={json.dumps([experiment.experiment_id])}"
        (tmp_path / "browser").mkdir()
        wrong: list[str] = []
        with Browser(tmp_path / "browser") as browser:

            def look(url: str, path: Path, *, words: list[str], script: str = "", settle_s: float = 3.0) -> None:
                try:
                    browser.look(url, path, words=words, script=script, before=AS_LEFT_BY_A_PERSON, settle_s=settle_s)
                except AssertionError as error:  # see the other pages too
                    wrong.append(str(error))

            columns = ["m2f.verdict", "test/miou_median", "published/miou", "difference/miou"]
            look(page.partition(": ")[2], shots / "rows.png", words=[ROW, *OTHER_ROWS, *columns], settle_s=6)
            look(f"{here}/runs", shots / "runs.png", words=children, script=UNFOLD)
            charts = f"{here}/runs?compareRunsMode=CHART"
            look(charts, shots / "charts.png", words=children, script=UNFOLD, settle_s=8)
            compared = f"http://127.0.0.1:{port}/#/compare-runs?{query}"
            look(compared, shots / "compare.png", words=children, settle_s=6)
            axes = 'metric="val/miou"&plot_metric_keys=["val/miou"]&x_axis=step'
            curves = f"http://127.0.0.1:{port}/#/metric?{query}&{axes}"
            look(curves, shots / "curves.png", words=["val/miou"], settle_s=8)
            seed = f"{here}/runs/{ids[0]}"
            look(seed, shots / "seed.png", words=["m2f.run_key", "m2f.device"])
            for chart in ("confusion.png", "per_class.png", "per_class.json", "images.json"):
                look(
                    f"{seed}/artifacts/evaluation/{chart}",
                    shots / f"artifact_{chart.replace('.', '_')}.png",
                    words=[chart],
                )
            look(f"{seed}/system-metrics", shots / "system.png", words=["gpu_0_utilization"], settle_s=8)
            look(f"{seed}/model-metrics", shots / "metrics.png", words=["train", "val"], settle_s=8)
            look(f"{here}/runs/{found[ROW]}", shots / "row.png", words=["test/miou_median", "below"])
            look(f"{here}/models", shots / "models.png", words=["seed 0 of"], settle_s=6)
    assert not wrong, "\n\n".join(wrong)
    for shot in shots.glob("*.png"):
        assert shot.stat().st_size > 20_000


AS_LEFT_BY_A_PERSON = """
localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true');
localStorage.setItem('mlflow.workflowType_v1', '"machine_learning"');
"""
"""The panel that covers a quarter of MLflow's pages at the first visit is closed, and "Model training" chosen."""

UNFOLD = """(() => {
  const now = performance.now();
  const rows = [...document.querySelectorAll('.ag-row')].filter((row) => row.innerText.includes('ade20k_swin-t'));
  const button = rows.map((row) => row.querySelector('button[data-component-id*="runnamecellrenderer"]')).find(Boolean);
  if (!button || document.body.innerText.includes('seed 0 of ade20k_swin-t')) window.foldedSince = now;
  if (now - (window.foldedSince ??= now) > 3000) { button.click(); window.foldedSince = now; }
})()"""
"""Shows the runs below ROW's run, where the page has not remembered for three seconds that they were shown."""
