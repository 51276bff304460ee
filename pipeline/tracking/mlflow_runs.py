"""Curves and results in MLflow: a mirror of what lies in results/ and the run folders.

The disk is the record; MLflow shows it. So nothing here fails a run, a server that is down or slow costs at most 10 s
per outage, and what it missed is sent later: by the curve's own thread, by the next stage of the row, or by
`python -m stages.track`. No global MLflow state is used: runs are named by their id, so that several seeds can be
written from one process.

MLflow experiment = dataset, parent run = row, child run = one training (tag `m2f.run_key`). A run folder holds all
that its MLflow run shows: run.json (settings and tags), curve.jsonl, load.jsonl, environment.json,
evaluations/.
"""

from __future__ import annotations

import hashlib
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.provenance.environment import Environment
from pipeline.runs.curve_file import lines_of, read_points
from pipeline.runs.outcome import TrackedRun, evaluation_dir, note_of, write_note
from pipeline.storage.files import matching, read_json
from pipeline.storage.results import EvaluatedSeed, PublishedEvaluation, TrainedSeed, Which
from pipeline.storage.root import storage_root
from pipeline.storage.stores import StoredPath
from pipeline.tracking.client import attempt, in_background, metric_name, mlflow_client
from pipeline.tracking.experiments import experiment_id, open_described, row_run, send_tags
from pipeline.tracking.sender import METRICS_PER_BATCH, Backlog

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from pipeline.params.schema import PublishedConfig, Row


LOAD = "load.jsonl"
"""In a run folder: the machine's load, points like the curve's."""

_STATUS: Mapping[str, Literal["FINISHED", "FAILED", "KILLED"]] = {
    "finished": "FINISHED",
    "published": "FINISHED",
    "failed": "FAILED",
    "diverged": "FAILED",
    "stopped": "KILLED",
}
"""A training's status in results/train/, and MLflow's word for it."""


def open_training(
    run_dir: StoredPath, row: Row, *, seed: int, run_key: str, data_digest: str, workers: int
) -> str | None:
    """`open_run` for one seed of a row; its run folder remembers how, for a server that is down now."""
    return open_run(
        run_dir=run_dir,
        dataset=row.dataset,
        row=row.name,
        name=f"seed {seed} of {row.name}",  # what differs first: MLflow cuts names short
        run_key=run_key,
        params={"seed": seed, "task": row.task, "model": asdict(row.model), "train": asdict(row.train)},
        tags={
            "m2f.seed": str(seed),
            "m2f.task": row.task,
            "m2f.data_digest": data_digest,
            "m2f.workers": str(max(1, workers)),
            "mlflow.source.name": f"stages.train {row.name}",
        },
    )


def open_run(
    *,
    dataset: str,
    row: str,
    name: str,
    run_key: str,
    params: Mapping[str, object],
    tags: Mapping[str, str],
    run_dir: StoredPath | None = None,
    running: bool = True,
) -> str | None:
    """The MLflow run of one training: found again by `run_key`, or created with its settings below the row's
    parent run. Returns its id; None when the tracking server does not answer.

    `params` may be nested; leaves become `model.backbone.name` and the like. With `run_dir`, the run folder
    remembers all of it, so that a `Curve` or `catch_up` can open the run later. It and the row's run are shown as
    running unless `running` is off.
    """
    before = None
    if run_dir is not None:
        with suppress(ValueError):  # torn, or of another layout: it is written again
            before = note_of(run_dir, TrackedRun)
    opened_ms = before.opened_ms if before else int(time.time() * 1000)
    described = TrackedRun(
        dataset=dataset, row=row, name=name, run_key=run_key, params=params, tags=tags, opened_ms=opened_ms
    )
    if run_dir is not None:
        write_note(run_dir, described)
    return attempt(f"{name} is not tracked for now", lambda: open_described(described, running=running).info.run_id)


