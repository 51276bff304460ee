"""Curves and results in MLflow: a mirror of what lies in results/ and the run folders.

The disk is the record; MLflow shows it. So nothing here fails a run, a server that is down or slow costs at most 10 s
per outage, and what it missed is sent later: by the curve's own thread, by the next stage of the row, or by
`python -m stages.track`. No global MLflow state is used: runs are named by their id, so that several seeds can be
written from one process.

One experiment holds all rows (pipeline.tracking.experiments). A run folder holds all that its MLflow run shows:
run.json (settings and tags), curve.jsonl, load.jsonl, environment.json, finished.json, evaluations/. Figures are
fractions there; pipeline.tracking.sender.shown_metric gives the names and percents that MLflow gets.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.provenance.environment import Environment
from pipeline.runs.curve_file import lines_of, read_points
from pipeline.runs.outcome import TrackedRow, TrackedRun, evaluation_dir, note_of, write_note
from pipeline.storage.files import matching
from pipeline.storage.results.folder import RESULTS
from pipeline.storage.results.rows import EvaluatedSeed, PublishedEvaluation, TrainedSeed, Which
from pipeline.storage.root import storage_root
from pipeline.storage.stores import StoredPath
from pipeline.tracking.client import attempt, in_background, mlflow_client, warn
from pipeline.tracking.experiments import experiment_id, open_described, row_run, send_tags
from pipeline.tracking.models import evaluations_of, send_models, table_tag, tables_of
from pipeline.tracking.pages import NOTE
from pipeline.tracking.rows import counted, row_description, row_metrics, row_tags, tracked_row
from pipeline.tracking.sender import METRICS_PER_BATCH, Backlog, shown_metric

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from pipeline.comparison.rows import Facts
    from pipeline.params.schema import PublishedConfig, Row, VerdictConfig
    from pipeline.storage.results.data import Manifest


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
    run_dir: StoredPath, row: Row, *, seed: int, run_key: str, manifest: Manifest, workers: int
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
            "m2f.data_digest": manifest.digest,
            "m2f.workers": str(max(1, workers)),
            "mlflow.source.name": f"stages.train {row.name}",
        },
        of_row=tracked_row(row, manifest),
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
    of_row: TrackedRow | None = None,
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
        dataset=dataset,
        row=row,
        name=name,
        run_key=run_key,
        params=params,
        tags=tags,
        opened_ms=opened_ms,
        of_row=of_row,
    )
    if run_dir is not None:
        write_note(run_dir, described)
    return attempt(f"{name} is not tracked for now", lambda: open_described(described, running=running).info.run_id)


def catch_up(
    run_dir: StoredPath,
    *,
    status: str | None = None,
    tags: Mapping[str, str] | None = None,
    evaluations: Mapping[Which, str] | None = None,
    decides: Which = "last",
    of_row: TrackedRow | None = None,
    patient: bool = False,
) -> str | None:
    """Send all that MLflow lacks of a run folder: the run itself, tags, points, figures, tables, files, models and its
    status.

    Returns the run's id; None when the server does not answer, or nothing ever opened a run for the folder. What is
    there already is not sent twice, so it may be called at any time after the training. `status` as in
    results/train/ (None: not ended). `evaluations`: keys of those of its checkpoints; the one that `decides` is shown.
    `of_row`: of the row whose result this is. Where the folder names another one, which was renamed or has the same
    training, it has a run below each of them. `patient`: wait for a slow server as long as it takes. ValueError: a file
    of the folder is torn.
    """
    described = note_of(run_dir, TrackedRun)
    if described is None:
        return None
    if of_row is not None:
        described = _below(described, of_row)
    loss = f"{described.name} is not up to date in MLflow; later, python -m stages.track sends what it lacks"
    shown = {**machine_tags(run_dir), **(tags or {})}  # files that are torn are no fault of the server's
    made_by = f"dvc repro -f {'published' if status == 'published' else 'evaluate'}@{described.row}"
    keys = dict(evaluations or {})
    figures = evaluations_of(run_dir, keys, made_by)
    if decides in figures:  # the last: MLflow shows the later of two
        figures[decides] = figures.pop(decides)
    folder = evaluation_dir(run_dir, keys[decides]) if decides in figures else None
    tables = tables_of(folder, made_by) if folder is not None else {}
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
        if folder is not None:
            files = _send_evaluation(client, run, folder, tables)
        send_tags(client, run, shown | files)
        send_models(client, run, described, run_dir, figures)
        if folder is not None:
            shown_figures = [found for name, value in figures[decides].items() if (found := shown_metric(name, value))]
            _send_metrics(client, client.get_run(run_id), dict(shown_figures))  # as its models have left it
        if status:
            _end(client, run, _STATUS[status], run_dir)
        return run_id

    return attempt(loss, send, patient=patient)


def _below(described: TrackedRun, of_row: TrackedRow) -> TrackedRun:
    """A training as one of this row, whatever the row was called that has trained it."""
    row, dataset = of_row.params["row"], of_row.params["dataset"]
    if described.row == row:
        return described if described.of_row else replace(described, of_row=of_row)
    name = f"{described.name.removesuffix(f' of {described.row}')} of {row}"
    tags = {**described.tags, "mlflow.source.name": f"stages.train {row}"}
    return replace(described, row=row, dataset=dataset, name=name, tags=tags, of_row=of_row)


def track_published(
    row: Row,
    config: PublishedConfig,
    published: PublishedEvaluation,
    *,
    manifest: Manifest | None = None,
    patient: bool = False,
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
        of_row=tracked_row(row, manifest),
        running=False,
    )
    evaluated: dict[Which, str] = {"last": published.evaluated.checkpoint.key}
    return catch_up(run_dir, status="published", evaluations=evaluated, patient=patient)


def track_row(
    row: Row,
    seeds: Sequence[TrainedSeed | EvaluatedSeed],
    *,
    manifest: Manifest | None = None,
    decides: Which = "last",
    verdict: VerdictConfig | None = None,
    stale: bool = False,
    patient: bool = False,
) -> dict[str, str | None]:
    """Bring MLflow up to date with a row: `catch_up` for every seed, then `log_row`.

    `seeds`: trained ones, or evaluated ones with the checkpoint that `decides`. `manifest`: of the row's data set.
    `verdict`: the rule by which the row is judged; None: it is not compared with what is published. `stale`: the seeds
    are of other settings than the row has now; they stay below the run of theirs, and the row's is left. Returns ids of
    runs: a seed's by its run key, the row's by the row's name; None where the server did not answer. ValueError: a file
    of a run folder is torn; all else is sent.
    """
    of_row = tracked_row(row, manifest)
    ids: dict[str, str | None] = {}
    torn: list[str] = []
    for seed in seeds:
        try:
            ids[seed.run_key] = catch_up(
                storage_root() / "runs" / seed.run_key,
                status=seed.status,
                evaluations=_evaluations(seed),
                decides=decides,
                of_row=None if stale else of_row,
                patient=patient,
            )
        except ValueError as error:
            torn.append(str(error))
    if not stale:
        statuses = [seed.status for seed in seeds]
        ids[row.name] = log_row(row, of_row, statuses=statuses, facts=_facts(row, verdict), patient=patient)
    if torn:
        raise ValueError("; ".join(torn))
    return ids


def _evaluations(seed: TrainedSeed | EvaluatedSeed) -> dict[Which, str]:
    if not isinstance(seed, EvaluatedSeed) or not seed.checkpoints:
        return {}
    return {"last": seed.checkpoints.last.key, "best": seed.checkpoints.best.key}


def _facts(row: Row, verdict: VerdictConfig | None) -> Facts | None:
    """What results/ says of a row; None where nobody asks, or where a result cannot be read, with a warning."""
    if verdict is None:
        return None
    from pipeline.comparison.rows import row_facts

    try:
        return row_facts(row, RESULTS, verdict)
    except ValueError as error:
        warn(f"row {row.name} is not compared with its published figures in MLflow", error)
        return None


def log_row(
    row: Row, of_row: TrackedRow, *, statuses: Sequence[str], facts: Facts | None = None, patient: bool = False
) -> str | None:
    """The row's run: its settings, how its trainings ended and, with `facts`, its figures beside the published ones,
    the verdict and a table of its seeds.

    `statuses`: of its seeds, as in results/train/; the row's run is FAILED when none finished. Returns the run's id.
    """
    tags = {"m2f.dataset": row.dataset, "m2f.task": row.task, "m2f.seeds": counted(statuses)}
    metrics = row_metrics(facts) if facts else {}
    if facts:
        tags |= {**row_tags(facts), NOTE: row_description(facts)}

    def send() -> str:
        client = mlflow_client()
        run = row_run(client, experiment_id(client), row.name, of_row, running=False)
        send_tags(client, run, tags)
        _send_metrics(client, run, metrics)
        _end(client, run, "FINISHED" if "finished" in statuses else "FAILED")
        return str(run.info.run_id)

    return attempt(
        f"row {row.name} is not up to date in MLflow; later, python -m stages.track sends what it lacks",
        send,
        patient=patient,
    )


def rows_experiment(*, patient: bool = False) -> str | None:
    """Id of the experiment that holds all rows; None when the server does not answer."""
    return attempt("where MLflow compares rows is not known", lambda: experiment_id(mlflow_client()), patient=patient)


def set_tags(run_id: str | None, tags: Mapping[str, str]) -> None:
    """Tags of a run that goes on; one that it has is replaced. Waits for nobody: `catch_up` may send them again."""
    if run_id is not None:
        in_background(
            "a run's tags were not sent to MLflow",
            lambda: send_tags(mlflow_client(), mlflow_client().get_run(run_id), tags),
        )


def _send_evaluation(client: MlflowClient, run: Run, folder: StoredPath, tables: Mapping[str, bytes]) -> dict[str, str]:
    """Tables, charts and pictures of an evaluation, as far as they are there; the tags that say which were sent."""
    files = {f"evaluation/{path.name}": path.read_bytes() for path in matching(folder, "*.png")}
    files |= {f"evaluation/{path.name}": path.read_bytes() for path in matching(folder, "confusion.json")}
    files |= {f"evaluation/{name}": content for name, content in tables.items()}
    files |= {f"overlays/{path.name}": path.read_bytes() for path in matching(folder / "overlays", "*.png")}
    digest = _digest(files)
    if files and run.data.tags.get("m2f.files") != digest:
        _send_files(client, run.info.run_id, files)
    return {"m2f.files": digest, **table_tag([f"evaluation/{name}" for name in tables])}


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


def _digest(files: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(f"{name}\n{hashlib.sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def _send_metrics(client: MlflowClient, run: Run, metrics: Mapping[str, float]) -> None:
    """Values by their names in MLflow; one that the run shows already is not sent."""
    from mlflow.entities import Metric

    time_ms, shown = int(time.time() * 1000), run.data.metrics
    new = [Metric(key, float(value), time_ms, 0) for key, value in metrics.items() if shown.get(key) != float(value)]
    for start in range(0, len(new), METRICS_PER_BATCH):
        client.log_batch(run.info.run_id, metrics=new[start : start + METRICS_PER_BATCH])


def _send_files(client: MlflowClient, run_id: str, files: Mapping[str, bytes]) -> None:
    """One request per file and folder: MLflow keeps local names, so the files are laid out under theirs first."""
    with tempfile.TemporaryDirectory() as folder:
        for artifact, content in files.items():
            local = Path(folder, artifact)
            local.parent.mkdir(parents=True, exist_ok=True)
            local.write_bytes(content)
        client.log_artifacts(run_id, folder)


def _end(client: MlflowClient, run: Run, status: str, run_dir: StoredPath | None = None) -> None:
    """End a run, at its last point."""
    if run.info.status == status:
        return
    points = read_points(lines_of(run_dir / "curve.jsonl")[-1:]) if run_dir else []
    client.set_terminated(run.info.run_id, status, points[-1].get("time_ms") if points else None)
