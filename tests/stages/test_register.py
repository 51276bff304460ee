"""The stage register, as a user calls it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.params.load import load_params
from pipeline.provenance.run_key import settings_key
from pipeline.storage.results.folder import find_result, read_result, waiting, write_result
from pipeline.storage.results.rows import Registration
from tests.helpers.manifests import made_up_manifest
from tests.helpers.project_copy import Copy
from tests.helpers.registered import results_of
from tests.helpers.shared import PROJECT


@pytest.mark.slow
def test_the_stage_registers_a_rows_checkpoints_and_says_under_which_names(tmp_path: Path) -> None:
    copy = Copy(tmp_path)
    params = load_params(PROJECT / "params.yaml")
    row, shapes = params.row("shapes_tiny"), params.dataset("shapes")
    manifest = made_up_manifest(dataset="shapes", class_names=shapes.class_names, thing_classes=shapes.thing_classes)
    write_result(manifest, "shapes", results=tmp_path / "results")
    results = results_of(row, tmp_path / "storage", {0: 0.5654, 1: 0.5883})
    trained = dataclasses.replace(results["trained"], settings=settings_key(row))
    write_result(trained, row.name, results=tmp_path / "results")
    command = [sys.executable, "-m", "stages.register", "shapes_tiny"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode == 1
    assert answer.stderr == (
        "error: results/evaluate/shapes_tiny.json does not exist; make it with: dvc repro -f evaluate@shapes_tiny\n"
    )
    write_result(results["evaluated"], row.name, results=tmp_path / "results")
    assert copy.python("-m", "stages.register", "shapes_tiny") == (
        "models:/shapes-tiny@best is version 1: PQ 58.83, seed 1\n"
        "models:/shapes-tiny@median is version 2: PQ 56.54, seed 0\n"
        "shapes_tiny: the model in MLflow: http://127.0.0.1:5000/#/models/shapes-tiny, after: mlflow ui "
        f"--backend-store-uri sqlite:///{tmp_path}/mlflow.db\n"
    )
    aliases = read_result(Registration, row.name, results=tmp_path / "results").aliases
    assert aliases.best.version == 1 and aliases.median.version == 2
    assert (tmp_path / "storage/mlflow/mask2former/models").is_dir()  # found again from other folders
    write_result(dataclasses.replace(trained, settings="earlier"), row.name, results=tmp_path / "results")
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr == (
        "error: results/train/shapes_tiny.json is of other settings than row shapes_tiny has in params.yaml; train the "
        "row with: dvc repro train@shapes_tiny\n"
    )


def test_a_row_with_registry_false_is_left_out_and_says_so(tmp_path: Path) -> None:
    copy = Copy(tmp_path)
    copy.params["rows"]["shapes_tiny"]["registry"] = False
    copy.write_params()
    said = "shapes_tiny is not registered: rows.shapes_tiny.registry is false in params.yaml\n"
    assert copy.python("-m", "stages.register", "shapes_tiny") == said
    assert find_result(Registration, "shapes_tiny", results=tmp_path / "results") is None
    why = waiting(Registration, "shapes_tiny", results=tmp_path / "results")
    assert why == "rows.shapes_tiny.registry: true in params.yaml"
    assert not (tmp_path / "mlflow.db").exists()
