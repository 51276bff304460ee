"""What is wrong with a dataset or a row is said by the stage that meets it first, as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.helpers.images import encoded, put
from tests.helpers.shared import PROJECT
from tests.helpers.waiting import LIMIT_S

pytestmark = pytest.mark.slow


@pytest.fixture
def workspace(tmp_path: Path, storage: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with params.yaml, whose row `own` is on a dataset `mine` in data/mine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    monkeypatch.setenv("M2F_WORKERS", "0")
    write_params(tmp_path)
    return tmp_path


def write_params(workspace: Path, test: dict[str, Any] | None = None, **dataset: Any) -> None:
    params = yaml.safe_load((PROJECT / "params.yaml").read_text())
    own = {**params["rows"]["camvid_tiny"], "dataset": "mine", "seeds": [0]}
    own |= {"preset": "none", "model": {"backbone": {"name": "r50"}}}  # how large it is, is known without torch
    own["test"] = {"short_side": 64, "long_side_max": 128, **(test or {})}
    own["train"]["augmentation"] = {"crop": [64, 64], "short_sides": [64], "long_side_max": 128}
    mine = {"layout": "folder", "sources": ["data/mine"], "class_names": ["background", "object"], **dataset}
    changed = {**params, "datasets": {"mine": mine}, "rows": {"own": own}, "checkpoints": {}}
    (workspace / "params.yaml").write_text(yaml.safe_dump(changed))


def write_images(workspace: Path, split: str, *sizes: tuple[int, int], ids: tuple[int, int] = (0, 1)) -> None:
    """Images whose left half has the first id and whose right half the second."""
    for number, (height, width) in enumerate(sizes):
        labels = np.full((height, width), ids[0], np.uint8)
        labels[:, width // 2 :] = ids[1]
        noise = np.random.default_rng([number, len(split)]).integers(0, 256, (height, width, 3), np.uint8)
        put(workspace / f"data/mine/images/{split}/p{number}.png", encoded(noise))
        put(workspace / f"data/mine/annotations/{split}/p{number}.png", encoded(labels))


def stage(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, timeout=LIMIT_S)


def sharded() -> subprocess.CompletedProcess[str]:
    assert stage("stages.fetch", "mine").returncode == 0
    return stage("stages.shard", "mine")


def ready_under(workspace: Path, *targets: str) -> subprocess.CompletedProcess[str]:
    """stages.ready own, begun by a process whose command line is `dvc repro <targets>`."""
    program = workspace / "bin" / "dvc"
    program.parent.mkdir(exist_ok=True)
    command = "[sys.executable, '-m', 'stages.ready', 'own']"
    program.write_text(f"import subprocess, sys\nsys.exit(subprocess.run({command}).returncode)\n")
    return subprocess.run([sys.executable, program, "repro", *targets], capture_output=True, text=True, timeout=LIMIT_S)


def test_binary_masks_of_0_and_255_are_no_dataset_of_one_class_without_a_word(workspace: Path) -> None:
    write_images(workspace, "training", (8, 10), ids=(0, 255))
    write_images(workspace, "validation", (8, 10), ids=(0, 255))
    refused = sharded()
    assert refused.returncode == 1
    warning, error = refused.stderr.splitlines()[-2:]
    assert warning == (
        "warning: dataset mine: 1 of 2 classes have no training pixel: object; 50.0% of the training pixels are "
        "ignored; look at the labels, ignore_label (255), label_offset (0) and class_names"
    )
    assert error.startswith(
        "error: the training images of dataset mine have pixels of one class alone, background; 50."
    )
    assert not (workspace / "results/shard/mine.json").exists()
    write_params(workspace, on_empty="allow")
    assert sharded().returncode == 0


def test_all_that_would_stop_a_row_is_said_before_its_first_step(workspace: Path, storage: Path) -> None:
    one_split = {"splits": {"train": "training"}}
    write_params(workspace, **one_split)
    write_images(workspace, "training", (64, 80), (40, 60))
    write_images(workspace, "validation", (64, 80), (2, 2000), ids=(255, 255))
    before = stage("stages.check", "own")
    assert "own: what its data holds is checked when it is sharded: dvc repro shard@mine" in before.stdout
    assert before.returncode == 0, before.stdout
    assert sharded().returncode == 0
    assert stage("stages.check", "own").stdout.splitlines() == [
        "own: dataset mine has no split val, which the row is measured on; name its folder in datasets.mine.splits in "
        "params.yaml"
    ]

    write_params(workspace, test={"pad_multiple": 1}, on_empty="allow")  # shards as they were, and a split more
    said = "the shards of dataset mine were made with other settings than params.yaml has: splits (now {train: "
    assert stage("stages.check", "own").stdout.startswith(f"own: {said}")
    assert stage("stages.weights", "none").returncode == 0
    assert stage("stages.train", "own").stderr.splitlines()[-1].startswith(f"error: {said}")

    assert sharded().returncode == 0
    problems = (
        "the validation images of dataset mine have no pixel of a class",
        "a validation image of 2 x 2000 (height x width) is tested at 1 x 128 by rows.own.test",
    )
    checked = stage("stages.check", "own")
    assert checked.returncode == 1
    for line, problem in zip(checked.stdout.splitlines(), problems, strict=True):
        assert line.startswith(f"own: {problem}")
    refused = stage("stages.train", "own")
    assert refused.returncode == 1
    last = refused.stderr.splitlines()[-1]
    assert last.startswith(f"error: row own is not trained here: (1) {problems[0]}") and f"; (2) {problems[1]}" in last
    assert not (storage / "runs").exists()

    assert stage("stages.ready", "own").stderr.startswith(f"error: row own cannot be made here: {problems[0]}")
    named = ready_under(workspace, "evaluate@own")  # the same repro may make its shards anew
    assert named.returncode == 0 and f"as its shards are now: {problems[0]}" in named.stderr
    assert ready_under(workspace).stdout.startswith(f"own waits for a GPU; a correction ({problems[0]}")
    assert json.loads((workspace / "results/ready/own.json").read_text())["run"] is False