def catch_up(
    run_dir: StoredPath,
    *,
    status: str | None = None,
    tags: Mapping[str, str] | None = None,
    evaluation: str | None = None,
    patient: bool = False,
) -> str | None:
    """Send all that MLflow lacks of a run folder: the run itself, tags, points, figures, files and its status.

    Returns the run's id; None when the server does not answer, or nothing ever opened a run for the folder. What is
    there already is not sent twice, so it may be called at any time after the training. `status` as in
    results/train/ (None: not ended). `evaluation`: the key of the one that is shown. `patient`: wait for a slow server
    as long as it takes. ValueError: a file of the folder is torn.
    """
    described = note_of(run_dir, TrackedRun)
    if described is None:
        return None
    loss = f"{described.name} is not up to date in MLflow; later, python -m stages.track sends what it lacks"
    shown = {**machine_tags(run_dir), **(tags or {})}  # files that are torn are no fault of the server's
    folder = evaluation_dir(run_dir, evaluation) if evaluation is not None else None
    stage = "published" if status == "published" else "evaluate"
    figures = _figures(folder, f"dvc repro -f {stage}@{described.row}") if folder is not None else None
    if status:
        shown["m2f.status"] = status

    def send() -> str:
        client = mlflow_client()
        run = open_described(described, running=False)
        run_id = str(run.info.run_id)
        for name in ("curve.jsonl", LOAD):
            backlog = Backlog(run_dir / name)
            while backlog.send(client, run_id):
                pass
        files = {}
        if folder is not None and figures is not None:
            _send_figures(client, run, figures)
            files = _send_evaluation(client, run, folder)
        send_tags(client, run, shown | files)
        if status:
            _end(client, run, _STATUS[status], run_dir)
        return run_id

    return attempt(loss, send, patient=patient)


def track_published(
    row: Row, config: PublishedConfig, published: PublishedEvaluation, *, patient: bool = False
) -> str | None:
    """A run for a row's published training, with its log as curve and the figures of its checkpoint here.

    Returns the run's id; None when the server does not answer, or the row has no published log.
    """
    if published.curve is None:
        return None
    run_dir = (storage_root() / published.curve).parent
    open_run(
        run_dir=run_dir,
        dataset=row.dataset,
        row=row.name,
        name=f"published {row.name}",
        run_key=run_dir.name,
        params={"url": config.url, "log_url": config.log_url},
        tags={"m2f.published": "true", "m2f.task": row.task, "mlflow.source.name": f"stages.published {row.name}"},
        running=False,
    )
    return catch_up(run_dir, status="published", evaluation=published.evaluated.checkpoint.key, patient=patient)


def track_row(
    row: Row, seeds: Sequence[TrainedSeed | EvaluatedSeed], *, decides: Which | None = None, patient: bool = False
) -> dict[str, str | None]:
    """Bring MLflow up to date with a row: `catch_up` for every seed, then `log_row`.

    `seeds`: trained ones, or evaluated ones with the checkpoint that `decides`. Returns ids of runs: a seed's by its
    run key, the row's by the row's name; None where the server did not answer.
    """
    evaluated = {
        seed.run_key: seed.checkpoints[decides]
        for seed in seeds
        if decides and isinstance(seed, EvaluatedSeed) and seed.checkpoints
    }
    ids = {
        seed.run_key: catch_up(
            storage_root() / "runs" / seed.run_key,
            status=seed.status,
            evaluation=evaluated[seed.run_key].key if seed.run_key in evaluated else None,
            patient=patient,
        )
        for seed in seeds
    }
    ids[row.name] = log_row(
        dataset=row.dataset,
        row=row.name,
        statuses=[seed.status for seed in seeds],
        figures=[
            {f"test_{name}": value for name, value in checkpoint.figures.items()} for checkpoint in evaluated.values()
        ],
        published=row.published,
        tags={"m2f.dataset": row.dataset, "m2f.task": row.task},
        patient=patient,
    )
    return ids


def log_row(
    *,
    dataset: str,
    row: str,
    statuses: Sequence[str],
    figures: Sequence[Mapping[str, float | None]] = (),
    published: Mapping[str, object] | None = None,
    tags: Mapping[str, str] | None = None,
    patient: bool = False,
) -> str | None:
    """The row's run: how its trainings ended, and per figure <figure>_median, _min and _max over its seeds.

    `statuses`: of its seeds, as in results/train/; the row's run is FAILED when none finished. `figures`: of its
    evaluated seeds; one that a seed lacks is left out. `published`: the row's published figures. Returns the run's id.
    """
    metrics: dict[str, float] = {}
    for name in figures[0] if figures else ():
        values = [seed[name] for seed in figures]
        known = [value for value in values if value is not None]
        if len(known) == len(values):
            middle = statistics.median(known)
            metrics |= {f"{name}_median": middle, f"{name}_min": min(known), f"{name}_max": max(known)}
    counts = {status: list(statuses).count(status) for status in dict.fromkeys(statuses)}
    shown = {
        "m2f.seeds": ", ".join(f"{count} {status}" for status, count in counts.items()),
        **{f"m2f.published.{name}": str(value) for name, value in (published or {}).items()},
        **(tags or {}),
    }

    def send() -> str:
        client = mlflow_client()
        run = row_run(client, experiment_id(client, dataset), row, running=False)
        send_tags(client, run, shown)
        _send_figures(client, run, metrics)
        _end(client, run, "FINISHED" if "finished" in statuses else "FAILED")
        return str(run.info.run_id)

    return attempt(
        f"row {row} is not up to date in MLflow; later, python -m stages.track sends what it lacks",
        send,
        patient=patient,
    )


