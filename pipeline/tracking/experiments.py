"""The experiment and the runs of MLflow, found again or created.

One experiment holds all rows, so that one table compares them. Parent run = row with its settings (tag `m2f.settings`),
child run = one training (tag `m2f.run_key`).
"""

from __future__ import annotations

import getpass
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pipeline.runs.outcome import TrackedRow, TrackedRun, TrackedSplit
from pipeline.storage.root import storage_root
from pipeline.tracking.client import attempt, mlflow_client, tracking_uri
from pipeline.tracking.database import check_place, database_of
from pipeline.tracking.pages import NOTE, experiment_tags

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


EXPERIMENT = "mask2former"
"""The experiment of all rows."""

_TRAINING_PAGES = {"mlflow.experimentKind": "custom_model_development"}
"""Opens an experiment with its runs; MLflow would otherwise guess, and may show pages for language models."""


def check_database(loss: str) -> None:
    """Where a local database cannot take runs, say so before workers start, which then say nothing."""
    if database_of(tracking_uri()) is not None:
        attempt(loss, lambda: experiment_id(mlflow_client()))


def open_described(described: TrackedRun, *, running: bool = True) -> Run:
    client = mlflow_client()  # before any other import of MLflow, which reads its settings once
    experiment = experiment_id(client)
    parent = row_run(client, experiment, described.row, described.of_row, running=running)
    identity = {"m2f.run_type": "training", "m2f.row": described.row, "m2f.run_key": described.run_key}
    facts = {"mlflow.parentRunId": parent.info.run_id, "m2f.dataset": described.dataset}
    start_ms = None if running else described.opened_ms
    run = _find_or_create(client, experiment, described.name, identity, facts, start_ms=start_ms)
    run_id = run.info.run_id
    if running and run.info.status != "RUNNING":
        client.update_run(run_id, status="RUNNING")
    send_tags(client, run, {"mlflow.user": _user(), "mlflow.source.type": "LOCAL", **described.tags})
    _send_params(client, run, {**(described.of_row.params if described.of_row else {}), **described.params})
    if described.of_row:
        send_inputs(client, run, described.of_row.data)
    return run


def row_run(client: MlflowClient, experiment: str, row: str, of_row: TrackedRow | None, *, running: bool) -> Run:
    """The run that holds a row's trainings, with the parameters by which rows are compared."""
    identity = {"m2f.run_type": "row", "m2f.row": row}
    more = {"mlflow.user": _user(), "mlflow.source.type": "LOCAL", "mlflow.source.name": f"stages.train {row}"}
    if of_row:
        identity["m2f.settings"] = of_row.settings
    run = _find_or_create(client, experiment, row, identity, more, running=running)
    if running and run.info.status != "RUNNING":
        client.update_run(run.info.run_id, status="RUNNING")
    if of_row:
        _send_params(client, run, of_row.params)
        send_inputs(client, run, of_row.data)
    return run


def experiment_id(client: MlflowClient) -> str:
    """Id of the experiment of all rows, made and described if need be. Another process may make it at the same time.

    UnusableDatabase when a local database keeps its files in another storage root.
    """
    from mlflow.exceptions import MlflowException

    database, folder = database_of(tracking_uri()), storage_root() / "mlflow" / EXPERIMENT
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        artifacts = folder.as_uri() if database else None  # a server knows its own place for artifacts
        try:
            experiment = client.get_experiment(
                client.create_experiment(EXPERIMENT, artifact_location=artifacts, tags=_TRAINING_PAGES)
            )
        except MlflowException:
            experiment = client.get_experiment_by_name(EXPERIMENT)
            if experiment is None:
                raise
    if database:
        check_place(experiment.artifact_location, folder)
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    for key, text in experiment_tags(experiment.experiment_id).items():
        if key not in experiment.tags or (key != NOTE and experiment.tags[key] != text):  # a note may be somebody's own
            with suppress(MlflowException):  # another process sets it too
                client.set_experiment_tag(experiment.experiment_id, key, text)
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
        for late in found[1:]:  # another process made it too
            client.delete_run(late.info.run_id)
    oldest: Run = found[0]
    return oldest


def _send_params(client: MlflowClient, run: Run, params: Mapping[str, Any]) -> None:
    """Parameters that the run lacks; MLflow allows no change of one that it has."""
    from mlflow.entities import Param

    new = [Param(key, value) for key, value in _flat(params) if key not in run.data.params]
    for start in range(0, len(new), 100):
        client.log_batch(run.info.run_id, params=new[start : start + 100])


def send_inputs(client: MlflowClient, run: Run, splits: Sequence[TrackedSplit]) -> None:
    """The splits of the data set that the run lacks, each as a data set of MLflow with what it is for."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    there = {(each.dataset.name, each.dataset.digest) for each in (run.inputs.dataset_inputs if run.inputs else ())}
    new = [
        DatasetInput(
            Dataset(
                name=each.name,
                digest=each.digest,
                source_type="local" if "://" not in each.source else each.source.partition("://")[0],
                source=json.dumps({"uri": each.source}),
                profile=json.dumps({"split": each.split, "images": each.images, **each.facts}),
            ),
            tags=[InputTag("mlflow.data.context", each.split)],
        )
        for each in splits
        if (each.name, each.digest) not in there
    ]
    if new:
        client.log_inputs(run.info.run_id, new)


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
