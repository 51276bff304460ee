"""A row's best and median checkpoint as versions in MLflow's model registry.

What may take the alias `best` is in docs/tracking.md. Unlike tracking this is no mirror: when the server does not
answer, registration fails.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.params.schema import Row
from pipeline.params.tasks import percent
from pipeline.registry.candidates import Candidate, candidates, chosen, published_candidate
from pipeline.registry.description import figure_tags, model_description, version_description
from pipeline.registry.model_folder import save_model, served_settings, trained_network
from pipeline.registry.versions import delete_model, delete_unfinished, end_registering, registering_tag, versions_of
from pipeline.storage.results.data import Manifest
from pipeline.storage.results.rows import (
    Aliases,
    BestVersion,
    Evaluation,
    PublishedEvaluation,
    RegisteredVersion,
    Registration,
    TrainingResult,
)
from pipeline.tracking.client import mlflow_client, shown_uri, tracking_uri
from pipeline.tracking.database import UnusableDatabase
from pipeline.tracking.experiments import experiment_id
from pipeline.tracking.models import model_metrics
from pipeline.tracking.rows import tracked_data

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

    from pipeline.comparison.verdict import Verdict


UPLOAD_TIMEOUT_S = 300
"""Longest wait for the server to take one file of a model; every other request has tracking's few seconds."""


def model_name(row: str) -> str:
    """The registered model of a row: ade20k_swin-t is ade20k-swin-t."""
    return row.replace("_", "-")


def register(
    row: Row,
    *,
    manifest: Manifest,
    evaluated: Evaluation,
    trained: TrainingResult,
    weights_terms: str,
    verdict: Verdict | None = None,
    force: bool = False,
) -> Registration:
    """Register a row's best and median checkpoint.

    A checkpoint that is registered already, with the same settings and code, is found again. verdict: on the
    row beside its published figures, for the description. force: `best` may leave a version whose figure is not
    comparable. ValueError when the server does not answer or a checkpoint is gone.
    """
    ranked = candidates(evaluated, trained)
    try:
        client = mlflow_client()  # before any other import of MLflow, which reads its settings once
    except Exception as error:  # sqlalchemy's and MLflow's own, of many classes
        raise _unregistered(row.name, error) from None
    settings = served_settings(row, manifest)
    figure, name = evaluated.primary, model_name(row.name)
    terms = licence(manifest.terms, weights_terms)
    tags = _tags_of_row(row, figure, manifest, terms)
    if verdict:
        tags["verdict"] = verdict.decision
    with _answering(row.name):
        _refuse_foreign(client, name, row)
        delete_unfinished(client, experiment_id(client), name)
        versions = {
            alias: _registered(client, name, row, candidate, settings, tags, manifest)
            for alias, candidate in chosen(ranked).items()
        }
        client.set_registered_model_alias(name, "median", versions["median"].version)
        best, kept = _set_best(client, name, versions["best"], force=force)
        shown = {alias: (each.version, each.tags) for alias, each in (("best", best), ("median", versions["median"]))}
        client.update_registered_model(name, model_description(row, name, shown, verdict, licence=terms))
    aliases = Aliases(best=BestVersion(**asdict(_described(best)), kept=kept), median=_described(versions["median"]))
    return Registration(row=row.name, model=name, aliases=aliases, tracking_uri=shown_uri())