def set_tags(run_id: str | None, tags: Mapping[str, str]) -> None:
    """Tags of a run that goes on; one that it has is replaced. Waits for nobody: `catch_up` may send them again."""
    if run_id is not None:
        in_background(
            "a run's tags were not sent to MLflow",
            lambda: send_tags(mlflow_client(), mlflow_client().get_run(run_id), tags),
        )


def _figures(folder: StoredPath, made_by: str) -> dict[str, float] | None:
    """The figures of an evaluation as MLflow shows them; None: they are not there."""
    path = folder / "figures.json"
    if not path.exists():
        return None
    figures = read_json(path, made_by=made_by)
    if not isinstance(figures, dict) or any(type(value) not in (int, float) for value in figures.values()):
        raise ValueError(f"{path} holds no figures by name; make it again with: {made_by}")
    return figures


def _send_evaluation(client: MlflowClient, run: Run, folder: StoredPath) -> dict[str, str]:
    """Tables, charts and pictures of an evaluation, as far as they are there; the tag that says which were sent."""
    shown = [path for pattern in ("*.csv", "*.png", "confusion.json") for path in matching(folder, pattern)]
    files = {f"evaluation/{path.name}": path for path in shown}
    files |= {f"overlays/{path.name}": path for path in matching(folder / "overlays", "*.png")}
    digest = _digest(files)
    if files and run.data.tags.get("m2f.files") != digest:
        _send_files(client, run.info.run_id, files)
    return {"m2f.files": digest}


def machine_tags(run_dir: StoredPath) -> dict[str, str]:
    """What environment.json, which a worker writes, says about where a training runs and from which code."""
    environment = note_of(run_dir, Environment)
    if environment is None:
        return {}
    tags = {"m2f.device": environment.device, "m2f.device_type": "cuda" if environment.cuda else "cpu"}
    if environment.git_commit:
        tags |= {"m2f.git_commit": environment.git_commit, "mlflow.source.git.commit": environment.git_commit}
        tags["m2f.git_changed"] = str(environment.git_changed).lower()
    return tags


def _digest(files: Mapping[str, StoredPath]) -> str:
    digest = hashlib.sha256()
    for name, path in files.items():
        digest.update(f"{name}\n{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def _send_figures(client: MlflowClient, run: Run, metrics: Mapping[str, float]) -> None:
    from mlflow.entities import Metric

    time_ms, shown = int(time.time() * 1000), run.data.metrics
    new = [
        Metric(metric_name(key), float(value), time_ms, 0)
        for key, value in metrics.items()
        if shown.get(metric_name(key)) != float(value)
    ]
    for start in range(0, len(new), METRICS_PER_BATCH):
        client.log_batch(run.info.run_id, metrics=new[start : start + METRICS_PER_BATCH])


def _send_files(client: MlflowClient, run_id: str, files: Mapping[str, StoredPath]) -> None:
    """One request per file and folder: MLflow keeps local names, so the files are laid out under theirs first."""
    with tempfile.TemporaryDirectory() as folder:
        for artifact, path in files.items():
            local = Path(folder, artifact)
            local.parent.mkdir(parents=True, exist_ok=True)
            local.write_bytes(path.read_bytes())
        client.log_artifacts(run_id, folder)


def _end(client: MlflowClient, run: Run, status: str, run_dir: StoredPath | None = None) -> None:
    """End a run, at its last point."""
    if run.info.status == status:
        return
    points = read_points(lines_of(run_dir / "curve.jsonl")[-1:]) if run_dir else []
    client.set_terminated(run.info.run_id, status, points[-1].get("time_ms") if points else None)
