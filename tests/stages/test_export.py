"""The command export, as a user calls it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.params.load import load_params
from pipeline.storage.results.folder import write_result
from tests.helpers.registered import results_of
from tests.helpers.shared import PROJECT
from tests.helpers.waiting import LIMIT_S


@pytest.fixture
def workspace(tmp_path: Path, storage: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose row shapes_tiny has one layer of each decoder and one finished seed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    tree = yaml.safe_load((PROJECT / "params.yaml").read_text())
    layers = {"pixel_decoder": {"layers": 1}, "query_decoder": {"layers": 1}}
    tree["rows"]["shapes_tiny"] |= {"model": {**tree["rows"]["shapes_tiny"].get("model", {}), **layers}}
    Path("params.yaml").write_text(yaml.safe_dump(tree))
    results = results_of(load_params("params.yaml").row("shapes_tiny"), storage, {3: 0.5})
    write_result(results["evaluated"], "shapes_tiny")
    write_result(results["trained"], "shapes_tiny")
    return tmp_path


def export(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stages.export", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("shapes_tiny", "--out", "params.yaml"),
            "params.yaml exists; choose another --out, or",
        ),
        (
            ("shapes_tyni", "--out", "a.pt2"),
            "shapes_tyni is no file, no registered model ",
        ),
    ],
)
def test_what_the_user_can_mend_is_one_sentence(workspace: Path, words: tuple[str, ...], said: str) -> None:
    done = export(*words, "--format", "torch.export")
    assert done.returncode == 1 and done.stderr.startswith(f"error: {said}") and done.stderr.count("\n") == 1


@pytest.mark.long
def test_a_rows_best_seed_becomes_a_file_and_the_command_says_how_near_it_is(workspace: Path) -> None:
    done = export("shapes_tiny", "--format", "torch.export", "--out", "tiny.pt2", "--input", "float32")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("tiny.pt2: seed 3 of shapes_tiny, last checkpoint, step 2, ")
    assert second.startswith("largest difference: class_logits ") and second.endswith("; 0 of 360 queries apart")
    assert "the figure is not compared: the shards of shapes are not here; make them with: dvc repro" in done.stderr
    assert "shapes_tiny: tracing the network, which takes minutes" in done.stderr
    assert (workspace / "tiny.pt2").stat().st_size > 2**20
