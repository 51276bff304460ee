"""Curves and results in MLflow: a mirror of what lies in results/ and the run folders.

The disk is the record; MLflow shows it. So nothing here fails a run: a server that is down costs a few seconds
and one warning line, and the points it missed are sent when it answers again. No global MLflow state is used: runs
are named by their id, so that several seeds can be written from one process.

MLflow experiment = dataset, parent run = row, child run = one training (tag `m2f.run_key`).
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pipeline.files import Lines, store_of
from pipeline.storage import storage_root

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

_T = TypeVar("_T")

SEND_EVERY_S = 5.0
"""Points wait at most about this long before they are sent together."""
RETRY_AFTER_S = 60.0
"""After a failure the server is left alone for this long."""
SEND_BUDGET_S = 5.0
"""A backlog is sent in pieces of this many seconds, so that training goes on in between."""
CLOSE_BUDGET_S = 30.0
"""Longest time that closing a curve spends on its backlog."""
METRICS_PER_BATCH = 1000
"""MLflow's limit for one log_batch request."""

_CLIENT_SETTINGS = {
    # One attempt of at most 5 s, where MLflow's own settings block for about 4 minutes; Curve sends again later.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # no lines about tables and migrations between the progress lines
}


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, or sqlite:///<working directory>/mlflow.db; always absolute.

    A process that runs in another directory (a Ray worker) gets it from its driver as MLFLOW_TRACKING_URI.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    database = uri.removeprefix("sqlite:///")
    if database != uri and not database.startswith("/"):
        return f"sqlite:///{Path(database).absolute()}"
    return uri


def open_run(
    *, dataset: str, row: str, name: str, run_key: str, params: Mapping[str, object], tags: Mapping[str, str]
) -> str | None:
    """The MLflow run of one training: found again by `run_key`, or created with its settings below the row's
    parent run. Returns its id; None when the tracking server does not answer.

    `params` may be nested; leaves become `model.backbone.name` and the like. Call it again later and open a
    `Curve` with the id to send what a server that was down at the start has missed.
    """
    return _attempt(
        f"{row} {name} is not tracked for now",
        lambda: _open_run(dataset, row, name, run_key, params, tags),
    )


def log_files(run_id: str | None, files: Mapping[str, Path]) -> None:
    """Store files as artifacts of a run: artifact path ("overlays/0.png") -> local file. Same path, replaced."""
    if run_id is None or not files:
        return

    def send() -> None:
        client = _client()
        with tempfile.TemporaryDirectory() as folder:
            for artifact, local in files.items():
                parent, _, base = artifact.rpartition("/")
                if Path(local).name != base:  # MLflow keeps the local name
                    local = Path(shutil.copyfile(local, Path(folder) / base))
                client.log_artifact(run_id, str(local), parent or None)

    _attempt("files were not stored in MLflow", send)


def log_summary(run_id: str | None, metrics: Mapping[str, float]) -> None:
    """Final figures of a run. A figure that the run already shows is not logged a second time."""
    if run_id is None or not metrics:
        return

    def send() -> None:
        client = _client()
        shown = client.get_run(run_id).data.metrics
        new = {key: float(value) for key, value in metrics.items() if shown.get(_metric_name(key)) != float(value)}
        for batch in _batches(_metrics(0, new, int(time.time() * 1000))):
            client.log_batch(run_id, metrics=batch)

    _attempt("a summary was not sent to MLflow", send)


def set_tags(run_id: str | None, tags: Mapping[str, str]) -> None:
    """Tags of a run; one that it has is replaced."""
    if run_id is None:
        return

    def send() -> None:
        client = _client()
        from mlflow.entities import RunTag

        client.log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])

    _attempt("a run's tags were not sent to MLflow", send)


