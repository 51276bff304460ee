"""A run's points: on disk, and on their way to MLflow."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping
from functools import partial

from pipeline.runs.curve_file import lines_of, point_line, read_points
from pipeline.runs.outcome import TrackedRun, note_of
from pipeline.storage.files import Lines
from pipeline.storage.stores import StoredPath
from pipeline.tracking.client import mlflow_client
from pipeline.tracking.experiments import open_described, send_tags
from pipeline.tracking.mlflow_runs import LOAD, machine_tags
from pipeline.tracking.sender import Sender


class Curve:
    """A run's points: on disk as JSON lines, {"step": 50, "loss": 3.1, "time_ms": ...}, and on their way to MLflow.

    Opening drops points at `first_step` and later, which a resumed run makes again, and a line torn by a kill. A
    value that is not finite is null on disk. Sending has a thread of its own (`Sender`), and reads the file: a server
    that is down or slow costs a training nothing before `close`, and then CLOSE_S at most.

    `run_dir`: the run's folder, for a run that no server knows yet (its `run.json` says how to open it), for tags that
    only a worker knows, and for the machine's load.
    """

    def __init__(
        self, path: StoredPath, run_id: str | None, first_step: int, *, run_dir: StoredPath | None = None
    ) -> None:
        points = [line for line in lines_of(path) for point in read_points([line]) if point["step"] < first_step]
        self._file = Lines(path, "".join(points))
        self._load: Lines | None = None
        self._end_sending: Callable[[], object] = lambda: None
        if run_dir and note_of(run_dir, TrackedRun):
            load = path.with_name(LOAD)
            self._load = Lines(load, "".join(lines_of(load)))
        if run_id or self._load:
            sender = Sender(self._file, open_run=partial(_join, run_id, run_dir), load=self._load)
            self._end_sending = weakref.finalize(self, sender.close)  # also where an error ends the training

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one point; it is sent soon."""
        if metrics:
            self._file.add(point_line(step, metrics, int(time.time() * 1000)))

    def save(self) -> None:
        """Upload the points so far, where the run folder is below a URL; on a file system they are there already."""
        self._file.save()
        if self._load:
            self._load.save()

    def close(self) -> None:
        """Close the file, and send what is left if MLflow answers."""
        if self._file.closed:
            return
        self._end_sending()
        for file in (self._file, self._load):
            if file:
                file.close()

    def __enter__(self) -> Curve:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _join(run_id: str | None, run_dir: StoredPath | None) -> str:
    """The run that a curve belongs to, opened if need be, with the tags that only its worker knows."""
    described = note_of(run_dir, TrackedRun) if run_dir else None
    if run_dir is None or described is None:
        assert run_id is not None
        return run_id
    run = open_described(described)
    send_tags(mlflow_client(), run, machine_tags(run_dir))
    return str(run.info.run_id)
