"""A training's kept checkpoints as logged models of its run, and what evaluations say of them as tables."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.params.tasks import LABELS, percent
from pipeline.runs.outcome import Finished, TrackedRun, TrackedSplit, evaluation_dir, note_of
from pipeline.storage.files import read_json
from pipeline.storage.stores import StoredPath
from pipeline.tracking.sender import shown_metric

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Metric, Run

    from pipeline.storage.results.rows import TrainedCheckpoint, Which

MODEL_TYPE = "mask2former"
_CHECKPOINT = "m2f.checkpoint_sha256"
_TABLES = "mlflow.loggedArtifacts"
"""Tag that lists a run's tables: MLflow's page and mlflow.load_table find them by it."""


def evaluated_figures(folder: StoredPath, made_by: str) -> dict[str, float] | None:
    """The figures of an evaluation, as fractions by name; None: they are not there."""
    path = folder / "figures.json"
    if not path.exists():
        return None
    figures = read_json(path, made_by=made_by)
    if not isinstance(figures, dict) or any(type(value) not in (int, float) for value in figures.values()):
        raise ValueError(f"{path} holds no figures by name; make it again with: {made_by}")
    return figures


# Models


def send_models(
    client: MlflowClient,
    run: Run,
    described: TrackedRun,
    run_dir: StoredPath,
    figures: Mapping[Which, Mapping[str, float]],
) -> None:
    """A logged model for each checkpoint that the training has kept, with its figures on the validation split.

    figures: of the evaluated checkpoints, as fractions; the last of them is what the run itself shows. The files stay
    in the run folder, which a tag names; a registered model is one of its own.
    """
    from mlflow.entities import LoggedModelOutput
    from mlflow.entities.logged_model_status import LoggedModelStatus

    finished = note_of(run_dir, Finished)
    if finished is None:
        return
    query = f"source_run_id = '{run.info.run_id}'"
    found = client.search_logged_models([run.info.experiment_id], filter_string=query)
    known = {model.tags[_CHECKPOINT]: model for model in found if _CHECKPOINT in model.tags}
    kept: dict[Which, TrainedCheckpoint] = {"last": finished.checkpoints.last, "best": finished.checkpoints.best}
    names: dict[str, list[Which]] = {}
    for which, checkpoint in kept.items():
        names.setdefault(checkpoint.sha256, []).append(which)
    for sha256, called in names.items():
        checkpoint, model = kept[called[0]], known.get(sha256)
        if model is None:
            model = client.create_logged_model(
                run.info.experiment_id,
                name=f"{' and '.join(called)}, {described.name}",  # what differs first: MLflow cuts names short
                source_run_id=run.info.run_id,
                tags={
                    _CHECKPOINT: sha256,
                    "m2f.checkpoint": f"runs/{described.run_key}/{checkpoint.path}",
                    **{key: described.tags[key] for key in ("m2f.seed", "m2f.task") if key in described.tags},
                },
                params={**_texts(described.of_row.params if described.of_row else {}), "step": str(checkpoint.step)},
                model_type=MODEL_TYPE,
            )
            client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, step=checkpoint.step)])
        if model.status != LoggedModelStatus.READY:
            client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        known[sha256] = model
    metrics = [
        metric
        for place, (which, values) in enumerate(figures.items())
        for metric in model_metrics(
            known[kept[which].sha256],
            {name.removeprefix("test_"): value for name, value in values.items()},
            described.of_row.data if described.of_row else (),
            later=place,
        )
    ]
    if metrics:
        client.log_batch(run.info.run_id, metrics=metrics)


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items()}


def model_metrics(
    model: LoggedModel, figures: Mapping[str, float | None], data: Sequence[TrackedSplit], *, later: int = 0
) -> list[Metric]:
    """The figures that a logged model lacks, of the validation split among `data`; they are shown at its run too, and
    of two values there the `later` one counts, in ms."""
    from mlflow.entities import Metric

    there = {(metric.key, metric.value) for metric in model.metrics or ()}
    known = {name: value for name, value in figures.items() if value is not None}
    shown = [found for name, value in known.items() if (found := shown_metric(f"test_{name}", value))]
    new = [(name, value) for name, value in shown if (name, value) not in there]
    on = next(((split.name, split.digest) for split in data if split.split == "val"), (None, None))
    time_ms = int(time.time() * 1000) + later
    return [Metric(name, value, time_ms, 0, model.model_id, *on) for name, value in new]


# Tables


def tables_of(folder: StoredPath, made_by: str) -> dict[str, bytes]:
    """The tables of an evaluation in MLflow's format, by their files' names; figures are percent. Columns have the
    plain names of figures: MLflow's page shows nothing below one with a dot, as "pixel acc."."""
    tables: dict[str, bytes] = {}
    result, images = folder / "result.json", folder / "images.json"
    if result.exists():
        content = read_json(result, made_by=made_by)
        per_class = content.get("per_class") if isinstance(content, dict) else None
        if not isinstance(per_class, dict):
            raise ValueError(f"{result} holds no figures of classes; make it again with: {made_by}")
        classes = dict.fromkeys(name for values in per_class.values() for name in values)
        lines = [[name, *(_shown(values.get(name)) for values in per_class.values())] for name in classes]
        tables["per_class.json"] = _table(["class", *per_class], lines)
    if images.exists():
        found = read_json(images, made_by=made_by)
        if not isinstance(found, list) or not all(isinstance(line, dict) for line in found):
            raise ValueError(f"{images} holds no lines of images; make it again with: {made_by}")
        columns = list(dict.fromkeys(name for line in found for name in line))
        lines = [[_shown(line.get(name)) if name in LABELS else line.get(name) for name in columns] for line in found]
        tables["images.json"] = _table(columns, lines)
    return tables


def _shown(fraction: float | None) -> float | None:
    return None if fraction is None else round(percent(fraction), 2)


def _table(columns: Sequence[str], lines: Sequence[Sequence[Any]]) -> bytes:
    return json.dumps({"columns": list(columns), "data": [list(line) for line in lines]}).encode()


def table_tag(paths: Sequence[str]) -> dict[str, str]:
    """The tag that lists these artifacts as tables."""
    return {_TABLES: json.dumps([{"path": path, "type": "table"} for path in paths])} if paths else {}


def evaluations_of(run_dir: StoredPath, evaluated: Mapping[Which, str], made_by: str) -> dict[Which, dict[str, float]]:
    """The figures of a training's evaluated checkpoints that are there."""
    found = {which: evaluated_figures(evaluation_dir(run_dir, key), made_by) for which, key in evaluated.items()}
    return {which: figures for which, figures in found.items() if figures is not None}