def set_status(run_id: str | None, status: Literal["FINISHED", "FAILED"], tags: Mapping[str, str]) -> None:
    """End a run, with tags that say how."""
    if run_id is None:
        return

    def send() -> None:
        client = _client()
        from mlflow.entities import RunTag

        client.log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])
        client.set_terminated(run_id, status)

    _attempt(f"a run's status {status} was not sent to MLflow", send)


class Curve:
    """A run's points: on disk as JSON lines, {"step": 50, "loss": 3.1}, and sent to MLflow in batches.

    Opening drops points at `first_step` and later, which a resumed run makes again, and a line torn by a kill.
    What MLflow already has is asked for before the first points are sent, and after every failure, whose outcome
    nobody knows: every point arrives once. A value that is not finite is null on disk.
    """

    def __init__(self, path: Path, run_id: str | None, first_step: int) -> None:
        self._run_id = run_id
        points = [point for point in read_curve(path) if point["step"] < first_step]
        self._file = Lines(path, "".join(json.dumps(point) + "\n" for point in points))
        now_ms = int(time.time() * 1000)
        self._unsent = [_split(point, now_ms) for point in points] if run_id else []
        self._known: dict[str, set[int]] = {}
        self._next_send = time.monotonic() + SEND_EVERY_S
        self._down = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one point; its metrics are sent soon."""
        if not metrics:
            return
        values = {key: float(value) for key, value in metrics.items()}
        point = {"step": step, **{key: value if math.isfinite(value) else None for key, value in values.items()}}
        self._file.add(json.dumps(point))
        if self._run_id:
            self._unsent.append((step, values, int(time.time() * 1000)))
            if time.monotonic() >= self._next_send:
                self._send(SEND_BUDGET_S)

    def save(self) -> None:
        """Upload the points so far, where the run folder is below a URL; on a file system they are there already."""
        self._file.save()

    def close(self) -> None:
        """Close the file and send what is left, if MLflow answers."""
        if self._file.closed:
            return
        self._file.close()
        if self._unsent:
            self._send(CLOSE_BUDGET_S)

    def __enter__(self) -> Curve:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, budget_s: float) -> None:
        end = time.monotonic() + budget_s
        try:
            while self._unsent:
                self._send_batch()
                if time.monotonic() > end:
                    break
        except Exception as error:  # whatever a client or server may throw: the run goes on
            self._known.clear()
            self._next_send = time.monotonic() + RETRY_AFTER_S
            if not self._down:
                _warn("points of the curve are kept on disk and sent when MLflow answers", error)
            self._down = True
        else:
            self._next_send = time.monotonic() + SEND_EVERY_S
            if self._down:
                print("MLflow answers again", file=sys.stderr, flush=True)
            self._down = False

    def _send_batch(self) -> None:
        """Send the oldest points that MLflow lacks, as many as one request takes, and forget them."""
        assert self._run_id is not None
        client = _client()
        batch: list[Metric] = []
        taken = 0
        for step, values, time_ms in self._unsent:
            probe = min(values)  # a request is stored whole or not at all, so one metric tells for its point
            if probe not in self._known:
                history = client.get_metric_history(self._run_id, _metric_name(probe))
                self._known[probe] = {metric.step for metric in history}
            if step not in self._known[probe]:
                point = _metrics(step, values, time_ms)
                if batch and len(batch) + len(point) > METRICS_PER_BATCH:
                    break
                batch += point
            taken += 1
        if batch:
            client.log_batch(self._run_id, metrics=batch)
        for step, values, _ in self._unsent[:taken]:
            self._known[min(values)].add(step)
        del self._unsent[:taken]


def read_curve(path: Path) -> list[dict[str, Any]]:
    """The points of a curve file, oldest first; none if there is no file. A torn last line is left out."""
    points = []
    with suppress(FileNotFoundError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            with suppress(json.JSONDecodeError):
                if line.endswith("\n") and isinstance(point := json.loads(line), dict) and point.keys() > {"step"}:
                    points.append(point)
    return points


def _open_run(
    dataset: str, row: str, name: str, run_key: str, params: Mapping[str, object], tags: Mapping[str, str]
) -> str:
    client = _client()  # before any other import of MLflow, which reads its settings once
    from mlflow.entities import Param, RunTag

    experiment = _experiment(client, dataset)
    parent = _find_or_create(client, experiment, row, {"m2f.kind": "row", "m2f.row": row})
    child_tags = {"m2f.kind": "training", "m2f.row": row, "m2f.run_key": run_key}
    run = _find_or_create(client, experiment, name, child_tags, {"mlflow.parentRunId": parent.info.run_id})
    run_id: str = run.info.run_id
    client.update_run(run_id, status="RUNNING")
    client.log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])
    new = [Param(key, value) for key, value in _flat(params) if key not in run.data.params]  # MLflow allows no change
    for start in range(0, len(new), 100):
        client.log_batch(run_id, params=new[start : start + 100])
    return run_id


def _experiment(client: MlflowClient, name: str) -> str:
    """Id of the dataset's experiment, made if need be. Another process may make it at the same time."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        artifacts = None  # a server knows its own place for artifacts
        if tracking_uri().startswith("sqlite:"):
            folder = storage_root() / "mlflow" / name
            artifacts = folder.as_uri() if store_of(folder) is None else str(folder)
        try:
            return str(client.create_experiment(name, artifact_location=artifacts))
        except MlflowException:
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    return str(experiment.experiment_id)