def register_published(
    row: Row, result: PublishedEvaluation, *, manifest: Manifest, terms: str = ""
) -> tuple[str, RegisteredVersion]:
    """Register a published checkpoint with the figure that it has here: its model's name and its version, which gets
    the alias "published". The model is its own, so that no training of the row is compared with it.

    ValueError when the server does not answer or the converted checkpoint is gone.
    """
    candidate = published_candidate(result)
    try:
        client = mlflow_client()
    except Exception as error:
        raise _unregistered(row.name, error) from None
    name = f"{model_name(result.name)}-published"
    terms = licence(manifest.terms, terms)
    tags = {**_tags_of_row(row, result.primary, manifest, terms), "url": result.url}
    with _answering(row.name), _environment(MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false"):
        _refuse_foreign(client, name, row)
        delete_unfinished(client, experiment_id(client), name)
        version = _registered(client, name, row, candidate, served_settings(row, manifest), tags, manifest)
        client.set_registered_model_alias(name, "published", version.version)
        client.update_registered_model(
            name, version_description(row, candidate, licence=terms, made_by=_made_by(row, candidate))
        )
    return name, _described(version)


def _tags_of_row(row: Row, figure: str, manifest: Manifest, terms: str) -> dict[str, str]:
    return {
        "row": row.name,
        "task": row.task,
        "dataset": row.dataset,
        "backbone": row.model.backbone.name,
        "metric": figure,
        "dataset_digest": manifest.digest,
        "licence": terms,
    }


def _made_by(row: Row, candidate: Candidate) -> str:
    if candidate.seed is None:
        return "python -m stages.register --published"
    return f"dvc repro register@{row.name}"


def licence(dataset_terms: str, weights_terms: str) -> str:
    """What a user of the weights must know: the terms of the pictures, and of the weights they started from."""
    parts = [f"images: {dataset_terms or 'no terms stated'}"]
    if weights_terms:
        parts.append(f"initial weights: {weights_terms}")
    return "; ".join(parts)


def _refuse_foreign(client: MlflowClient, name: str, row: Row) -> bool:
    """Whether there is a registered model of this name; ValueError when it belongs to another row."""
    found = client.search_registered_models(f"name = '{name}'")
    if found and (other := found[0].tags.get("row")) != row.name:
        raise ValueError(
            f"the registry's model {name} belongs to {f'row {other}' if other else 'something else'}; "
            f"rename row {row.name} in params.yaml"
        )
    return bool(found)


def _open_model(client: MlflowClient, name: str, row: Row) -> bool:
    """Make the registered model if there is none; whether it was made. ValueError when it belongs to another row."""
    from mlflow.exceptions import MlflowException

    if _refuse_foreign(client, name, row):
        return False
    try:
        client.create_registered_model(name, tags={"row": row.name, "dataset": row.dataset, "task": row.task})
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS" or not _refuse_foreign(client, name, row):
            raise
        return False
    return True


def _registered(
    client: MlflowClient,
    name: str,
    row: Row,
    candidate: Candidate,
    settings: Mapping[str, Any],
    of_row: Mapping[str, str],
    manifest: Manifest,
) -> ModelVersion:
    """The version of a checkpoint with these settings: found again, or made."""
    text = json.dumps({"checkpoint": candidate.sha256, **settings}, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    tags = {
        **of_row,
        **figure_tags(candidate.figures),
        **({} if candidate.seed is None else {"seed": str(candidate.seed)}),
        "run_key": candidate.run_key,
        "checkpoint_sha256": candidate.sha256,
        "git_commit": candidate.git_commit or "unknown",
        "digest": digest,
    }
    found = _first(client, name, digest)
    if found is not None and not _has_files(client, found):
        print(f"{row.name}: the files of version {found.version} of {name} are gone; it is made again", file=sys.stderr)
        client.set_model_version_tag(name, found.version, "digest", f"{digest} (its files are gone)")
        found = None
    if found is None:
        made = _make(client, name, row, candidate, settings, tags, manifest)
        found = _first(client, name, digest) or made
        if found.version != made.version:  # another process was quicker
            client.delete_model_version(name, made.version)
            delete_model(client, client.get_logged_model(str(made.source).removeprefix("models:/")))
    end_registering(client, found)
    for key, value in tags.items():
        if found.tags.get(key) != value:  # evaluated again, or found under other terms
            client.set_model_version_tag(name, found.version, key, value)
    found.tags.update(tags)
    made_by = _made_by(row, candidate)
    client.update_model_version(
        name, found.version, version_description(row, candidate, licence=of_row["licence"], made_by=made_by)
    )
    return found


def _first(client: MlflowClient, name: str, digest: str) -> ModelVersion | None:
    return next((version for version in versions_of(client, name) if version.tags.get("digest") == digest), None)


def _has_files(client: MlflowClient, version: ModelVersion) -> bool:
    """Whether the model of a version lies where the server says; of one that somebody else has made, nobody looks."""
    if not str(version.source).startswith("models:/"):
        return True
    model = str(version.source).removeprefix("models:/")
    return any(entry.path.rpartition("/")[2] == "MLmodel" for entry in client.list_logged_model_artifacts(model))


def _make(
    client: MlflowClient,
    name: str,
    row: Row,
    candidate: Candidate,
    settings: Mapping[str, Any],
    tags: Mapping[str, str],
    manifest: Manifest,
) -> ModelVersion:
    """Log the model to the run that trained it, if the server knows it, and make it a version: both or nothing."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.entities.logged_model_status import LoggedModelStatus
    from mlflow.exceptions import MlflowException

    print(f"{row.name}: registering {candidate.description}, run {candidate.run_key}", file=sys.stderr, flush=True)
    network = trained_network(row, candidate)
    run = _known_run(client, candidate.mlflow_run_id)
    experiment = run.info.experiment_id if run else experiment_id(client)
    run_id = run.info.run_id if run else None
    model = client.create_logged_model(
        experiment, name=name, source_run_id=run_id, tags={**tags, **registering_tag()}, model_type="mask2former"
    )
    new = False
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model"
            save_model(path, network, settings, run_id=run_id, model_id=model.model_id)
            with _environment(MLFLOW_HTTP_REQUEST_TIMEOUT=str(UPLOAD_TIMEOUT_S)):
                client.log_model_artifacts(model.model_id, str(path))
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        if run_id is not None:
            client.log_outputs(run_id, models=[LoggedModelOutput(model.model_id, step=0)])
            client.log_batch(run_id, metrics=model_metrics(model, candidate.figures, tracked_data(manifest)))
        new = _open_model(client, name, row)
        made = client.create_model_version(
            name,
            source=f"models:/{model.model_id}",
            run_id=run_id,
            tags=dict(tags),
            model_id=model.model_id,
        )
    except BaseException:  # an interruption too
        with suppress(MlflowException):  # a server that has gone: the next registration cleans up
            delete_model(client, model)
            if new and not versions_of(client, name):
                client.delete_registered_model(name)
        raise
    return made


def _known_run(client: MlflowClient, run_id: str | None) -> Any:
    """The run that trained a checkpoint; None where the server does not know it."""
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def _set_best(
    client: MlflowClient, name: str, candidate: ModelVersion, *, force: bool
) -> tuple[ModelVersion, str | None]:
    """Give `best` to the version with the highest figure of those measured as the candidate was: of equals to the
    candidate, else to the latest.

    Returns the version that has the alias, and why it kept it although it is not comparable. Read again after it is
    set: of two processes that register at once, the later one sees both versions.
    """
    while True:
        versions = versions_of(client, name)
        holder_number = client.get_registered_model(name).aliases.get("best")
        holder = next((version for version in versions if str(version.version) == str(holder_number)), None)
        if holder is not None and _measured(holder) != _measured(candidate) and not force:
            kept = (
                f"version {holder.version} keeps the alias best: its figure was measured on other data or is another "
                "one, so that the two cannot be compared; --force gives the alias to the new one"
            )
            return holder, kept
        first = {version.tags.get("digest"): version for version in reversed(versions)}  # a twin may be deleted soon
        comparable = [version for version in first.values() if _measured(version) == _measured(candidate)]
        best = max(
            comparable,
            key=lambda version: (
                _percent(version) or 0.0,
                version.version == candidate.version,
                int(version.version),
            ),
        )
        if holder is not None and holder.version == best.version:
            return holder, None
        client.set_registered_model_alias(name, "best", best.version)


def _measured(version: ModelVersion) -> tuple[str | None, str | None]:
    """What makes figures comparable: which one it is, and of which data."""
    return version.tags.get("metric"), version.tags.get("dataset_digest")


def _percent(version: ModelVersion) -> float | None:
    """A version's figure; None: it was made by hand. Earlier ones have the tag `value`, a fraction."""
    tags = version.tags
    if (figure := tags.get("metric")) in tags:
        return float(tags[figure])
    return percent(float(tags["value"])) if "value" in tags else None


def _described(version: ModelVersion) -> RegisteredVersion:
    tags, value = version.tags, _percent(version)
    return RegisteredVersion(
        version=int(version.version),
        seed=int(tags["seed"]) if "seed" in tags else None,
        run_key=tags.get("run_key"),
        figure=tags.get("metric"),
        value=None if value is None else round(value / 100, 6),
    )


@contextmanager
def _answering(row: str) -> Iterator[None]:
    """Whatever the server refuses, or that it does not answer, as one sentence."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, UnusableDatabase) as error:
        raise _unregistered(row, error) from None


def _unregistered(row: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).replace(tracking_uri(), shown_uri()).split())
    if isinstance(error, UnusableDatabase):  # it says what to do
        return ValueError(f"row {row} could not be registered at {shown_uri()}: {reason}")
    return ValueError(
        f"row {row} could not be registered at {shown_uri()} ({reason[:300]}); "
        f"start the server or set MLFLOW_TRACKING_URI, then run: dvc repro register@{row}"
    )


@contextmanager
def _environment(**settings: str) -> Iterator[None]:
    """The environment with these variables, while the block runs: MLflow reads them at every call."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
