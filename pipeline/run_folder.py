"""What a run folder says about how its training ended; read without torch, so that finished seeds cost nothing.

finished.json, diverged.json, stopped.json or failed.json; none of them: the training has not ended.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pipeline.files import read_json
from pipeline.stores import StoredPath

OVERLAYS = 8
"""Validation pictures of an evaluated seed that are drawn with prediction and truth."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a training ended. `stopped`: by the early warning, where the user wants that."""

    status: Literal["finished", "diverged", "stopped", "failed"]
    reason: str | None = None
    """One sentence; None when it finished."""


def outcome(run_dir: StoredPath) -> Outcome | None:
    """How the training of this folder ended; None while it has not, or when a checkpoint of its end is gone."""
    if finished_result(run_dir) is not None:
        return Outcome("finished")
    for status in ("diverged", "stopped", "failed"):
        if (note := note_of(run_dir, status)) is not None:
            return Outcome(status, note["reason"])
    return None


def finished_result(run_dir: StoredPath) -> dict[str, Any] | None:
    """What finished.json says; None without it, or when a checkpoint that it names is gone: then it is made again."""
    result: dict[str, Any] | None = note_of(run_dir, "finished")
    if result is None:
        return None
    whole = all((run_dir / checkpoint["path"]).exists() for checkpoint in result["checkpoints"].values())
    return result if whole else None


def note_of(run_dir: StoredPath, name: str) -> Any:
    """What <name>.json in the folder says; None without it."""
    path = run_dir / f"{name}.json"
    return read_json(path, made_by="training this row again") if path.exists() else None
