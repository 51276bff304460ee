"""Kept checkpoints as logged models, and tables of an evaluation: in a real database."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.params.schema import Params, Row
from pipeline.runs.outcome import Finished, evaluation_dir, write_note
from pipeline.storage.files import write_json
from pipeline.storage.results.rows import BestCheckpoint, TrainedCheckpoint, TrainedCheckpoints
from pipeline.tracking.client import mlflow_client
from pipeline.tracking.mlflow_runs import catch_up, open_training
from tests.helpers.manifests import made_up_manifest

KEYS: Any = {"last": "e0", "best": "e1"}


@pytest.fixture
def row(params: Params) -> Row:
    return params.row("ade20k_r50")


@pytest.fixture
def folder(tmp_path: Path, storage: Path, empty_mlflow: Path, row: Row, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run folder of a training whose last and best checkpoint are evaluated."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    folder = storage / "runs/k0"
    open_training(folder, row, seed=3, run_key="k0", manifest=made_up_manifest(dataset="ade20k"), workers=1)
    leave(folder, last="a" * 64, best="b" * 64)
    return folder


def leave(folder: Path, *, last: str, best: str) -> None:
    """finished.json, with these digests of checkpoints, and the evaluations of both."""
    kept = TrainedCheckpoints(
        last=TrainedCheckpoint(step=10, path="checkpoints/step-00000010.safetensors", sha256=last),
        best=BestCheckpoint(
            step=8, path="checkpoints/step-00000008.safetensors", sha256=best, figure="miou", value=0.61
        ),
    )
    write_note(
        folder,
        Finished(
            run_key="k0",
            seed=3,
            steps=10,
            checkpoints=kept,
            metrics={},
            below_reference=(),
            peak_memory_mib=None,
            train_s=1.0,
            images_per_s=1.0,
        ),
    )
    for key, value in (("e0", 0.6), ("e1", 0.61)):
        write_json(evaluation_dir(folder, key) / "figures.json", {"test_miou": value})


def models_of(run_id: str | None) -> dict[str, Any]:
    client = mlflow_client()
    assert run_id is not None
    run = client.get_run(run_id)
    assert {output.model_id for output in run.outputs.model_outputs} == {
        model.model_id for model in client.search_logged_models([run.info.experiment_id])
    }
    return {
        model.name: client.get_logged_model(model.model_id)
        for model in client.search_logged_models([run.info.experiment_id])
    }


def test_every_kept_checkpoint_is_a_logged_model_with_its_figures_on_its_data_set(folder: Path) -> None:
    for _ in range(2):  # a second time nothing is sent
        run_id = catch_up(folder, status="finished", evaluations=KEYS)
    models = models_of(run_id)
    assert set(models) == {"last, seed 3 of ade20k_r50", "best, seed 3 of ade20k_r50"}
    best = models["best, seed 3 of ade20k_r50"]
    (metric,) = best.metrics
    assert (metric.key, metric.value, metric.dataset_name) == ("test/miou", 61.0, "ade20k val")
    assert metric.dataset_digest == made_up_manifest(dataset="ade20k").digest[:16]
    assert (best.status, best.params["step"], best.params["backbone"]) == ("READY", "8", "r50")
    assert best.tags["m2f.checkpoint"] == "runs/k0/checkpoints/step-00000008.safetensors"
    assert best.tags["m2f.checkpoint_sha256"] == "b" * 64 and best.tags["m2f.seed"] == "3"


@pytest.mark.parametrize(("decides", "shown"), [("last", 60.0), ("best", 61.0)])
def test_the_run_itself_shows_the_figures_of_the_checkpoint_that_decides(
    folder: Path, decides: Any, shown: float
) -> None:
    run_id = catch_up(folder, status="finished", evaluations=KEYS, decides=decides)
    assert mlflow_client().get_run(run_id).data.metrics["test/miou"] == shown


def test_a_checkpoint_that_is_last_and_best_is_one_model(folder: Path) -> None:
    leave(folder, last="a" * 64, best="a" * 64)
    assert set(models_of(catch_up(folder, evaluations={"last": "e0", "best": "e0"}))) == {
        "last and best, seed 3 of ade20k_r50"
    }


def test_figures_that_have_changed_are_sent_again(folder: Path) -> None:
    catch_up(folder, evaluations=KEYS)
    write_json(evaluation_dir(folder, "e0") / "figures.json", {"test_miou": 0.5})
    run_id = catch_up(folder, evaluations=KEYS)
    (first, second) = models_of(run_id)["last, seed 3 of ade20k_r50"].metrics
    assert {first.value, second.value} == {60.0, 50.0}
    assert mlflow_client().get_run(run_id).data.metrics["test/miou"] == 50.0


def test_figures_of_every_picture_and_class_are_tables_in_percent(folder: Path) -> None:
    shown = evaluation_dir(folder, "e0")
    write_json(shown / "result.json", {"per_class": {"iou": {"sky": 0.98765, "road": None}}})
    pictures = [{"image": "p1", "miou": 0.5, "pixel_accuracy": 0.75}, {"image": "p2", "miou": None, "instances": 4}]
    write_json(shown / "images.json", pictures)
    run_id = catch_up(folder, evaluations=KEYS)
    assert run_id is not None
    experiment = mlflow_client().get_experiment_by_name("mask2former").experiment_id
    classes = mlflow_client().load_table(experiment, "evaluation/per_class.json", run_ids=[run_id])
    assert json.loads(classes.to_json(orient="values")) == [["sky", 98.77], ["road", None]]
    table = mlflow_client().load_table(experiment, "evaluation/images.json", run_ids=[run_id])
    assert list(table.columns) == ["image", "miou", "pixel_accuracy", "instances"]
    assert json.loads(table.to_json(orient="values")) == [["p1", 50.0, 75.0, None], ["p2", None, None, 4.0]]


@pytest.mark.parametrize(("file", "text"), [("result.json", '{"per_class": 5}'), ("images.json", "{}")])
def test_a_table_that_cannot_be_read_is_named_with_what_makes_it_again(folder: Path, file: str, text: str) -> None:
    (evaluation_dir(folder, "e0") / file).write_text(text)
    with pytest.raises(ValueError, match=rf"{file} holds no .*; make it again with: dvc repro -f evaluate@ade20k_r50"):
        catch_up(folder, status="finished", evaluations=KEYS)
