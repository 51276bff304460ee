"""What MLflow's registry holds: versions of models, and what an interrupted registration has left."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING
from urllib.parse import unquote

from pipeline.params.parse import parse
from pipeline.runs.outcome import Owner
from pipeline.runs.owner import gone, this_process
from pipeline.storage.files import delete
from pipeline.storage.root import storage_root
from pipeline.tracking.client import mlflow_client, shown_uri, tracking_uri
from pipeline.tracking.database import UnusableDatabase, database_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

REGISTERING = "m2f.registering"
"""Tag of a logged model that is no version yet: which process makes it."""

_LONG_S = 24 * 3600.0
"""After this long, a process of another node that has not ended its registration has died."""


def versions_of(client: MlflowClient, name: str | None = None) -> list[ModelVersion]:
    """All versions of a model, or of all models, oldest first."""
    found: list[ModelVersion] = []
    token = None
    while True:
        page = client.search_model_versions(f"name = '{name}'" if name else None, max_results=1000, page_token=token)
        found += page
        token = page.token
        if not token:
            return sorted(found, key=lambda version: int(version.version))


def runs_of_versions() -> dict[str, str]:
    """The run that a registered version comes from, by its key, and the version's name. ValueError when the registry
    does not answer."""
    from mlflow.exceptions import MlflowException

    database = database_of(tracking_uri())
    if database is not None and not database.exists():
        return {}
    try:
        versions = versions_of(mlflow_client())
    except (MlflowException, UnusableDatabase) as error:
        reason = " ".join(str(error).replace(tracking_uri(), shown_uri()).split())[:300]
        raise ValueError(
            f"which runs registered models come from is not known: {shown_uri()} does not say it ({reason}); start the "
            "server or set MLFLOW_TRACKING_URI, or prune without --runs"
        ) from None
    named = ((version.tags.get("run_key"), f"version {version.version} of {version.name}") for version in versions)
    return {key: version for key, version in named if key}


def registering_tag() -> dict[str, str]:
    """The tag of a logged model that this process makes a version of."""
    return {REGISTERING: json.dumps(asdict(this_process()))}


def end_registering(client: MlflowClient, version: ModelVersion) -> None:
    """Let the logged model of a version say that it is one, if it does not: by us, or by who was killed before."""
    from mlflow.exceptions import MlflowException

    if not str(version.source).startswith("models:/"):  # somebody else has made it
        return
    model = client.get_logged_model(str(version.source).removeprefix("models:/"))
    if REGISTERING in model.tags:
        shown = json.dumps([{"name": version.name, "version": version.version}])  # by MLflow's list of models
        client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": shown})
        with suppress(MlflowException):  # another process has done it meanwhile
            client.delete_logged_model_tag(model.model_id, REGISTERING)


def delete_model(client: MlflowClient, model: LoggedModel) -> None:
    """Delete a logged model, and its files where they lie under the storage root."""
    client.delete_logged_model(model.model_id)
    root, location = f"{storage_root().as_uri()}/", str(model.artifact_location)
    if location.startswith(root) and model.model_id in location:
        folder = location.removeprefix(root).partition(model.model_id)[0] + model.model_id
        with suppress(FileNotFoundError):  # none was written yet
            delete(storage_root() / unquote(folder))


def delete_unfinished(client: MlflowClient, experiment: str, name: str) -> None:
    """Delete the logged models of this name that interrupted registrations have left."""
    token = None
    sources = {version.source for version in versions_of(client, name)}
    while True:
        page = client.search_logged_models([experiment], filter_string=f"name = '{name}'", page_token=token)
        for model in page:
            if f"models:/{model.model_id}" not in sources and _is_left(model):
                delete_model(client, model)
        token = page.token
        if not token:
            return


def _is_left(model: LoggedModel) -> bool:
    tag = model.tags.get(REGISTERING)
    if tag is None and model.status == "READY":
        return False
    if time.time() - model.creation_timestamp / 1000 > _LONG_S:
        return True
    with suppress(ValueError):  # of another version's layout: its age decides
        return tag is not None and gone(parse(Owner, json.loads(tag), REGISTERING))
    return False