def _find_or_create(
    client: MlflowClient, experiment: str, name: str, identity: Mapping[str, str], more: Mapping[str, str] | None = None
) -> Run:
    """The oldest run whose tags hold `identity`; created with `identity` and `more` if there is none."""
    query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in identity.items())

    def oldest() -> Run | None:
        return next(iter(client.search_runs([experiment], query, max_results=1, order_by=["start_time ASC"])), None)

    found = oldest()
    if found is not None:
        return found
    made: Run = client.create_run(experiment, run_name=name, tags={**identity, **(more or {})})
    winner = oldest() or made
    if winner.info.run_id != made.info.run_id:  # another process was quicker
        client.delete_run(made.info.run_id)
    elif more is None:
        client.set_terminated(made.info.run_id, "FINISHED")  # the row's run only holds the trainings
    return winner


def _client() -> MlflowClient:
    return _client_of(tracking_uri())


@cache
def _client_of(uri: str) -> MlflowClient:
    for key, value in _CLIENT_SETTINGS.items():
        os.environ.setdefault(key, value)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _attempt(loss: str, action: Callable[[], _T]) -> _T | None:
    """What `action` returns, or None after one warning line that says what is lost."""
    try:
        return action()
    except Exception as error:  # whatever a client or server may throw: the run goes on
        _warn(loss, error)
        return None


def _warn(loss: str, error: Exception) -> None:
    reason = " ".join(str(error).split())
    print(f"warning: {loss} ({tracking_uri()}: {reason[:200]})", file=sys.stderr, flush=True)


def _split(point: Mapping[str, Any], time_ms: int) -> tuple[int, dict[str, float], int]:
    values = {key: math.nan if value is None else float(value) for key, value in point.items() if key != "step"}
    return point["step"], values, time_ms


def _metrics(step: int, values: Mapping[str, float], time_ms: int) -> list[Metric]:
    from mlflow.entities import Metric

    return [Metric(_metric_name(key), value, time_ms, step) for key, value in values.items()]


def _batches(metrics: list[Metric]) -> Iterator[list[Metric]]:
    for start in range(0, len(metrics), METRICS_PER_BATCH):
        yield metrics[start : start + METRICS_PER_BATCH]


def _metric_name(name: str) -> str:
    """A class may be called anything; MLflow allows letters, digits and _ - . : / and space."""
    return re.sub(r"[^\w\-.:/ ]", "_", name)


def _flat(settings: Mapping[str, object], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
