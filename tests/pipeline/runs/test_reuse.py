from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.params.schema import Row
from pipeline.provenance import run_key
from pipeline.runs.reuse import reuse_run
from pipeline.storage.files import delete
from pipeline.storage.inventory import inventory
from pipeline.storage.results.data import Manifest
from pipeline.storage.results.folder import write_result
from pipeline.storage.results.rows import TrainedSeed
from pipeline.training import loop
from pipeline.training.seeds import train_row
from tests.helpers.made_up import training
from tests.helpers.shared import PROJECT
from tests.pipeline.conftest import NO_WEIGHTS


@pytest.fixture
def manifest(small_data: tuple[Path, Manifest]) -> Manifest:
    return small_data[1]


def train(row: Row, manifest: Manifest) -> TrainedSeed:
    """The entry of the row's only seed."""
    (seed,) = train_row(row, manifest=manifest, weights=NO_WEIGHTS).seeds
    return seed


def change_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_key, "code_digest", lambda code: "other code")


def never(run: loop.Run) -> Any:
    raise AssertionError("it was trained")


def test_a_reused_run_is_taken_for_one_under_changed_code_and_the_result_says_so(
    two_steps: Row, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = train(two_steps, manifest)
    assert before.reused is None
    change_the_code(monkeypatch)
    note = reuse_run(two_steps, 1, before.run_key, manifest=manifest, weights=NO_WEIGHTS, reason="a module was renamed")
    assert note.run_key == before.run_key != note.instead_of
    assert note.differences == ("code, or initial weights",)

    monkeypatch.setattr(loop, "train", never)
    after = train(two_steps, manifest)
    assert after == dataclasses.replace(before, reused=note)
    assert json.loads((tmp_path / "storage" / note.note).read_text())["reason"] == "a module was renamed"
    write_result(training("small", [after]), "small", results=tmp_path / "results")
    named = {item.path for item in inventory(tmp_path / "results") if item.named}
    assert {f"runs/{note.run_key}", f"runs/{note.instead_of}"} <= named  # prune leaves both


def test_a_changed_setting_is_named_in_the_note(
    two_steps: Row, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = train(two_steps, manifest)
    slower = dataclasses.replace(two_steps.train.optimizer, lr=5e-4)
    row = dataclasses.replace(two_steps, train=dataclasses.replace(two_steps.train, optimizer=slower))
    note = reuse_run(row, 1, before.run_key, manifest=manifest, weights=NO_WEIGHTS, reason="to see it in the table")
    assert note.differences == ("train.optimizer.lr is 0.001 there, 0.0005 now",)


def test_another_experiment_an_unfinished_run_and_a_needless_one_are_refused(
    two_steps: Row, manifest: Manifest
) -> None:
    before = train(two_steps, manifest)
    settings: dict[str, Any] = {"manifest": manifest, "weights": NO_WEIGHTS, "reason": "why not"}
    with pytest.raises(ValueError, match="another experiment than seed 7 of row small: seed is 1 there, 7 now"):
        reuse_run(two_steps, 7, before.run_key, **settings)
    longer = dataclasses.replace(two_steps, train=dataclasses.replace(two_steps.train, steps=3))
    with pytest.raises(ValueError, match="train.steps is 2 there, 3 now"):
        reuse_run(longer, 1, before.run_key, **settings)
    decoder = dataclasses.replace(two_steps.model.query_decoder, queries=13)
    wider = dataclasses.replace(two_steps, model=dataclasses.replace(two_steps.model, query_decoder=decoder))
    with pytest.raises(ValueError, match="model.query_decoder.queries is 12 there, 13 now"):
        reuse_run(wider, 1, before.run_key, **settings)
    with pytest.raises(ValueError, match="runs/unheard in the storage root .* is no finished training; .* list shows"):
        reuse_run(two_steps, 7, "unheard", **settings)
    with pytest.raises(ValueError, match="seed 1 of row small is finished as run .*: there is nothing to reuse"):
        reuse_run(two_steps, 1, "unheard", **settings)


def test_when_the_reused_run_is_gone_the_seed_trains_under_its_own_key(
    two_steps: Row, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = train(two_steps, manifest)
    change_the_code(monkeypatch)
    note = reuse_run(two_steps, 1, before.run_key, manifest=manifest, weights=NO_WEIGHTS, reason="a comment moved")
    delete(tmp_path / "storage" / before.run_dir / "checkpoints")
    after = train(two_steps, manifest)
    assert (after.run_key, after.reused) == (note.instead_of, None)
    assert not (tmp_path / "storage" / before.run_dir / "checkpoints").exists()


def test_the_command_says_what_differs_and_what_to_do_next(two_steps: Row, manifest: Manifest) -> None:
    command = [sys.executable, "-m", "stages.reuse", "shapes_tiny", "9", "abc", "--because", "x"]
    answer = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr == "error: 9 is no seed of row shapes_tiny, which has 0, 1\n"
