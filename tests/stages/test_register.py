"""The stage register, as a user calls it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.params.load import load_params
from pipeline.storage.results import Registration, read_result, write_result
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
    write_result(results["trained"], row.name, results=tmp_path / "results")
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
    )
    aliases = read_result(Registration, row.name, results=tmp_path / "results").aliases
    assert aliases.best.version == 1 and aliases.median.version == 2
    assert (tmp_path / "storage/mlflow/shapes/models").is_dir()  # found again from other folders
