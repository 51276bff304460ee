"""What a run folder says, and what becomes of a folder that another version of the project has written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.runs.outcome import (
    Diverged,
    Failed,
    Finished,
    LastNorm,
    Launch,
    Stopped,
    TrackedRun,
    finished_result,
    forget_note,
    note_of,
    run_status,
    worker_groups_of,
    write_note,
    write_worker_groups,
)
from pipeline.storage.results.rows import BestCheckpoint, Reused, TrainedCheckpoint, TrainedCheckpoints
from tests.helpers.made_up import A100, below_reference, span

CHECKPOINTS = TrainedCheckpoints(
    last=TrainedCheckpoint(step=9, path="checkpoints/9", sha256="aa"),
    best=BestCheckpoint(step=6, path="checkpoints/6", sha256="bb", figure="pq", value=0.5),
)
FINISHED = Finished(
    run_key="k",
    seed=5,
    steps=9,
    checkpoints=CHECKPOINTS,
    metrics={"pq": 0.4, "ap": None},
    below_reference=(below_reference(3, 0.1, 0.2),),
    peak_memory_mib=None,
    train_s=7.5,
    images_per_s=4.0,
)
NOTES = (
    FINISHED,
    Diverged(reason="not finite", step=3, positions=(8, 9), names=("a", "b"), last_norm=LastNorm(step=2, norm="inf")),
    Stopped(
        reason="too far below its reference",
        step=6,
        below_reference=(below_reference(3, 0.1, 0.2), below_reference(6, 0.1, 0.3, "other seeds")),
    ),
    Failed(reason="no room"),
    Launch(mlflow_run_id=None, workers=2),
    TrackedRun(dataset="d", row="r", name="seed 5 of r", run_key="k", params={"seed": 5}, tags={"a": "b"}, opened_ms=1),
    A100,
    Reused(run_key="k", instead_of="l", reason="a rename", differences=("code",), reused_s=1, note="runs/l/x"),
)


def leave_checkpoints(folder: Path) -> None:
    for checkpoint in (CHECKPOINTS.last, CHECKPOINTS.best):
        (folder / checkpoint.path).parent.mkdir(parents=True, exist_ok=True)
        (folder / checkpoint.path).touch()


@pytest.mark.parametrize("note", NOTES, ids=lambda note: type(note).__name__)
def test_a_note_is_read_as_it_was_written_until_it_is_forgotten(note: Any, tmp_path: Path) -> None:
    assert note_of(tmp_path, type(note)) is None
    write_note(tmp_path, note)
    assert note_of(tmp_path, type(note)) == note
    forget_note(tmp_path, type(note))
    forget_note(tmp_path, type(note))
    assert note_of(tmp_path, type(note)) is None


def test_worker_groups_are_a_list_in_turn_and_none_before_the_first(tmp_path: Path) -> None:
    assert worker_groups_of(tmp_path) == ()
    write_worker_groups(tmp_path, [span(workers=8), span(workers=4, from_step=30, train_s=60.0)])
    assert [(each.workers, each.from_step) for each in worker_groups_of(tmp_path)] == [(8, 0), (4, 30)]
    assert isinstance(json.loads((tmp_path / "worker_groups.json").read_text()), list)


def test_a_training_has_finished_as_long_as_both_of_its_checkpoints_are_there(tmp_path: Path) -> None:
    folder = tmp_path / FINISHED.run_key
    write_note(folder, FINISHED)
    assert finished_result(folder) is None and run_status(folder) is None
    leave_checkpoints(folder)
    assert finished_result(folder) == FINISHED
    (folder / CHECKPOINTS.best.path).unlink()
    assert finished_result(folder) is None


def test_the_end_of_another_run_is_not_believed(tmp_path: Path) -> None:
    run_dir = tmp_path / "0123456789abcdef"
    write_note(run_dir, dataclasses.replace(FINISHED, run_key="another"))
    with pytest.raises(ValueError, match=r"finished\.json is of run another and was copied here; delete it, and train"):
        run_status(run_dir)


def test_how_a_training_ended_is_told_with_its_reason(tmp_path: Path) -> None:
    folder = tmp_path / FINISHED.run_key
    assert run_status(folder) is None
    for note, status in ((NOTES[3], "failed"), (NOTES[2], "stopped"), (NOTES[1], "diverged")):
        write_note(folder, note)
        end = run_status(folder)
        assert end is not None and (end.status, end.reason) == (status, note.reason)
    write_note(folder, FINISHED)
    leave_checkpoints(folder)
    end = run_status(folder)
    assert end is not None and (end.status, end.reason) == ("finished", None)


@pytest.mark.parametrize(
    ("name", "content", "wrong"),
    [
        ("finished.json", {"step": 9, "checkpoint": "step-9.pth"}, "unknown key 'step'"),
        ("failed.json", {}, "'reason' is missing"),
        ("diverged.json", "it diverged", "'it diverged'; expected the keys reason, step"),
    ],
)
def test_a_run_folder_of_another_layout_is_refused_in_a_sentence_that_says_what_to_do(
    tmp_path: Path, name: str, content: Any, wrong: str
) -> None:
    folder = tmp_path / "runs" / "c0ffee"
    folder.mkdir(parents=True)
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=wrong) as raised:
        run_status(folder)
    said = str(raised.value)
    assert said.startswith(str(folder / name)) and "\n" not in said
    assert said.endswith(
        "; another version of this project wrote it: delete its folder, runs/c0ffee in the storage root, and train the "
        "row again"
    )


def test_worker_groups_of_another_layout_are_refused_too(tmp_path: Path) -> None:
    (tmp_path / "worker_groups.json").write_text('{"workers": 2}')
    with pytest.raises(
        ValueError, match=r"worker_groups\.json is no list of worker groups; another version of this project wrote"
    ):
        worker_groups_of(tmp_path)
