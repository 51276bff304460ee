"""The stage predict, as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from m2f.model import build_model
from pipeline.params.load import load_params
from pipeline.runs.checkpoints import save_model
from tests.helpers.images import encoded, image, put
from tests.helpers.shared import PROJECT
from tests.helpers.waiting import LIMIT_S

pytestmark = pytest.mark.slow


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """Random weights of shapes_tiny."""
    torch.manual_seed(0)
    tensors = build_model(load_params(PROJECT / "params.yaml").row("shapes_tiny").model).state_dict()
    return str(save_model(tmp_path / "run", step=1, run_key="run", tensors=tensors))


def predict(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stages.predict", *words]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=LIMIT_S)


def test_the_stage_writes_a_folder_and_its_exit_code_says_what_was_left_out(checkpoint: str, tmp_path: Path) -> None:
    put(tmp_path / "in/a.png", encoded(image(64, 96)))
    put(tmp_path / "in/sub/a.png", encoded(image(64, 96, seed=1)))
    words = (
        checkpoint,
        str(tmp_path / "in"),
        "--row",
        "shapes_tiny",
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    )
    answer = predict(*words)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout == (
        f"{tmp_path}/out/index.html shows the predictions of step-00000001.safetensors as shapes_tiny\n"
    )
    content = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [each["file_name"] for each in content["images"]] == ["a.png", "sub/a.png"]
    assert [each["name"] for each in content["categories"]][-1] == "sign"
    put(tmp_path / "in/b.png", b"no picture")
    answer = predict(*words)
    assert answer.returncode == 3
    assert ": 2 images, all finished before\n" in answer.stderr
    assert f"1 image could not be read; {tmp_path}/out/summary.csv says why" in answer.stderr


def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(tmp_path: Path) -> None:
    answer = predict("shapes_tiny", "nowhere", "--out", str(tmp_path / "out"))
    assert answer.returncode == 1
    assert answer.stderr == (
        "error: nowhere is no file or folder, and no file matches it; give images that are there\n"
    )
    answer = predict("shapes_tiny", "docs/report.png", "--out", str(tmp_path / "out"), "--window", "512")
    assert answer.returncode == 1
    assert answer.stderr == (
        "error: --window 512 is no SIZE,OVERLAP; give two numbers of pixels, such as --window 1024,256\n"
    )
    assert not (tmp_path / "out").exists()
