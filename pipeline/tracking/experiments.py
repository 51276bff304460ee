"""Experiments and runs of MLflow, found again or created.

MLflow experiment = dataset, parent run = row, child run = one training (tag `m2f.run_key`).
"""

from __future__ import annotations

import getpass
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from pipeline.runs.outcome import TrackedRun
from pipeline.storage.root import storage_root
from pipeline.tracking.client import attempt, mlflow_client, tracking_uri
from pipeline.tracking.database import check_place, database_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


_TRAINING_PAGES = {"mlflow.experimentKind": "custom_model_development"}
"""Opens an experiment with its runs; MLflow would otherwise guess, and may show pages for language models."""


def check_database(dataset: str, loss: str) -> None:
    """Where a local database cannot take a dataset's runs, say so before workers start, which then say nothing."""
    if database_of(tracking_uri()) is not None:
        attempt(loss, lambda: experiment_id(mlflow_client(), dataset))


def open_described(described: TrackedRun, *, running: bool = True) -> Run:
    client = mlflow_client()  # before any other import of MLflow, which reads its settings once
    from mlflow.entities import Param

    experiment = experiment_id(client, described.dataset)
    row = described.row
    parent = row_run(client, experiment, row, running=running)
    identity = {"m2f.run_type": "training", "m2f.row": row, "m2f.run_key": described.run_key}
    facts = {"mlflow.parentRunId": parent.info.run_id, "m2f.dataset": described.dataset}
    start_ms = None if running else described.opened_ms
    run = _find_or_create(client, experiment, described.name, identity, facts, start_ms=start_ms)
    run_id = run.info.run_id
    if running and run.info.status != "RUNNING":
        client.update_run(run_id, status="RUNNING")
    send_tags(client, run, {"mlflow.user": _user(), "mlflow.source.type": "LOCAL", **described.tags})
    flat = _flat(described.params)
    new = [Param(key, value) for key, value in flat if key not in run.data.params]  # MLflow allows no change
    for start in range(0, len(new), 100):
        client.log_batch(run_id, params=new[start : start + 100])
    return run


def row_run(client: MlflowClient, experiment: str, row: str, *, running: bool) -> Run:
    """The run that holds a row's trainings."""
    run = _find_or_create(
        client,
        experiment,
        row,
        {"m2f.run_type": "row", "m2f.row": row},
        {"mlflow.user": _user(), "mlflow.source.type": "LOCAL", "mlflow.source.name": f"stages.train {row}"},
        running=running,
    )
    if running and run.info.status != "RUNNING":
        client.update_run(run.info.run_id, status="RUNNING")
    return run


def experiment_id(client: MlflowClient, name: str) -> str:
    """Id of the dataset's experiment, made if need be. Another process may make it at the same time.

    UnusableDatabase when a local database keeps its files in another storage root.
    """
    from mlflow.exceptions import MlflowException

    database, folder = database_of(tracking_uri()), storage_root() / "mlflow" / name
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        artifacts = folder.as_uri() if database else None  # a server knows its own place for artifacts
        try:
            return str(client.create_experiment(name, artifact_location=artifacts, tags=_TRAINING_PAGES))
        except MlflowException:
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    if database:
        check_place(experiment.artifact_location, folder)
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    return str(experiment.experiment_id)


def _find_or_create(
    client: MlflowClient,
    experiment: str,
    name: str,
    identity: Mapping[str, str],
    more: Mapping[str, str],
    *,
    start_ms: int | None = None,
    running: bool = True,
) -> Run:
    """The oldest run whose tags hold `identity`; created, running or ended, with `identity` and `more` if there is
    none."""
    query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in identity.items())
    order = ["start_time ASC", "run_id ASC"]
    found = client.search_runs([experiment], query, max_results=1, order_by=order)
    if not found:
        made = client.create_run(experiment, start_ms, run_name=name, tags={**identity, **more})
        if not running:
            client.set_terminated(made.info.run_id)
        found = client.search_runs([experiment], query, order_by=order)
        for late in found[1:]:  # another process had the same thought
            client.delete_run(late.info.run_id)
    oldest: Run = found[0]
    return oldest


def send_tags(client: MlflowClient, run: Run, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    new = [RunTag(key, str(value)) for key, value in tags.items() if run.data.tags.get(key) != str(value)]
    if new:
        client.log_batch(run.info.run_id, tags=new)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # an id without a name, as in containers
        return "unknown"


def _flat(settings: Mapping[str, object], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
