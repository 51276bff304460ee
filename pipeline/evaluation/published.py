"""Published checkpoints, evaluated by the code that evaluates our own trainings, and the log of their training."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping
from typing import Any

from pipeline.compute.resources import Resources, cluster_resources
from pipeline.data.download import Fetched, downloaded
from pipeline.evaluation.evaluate_checkpoint import CODE as PLAIN_CODE
from pipeline.evaluation.evaluate_checkpoint import Job, evaluate, evaluation_key, finished_evaluation
from pipeline.params.schema import PublishedConfig, Row
from pipeline.params.tasks import primary
from pipeline.runs.checkpoints import save_model
from pipeline.runs.curve_file import point_line
from pipeline.runs.outcome import evaluation_dir
from pipeline.runs.published_log import logged_step_s, read_log
from pipeline.storage.files import local_file, sha256, write_text
from pipeline.storage.results.data import Manifest
from pipeline.storage.results.rows import EvaluatedCheckpoint, PaddedEvaluation, PublishedEvaluation
from pipeline.storage.root import storage_root
from pipeline.storage.stores import StoredPath

CONVERTED_BY = {"reference": "from_reference", "detectron2": "from_detectron2", "huggingface": "from_huggingface"}
"""The function of m2f.weights for each layout of a checkpoint."""

CODES = {
    layout: dataclasses.replace(PLAIN_CODE, roots=(*PLAIN_CODE.roots, f"m2f.weights.{function}"))
    for layout, function in CONVERTED_BY.items()
}
"""The definitions that make figures of a published checkpoint, by its layout."""


def evaluate_published(row: Row, config: PublishedConfig, *, manifest: Manifest, name: str = "") -> PublishedEvaluation:
    """Fetch, convert and evaluate a row's published checkpoint; `name`: its entry, if not called as the row.

    Our figures less the published ones should be within the last digit. A row that is tested unpadded is also evaluated
    padded to a multiple of 32, and `agrees` says which is nearer. The training log becomes a curve like ours. The
    result's mlflow_run_id is None: it is the stage that tells MLflow. ValueError when the file is not the row's
    network, or a log is none.
    """
    source = downloaded(config.url, sha256_prefix=digest_prefix(config.url))
    resources = cluster_resources(row, training=False)
    published = getattr(row, config.figures)
    evaluated = _compared(_evaluated(row, config, source, manifest, resources), row, published)
    other: PaddedEvaluation | None = None
    agrees = None
    if row.test.pad_multiple == 1:
        padded = dataclasses.replace(row, test=dataclasses.replace(row.test, pad_multiple=32, ms_flip=None))
        other = _compared(_evaluated(padded, config, source, manifest, resources), padded, published)
        if (first := primary(row.task)) in evaluated.difference:
            agrees = 1 if abs(evaluated.difference[first]) <= abs(other.difference[first]) else 32
    folder = run_dir(source.sha256)
    if config.log_url:
        write_log(config.log_url, folder)
    return PublishedEvaluation(
        row=row.name,
        dataset=row.dataset,
        task=row.task,
        primary=primary(row.task),
        url=config.url,
        sha256=source.sha256,
        published=dict(published),
        evaluated=evaluated,
        other_padding=other,
        agrees=agrees,
        mlflow_run_id=None,
        step_s=logged_step_s(downloaded(config.log_url).path) if config.log_url else None,
        curve=f"runs/{folder.name}/curve.jsonl" if config.log_url else None,
        checkpoint="" if name == row.name else name,
    )


def _evaluated(
    row: Row, config: PublishedConfig, source: Fetched, manifest: Manifest, resources: Resources
) -> EvaluatedCheckpoint:
    """The figures of a published checkpoint, found or made; it is converted only if they are to be made."""
    folder = run_dir(source.sha256)
    key = evaluation_key(row, manifest, sha256=source.sha256, device=resources.device_type, code=CODES[config.layout])
    if (found := finished_evaluation(evaluation_dir(folder, key), row.task)) is not None:
        return found
    from m2f import weights

    convert = getattr(weights, CONVERTED_BY[config.layout])
    with local_file(source.path, source.sha256) as file:
        tensors = convert(weights.read_checkpoint(file), row.model)
    path = save_model(folder, step=row.train.steps, run_key=folder.name, tensors=tensors)
    job = Job(
        row=row,
        manifest=manifest,
        checkpoint=path,
        sha256=sha256(path),
        run_key=folder.name,
        step=row.train.steps,
        run_dir=folder,
        key=key,
        what=f"published {row.name}",
        processes=resources.loader_processes,
    )
    return evaluate(job, resources)


def run_dir(sha256: str) -> StoredPath:
    """The run folder of a published training: published-<the beginning of its checkpoint's SHA-256>."""
    return storage_root() / "runs" / f"published-{sha256[:16]}"


def _compared(checkpoint: EvaluatedCheckpoint, row: Row, published: Mapping[str, Any]) -> PaddedEvaluation:
    """A checkpoint's figures beside the published ones."""
    both = {name: value for name, value in checkpoint.figures.items() if name in published and value is not None}
    return PaddedEvaluation(
        pad_multiple=row.test.pad_multiple,
        checkpoint=checkpoint,
        difference={name: 100 * value - published[name] for name, value in both.items()},
    )


def digest_prefix(url: str) -> str:
    """The beginning of a file's SHA-256 that its name ends with (name-ffd9d750.pth); empty when it has none."""
    found = re.search(r"-([0-9a-f]{8})\.\w+$", url)
    return found[1] if found else ""


def write_log(url: str, run_dir: StoredPath) -> None:
    """Write a published training log as the curve of a run folder. ValueError when it is none."""
    points = sorted(read_log(downloaded(url).path).items())
    now_ms = int(time.time() * 1000)
    write_text(run_dir / "curve.jsonl", "".join(f"{point_line(step, point, now_ms)}\n" for step, point in points))
