"""What a run folder says about its training; read without torch, so that finished seeds cost nothing.

finished.json, diverged.json, stopped.json or failed.json say how it ended; none of them: it has not. Beside them lie
launch.json, run.json, worker_groups.json, environment.json, reused.json, and owner.json while it is trained. A file
that another version of this project wrote under another layout is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.params.parse import parse
from pipeline.provenance.environment import Environment
from pipeline.storage.files import read_json, write_json
from pipeline.storage.results.rows import BelowReference, Figures, Reused, Status, TrainedCheckpoints, WorkerGroupSpan
from pipeline.storage.stores import StoredPath

OVERLAYS = 8
"""Validation pictures of an evaluated seed that are drawn with prediction and truth."""

_Note = TypeVar("_Note")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """A training that made its last step."""

    run_key: str
    seed: int
    steps: int
    checkpoints: TrainedCheckpoints
    metrics: Figures
    """Of the last validation."""
    below_reference: tuple[BelowReference, ...]
    peak_memory_mib: float | None
    train_s: float
    images_per_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LastNorm:
    """The last gradient norm that was known."""

    step: int
    norm: str
    """As Python writes it, for it may be nan."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Diverged:
    """A training whose loss, matching or gradient was not finite."""

    reason: str
    step: int
    positions: tuple[int, ...]
    """Of the step's pictures, in the global order."""
    names: tuple[str, ...]
    last_norm: LastNorm | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Stopped:
    """A training that the early warning stopped."""

    reason: str
    step: int
    below_reference: tuple[BelowReference, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """A training that failed; its next start forgets it."""

    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """How a training was started last."""

    mlflow_run_id: str | None
    """None: no server answered yet."""
    workers: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackedSplit:
    """A split of the data set that a run trains or is measured on, as MLflow lists it."""

    name: str
    digest: str
    """The first digits of the manifest's."""
    split: str
    source: str
    """Where its shards lie: a folder or a URL."""
    images: int
    facts: Mapping[str, Any]
    """What else is told of it: archives with their digests, classes, terms."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackedRow:
    """What a run folder knows of its row, to show the row's own run in MLflow."""

    settings: str
    """Which settings of the row these are: rows of one name and other settings are compared like other rows."""
    params: Mapping[str, Any]
    """The settings by which rows are compared."""
    data: tuple[TrackedSplit, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackedRun:
    """The arguments of `pipeline.tracking.mlflow_runs.open_run`, and when it was first opened."""

    dataset: str
    row: str
    name: str
    run_key: str
    params: Mapping[str, Any]
    tags: Mapping[str, str]
    opened_ms: int
    of_row: TrackedRow | None = None
    """None: an earlier version of this project wrote the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """The process that trains in the folder (pipeline.runs.owner)."""

    process: int
    """Its number on its node."""
    node: str
    started_s: float
    """When it began, in seconds since 1970: numbers of processes are used again."""


_FILES: Mapping[type, str] = {
    Finished: "finished.json",
    Diverged: "diverged.json",
    Stopped: "stopped.json",
    Failed: "failed.json",
    Launch: "launch.json",
    Owner: "owner.json",
    TrackedRun: "run.json",
    Environment: "environment.json",
    Reused: "reused.json",
}

_WORKER_GROUPS = "worker_groups.json"
"""A list: the worker groups that have worked on the training, in turn."""


@dataclass(frozen=True, slots=True)
class RunStatus:
    """How a training ended."""

    status: Status
    reason: str | None = None
    """One sentence; None when it finished."""


def run_status(run_dir: StoredPath) -> RunStatus | None:
    """How the training of this folder ended; None while it has not, or when a checkpoint of its end is gone."""
    if finished_result(run_dir) is not None:
        return RunStatus("finished")
    if (diverged := note_of(run_dir, Diverged)) is not None:
        return RunStatus("diverged", diverged.reason)
    if (stopped := note_of(run_dir, Stopped)) is not None:
        return RunStatus("stopped", stopped.reason)
    if (failed := note_of(run_dir, Failed)) is not None:
        return RunStatus("failed", failed.reason)
    return None


def finished_result(run_dir: StoredPath) -> Finished | None:
    """What finished.json says; None without it, or when a checkpoint that it names is gone: then it is made again."""
    result = note_of(run_dir, Finished)
    if result is None:
        return None
    if result.run_key != run_dir.name:
        raise ValueError(
            f"{run_dir / _FILES[Finished]} is of run {result.run_key} and was copied here; delete it, and train the "
            "row again"
        )
    checkpoints = result.checkpoints
    return result if all((run_dir / each.path).exists() for each in (checkpoints.last, checkpoints.best)) else None


def note_of(run_dir: StoredPath, note_type: type[_Note]) -> _Note | None:
    """What the folder's file of this kind says; None without it. ValueError when it is torn or of another layout."""
    path = run_dir / _FILES[note_type]
    return _parsed(note_type, read_json(path, made_by=_again(path)), path) if path.exists() else None


def write_note(run_dir: StoredPath, note: Any) -> None:
    """Write the folder's file of the note's kind, whole or not at all."""
    write_json(run_dir / _FILES[type(note)], dataclasses.asdict(note))


def forget_note(run_dir: StoredPath, note_type: type) -> None:
    """Delete the folder's file of this kind, if there is one."""
    (run_dir / _FILES[note_type]).unlink(missing_ok=True)


def evaluation_dir(run_dir: StoredPath, key: str) -> StoredPath:
    """The folder of one evaluation of one of the training's checkpoints (pipeline.evaluation.evaluate_checkpoint)."""
    return run_dir / "evaluations" / key


def worker_groups_of(run_dir: StoredPath) -> tuple[WorkerGroupSpan, ...]:
    """The worker groups that have worked on the training, in turn; none before the first."""
    path = run_dir / _WORKER_GROUPS
    if not path.exists():
        return ()
    content = read_json(path, made_by=_again(path))
    if not isinstance(content, list):
        raise ValueError(f"{path} is no list of worker groups; {_foreign(path)}")
    return tuple(_parsed(WorkerGroupSpan, entry, path, f"[{place}]") for place, entry in enumerate(content))


def write_worker_groups(run_dir: StoredPath, worker_groups: Sequence[WorkerGroupSpan]) -> None:
    """Write down which worker groups have worked on the training."""
    write_json(run_dir / _WORKER_GROUPS, [dataclasses.asdict(span) for span in worker_groups])


def _again(path: StoredPath) -> str:
    return f"training the row again (first delete its folder, runs/{path.parent.name} in the storage root)"


def _parsed(note_type: type[_Note], content: Any, path: StoredPath, place: str = "") -> _Note:
    """`place`: of the content in the file; empty: it is all of it."""
    try:
        return parse(note_type, content, f"{path}{place}", in_file=not place)
    except ValueError as error:
        raise ValueError(f"{error}; {_foreign(path)}") from None


def _foreign(path: StoredPath) -> str:
    return (
        f"another version of this project wrote it: delete its folder, runs/{path.parent.name} in the storage root, "
        "and train the row again"
    )
