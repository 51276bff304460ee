"""Evaluation: shares of the validation set add up exactly, and only the checkpoints that training wrote count."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from m2f import build_model
from pipeline.data.images.codecs import decode_image
from pipeline.evaluation.evaluate import commonest_class, evaluate_row
from pipeline.evaluation.task_metrics import TaskMetrics, measure
from pipeline.params.schema import Row, VerdictConfig
from pipeline.params.tasks import FIGURES, percent
from pipeline.runs.outcome import evaluation_dir
from pipeline.storage.results.data import Manifest
from pipeline.tracking.mlflow_runs import track_row
from pipeline.training.seeds import train_row
from tests.helpers import made_up
from tests.helpers.manifests import made_up_manifest
from tests.pipeline.conftest import NO_WEIGHTS


@pytest.fixture(params=["semantic", "panoptic", "instance"])
def task_row(request: pytest.FixtureRequest, small_row: Row) -> Row:
    """The small row under each task; three of the nine classes are things."""
    model = small_row.model
    if request.param == "instance":
        model = dataclasses.replace(model, num_classes=3)
    return dataclasses.replace(small_row, task=request.param, model=model)


def test_shares_of_the_validation_set_add_up_to_the_whole(small_manifest: Manifest, task_row: Row) -> None:
    torch.manual_seed(0)
    model = build_model(task_row.model)
    # sure of its predictions, so that something is found and matched
    row = dataclasses.replace(task_row, test=dataclasses.replace(task_row.test, score_threshold=0.0))
    whole = measure(model, small_manifest, row)
    assert set(whole.figures()) == set(FIGURES[row.task])
    for workers in (2, 5):  # 3 pictures: some of five workers have none
        merged = TaskMetrics(row, small_manifest)
        for worker in range(workers):
            merged.merge(measure(model, small_manifest, row, worker=worker, workers=workers))
        assert merged.figures() == whole.figures()
        assert merged.per_class() == whole.per_class()


def test_predicting_the_commonest_class_is_worked_out_from_the_histograms() -> None:
    pixels = {"train": (10, 90, 5), "val": (30, 50, 20)}
    manifest = made_up_manifest(class_names=("a", "b", "c"), pixels=pixels)
    # everything is called b: IoU of b 50 / 100, of a and c 0; one of three classes fully right
    found = commonest_class(manifest)
    assert found.class_name == "b"
    assert found.figures == pytest.approx({"miou": 0.5 / 3, "mean_accuracy": 1 / 3, "pixel_accuracy": 0.5})


@pytest.mark.slow
def test_a_row_is_evaluated_tracked_and_drawn(
    two_steps: Row, small_data: tuple[Path, Manifest], tmp_path: Path
) -> None:
    manifest = small_data[1]
    trained = train_row(two_steps, manifest=manifest, weights=NO_WEIGHTS)
    result = evaluate_row(two_steps, manifest=manifest, trained=trained)
    ids = track_row(two_steps, result.seeds, manifest=manifest, decides=result.decides, verdict=VerdictConfig())
    (seed,) = result.seeds
    assert seed.checkpoints is not None and ids[seed.run_key] == seed.mlflow_run_id
    last = seed.checkpoints.last
    assert set(last.figures) == set(FIGURES["panoptic"])
    assert last.figures == trained.seeds[0].metrics  # the loop's validation is the same evaluation
    assert result.median == last.figures and result.primary == "pq" and result.decides == "last"
    assert tuple(last.per_class["iou"]) == manifest.class_names
    assert tuple(last.per_class["ap"]) == manifest.thing_classes
    known = [iou for iou in last.per_class["iou"].values() if iou is not None]
    assert np.mean(known) == pytest.approx(last.figures["miou"])

    # three validation pictures of 64 x 96: picture, prediction and truth side by side, 4 pixels apart
    assert len(result.overlays) == 3
    overlay = decode_image((tmp_path / "storage" / result.overlays[0]).read_bytes(), "overlay")
    assert overlay.shape == (64, 3 * 96 + 2 * 4, 3)

    folder = evaluation_dir(tmp_path / "storage" / trained.seeds[0].run_dir, last.key)
    pixels = json.loads((folder / "confusion.json").read_text())
    assert tuple(pixels["class_names"]) == manifest.class_names
    # one row per true class: the pixels that the validation pictures hold of it
    assert tuple(sum(row) for row in pixels["true_by_predicted"]) == manifest.pixels["val"]

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    run = client.get_run(seed.mlflow_run_id)
    assert run.data.metrics["test/miou"] == pytest.approx(percent(last.figures["miou"]))
    assert result.parameters == sum(each.numel() for each in build_model(two_steps.model).parameters())
    table = (folder / "per_class.csv").read_text().splitlines()
    assert table[0] == "class,pq,ap,iou" and len(table) == 1 + len(manifest.class_names)
    assert all(len(line.split(",")) == 4 for line in table)
    assert [file.path for file in client.list_artifacts(run.info.run_id, "evaluation")] == [
        f"evaluation/{name}"
        for name in ("confusion.json", "confusion.png", "images.json", "per_class.json", "per_class.png")
    ]
    tags = run.data.tags
    assert (tags["m2f.status"], tags["m2f.seed"], tags["m2f.data_digest"]) == ("finished", "1", manifest.digest)
    assert (tags["m2f.workers"], tags["m2f.device"]) == ("1", trained.seeds[0].environment.device)
    parent = client.get_run(tags["mlflow.parentRunId"])
    assert parent.info.status == "FINISHED" and parent.data.tags["m2f.seeds"] == "1 finished"
    assert {output.model_id for output in run.outputs.model_outputs} and parent.data.params["steps"] == "2"


@pytest.mark.slow
def test_the_checkpoint_rule_says_which_figures_are_reported(two_steps: Row, small_data: tuple[Path, Manifest]) -> None:
    # Validated after step 1 and 2; the better of the two is the best, the second the last.
    row = dataclasses.replace(two_steps, train=dataclasses.replace(two_steps.train, val_interval=1))
    trained = train_row(row, manifest=small_data[1], weights=NO_WEIGHTS)
    reported = {}
    for rule in ("unknown", "last", "best"):
        ruled = dataclasses.replace(row, checkpoint_rule=rule)
        result = evaluate_row(ruled, manifest=small_data[1], trained=trained)
        decides = {"unknown": "last", "last": "last", "best": "best"}[rule]
        assert result.decides == decides and result.checkpoint_rule == rule
        checkpoints = result.seeds[0].checkpoints
        assert checkpoints is not None
        assert result.median["pq"] == checkpoints[decides].figures["pq"]
        reported[rule] = checkpoints
    assert reported["unknown"] == reported["best"]  # both checkpoints are always there


def test_an_altered_or_missing_checkpoint_is_not_evaluated(
    two_steps: Row, small_data: tuple[Path, Manifest], tmp_path: Path
) -> None:
    trained = train_row(two_steps, manifest=small_data[1], weights=NO_WEIGHTS)
    (path,) = (tmp_path / "storage").glob("runs/*/checkpoints/*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is not the one train@small wrote .* run dvc repro -f train@small"):
        evaluate_row(two_steps, manifest=small_data[1], trained=trained)
    path.unlink()
    with pytest.raises(ValueError, match=r"is missing from the storage root .*: dvc repro -f train@small"):
        evaluate_row(two_steps, manifest=small_data[1], trained=trained)


def test_a_row_without_a_finished_seed_is_one_sentence(two_steps: Row, small_data: tuple[Path, Manifest]) -> None:
    failed = made_up.trained_seed(1, status="failed", checkpoints=None)
    with pytest.raises(ValueError, match=r"no seed of row small has finished, .*: dvc repro -f train@small"):
        evaluate_row(two_steps, manifest=small_data[1], trained=made_up.training("small", [failed]))


def forget_evaluations(folder: Path) -> None:
    for path in (folder / "storage").glob("runs/*/evaluations"):
        shutil.rmtree(path)


@pytest.mark.ray
def test_ray_tasks_evaluate_to_the_same_figures_as_one_process(
    two_steps: Row, small_data: tuple[Path, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    trained = train_row(two_steps, manifest=small_data[1], weights=NO_WEIGHTS)
    alone = evaluate_row(two_steps, manifest=small_data[1], trained=trained)
    forget_evaluations(tmp_path)
    monkeypatch.setenv("M2F_WORKERS", "2")
    try:
        shared = evaluate_row(two_steps, manifest=small_data[1], trained=trained)
        forget_evaluations(tmp_path)
        (shard,) = (tmp_path / "storage").glob("shards/*/val-*.arrow")
        shard.unlink()
        with pytest.raises(ValueError, match=r"^shards/.* is missing from the storage root") as caught:
            evaluate_row(two_steps, manifest=small_data[1], trained=trained)
        assert "Traceback" not in str(caught.value)  # the task's sentence, not Ray's report of it
    finally:
        ray.shutdown()
    assert shared == alone
