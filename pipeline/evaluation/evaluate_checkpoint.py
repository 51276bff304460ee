"""One checkpoint on the validation pictures: found again by its key, made in parts that merge exactly.

runs/<run key>/evaluations/<key>/ in the storage root holds

parts/<first>-<last>.json  what the metrics have counted on some neighbouring pictures, until all are there; beside it
                           <first>-<last>.images.json, every picture's own figures
overlays/<index>.png       some pictures with prediction and truth
result.json                the figures; it is written last, and says that the evaluation is finished

and beside it what MLflow shows. Parts follow from the number of pictures alone, so that any number of workers takes up
what others have left. Two processes that evaluate the same write the same files.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import itertools
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from m2f.kernels.build import use
from pipeline.evaluation.image_figures import ImageLine, images_file, merged_lines
from pipeline.params.parse import parse
from pipeline.params.schema import Row, Task
from pipeline.params.tasks import FIGURES
from pipeline.provenance.code import Code, code_digest
from pipeline.provenance.run_key import COMPILES, KEEPS_BYTES, PROGRESS, READS_SHARDS, SETTINGS, key_of, settings_facts
from pipeline.runs.outcome import OVERLAYS, evaluation_dir
from pipeline.storage.files import delete, files_below, matching, read_json, write_json, write_text
from pipeline.storage.progress import Progress
from pipeline.storage.results.data import Manifest
from pipeline.storage.results.rows import EvaluatedCheckpoint, Figures
from pipeline.storage.root import stored
from pipeline.storage.stores import StoredPath

if TYPE_CHECKING:
    from pipeline.compute.resources import Resources
    from pipeline.evaluation.task_metrics import TaskMetrics

CODE = Code(
    roots=(
        "m2f.model.build_model",
        "pipeline.evaluation.task_metrics.TaskMetrics",
        "pipeline.evaluation.task_metrics.measure",
        "pipeline.evaluation.evaluate_checkpoint.make_parts",
    ),
    left_out={
        **KEEPS_BYTES,
        **READS_SHARDS,
        **COMPILES,
        "pipeline.evaluation.overlays": "shows what was predicted",
        "pipeline.evaluation.evaluate_checkpoint._part_file": "says where a part lies",
        "pipeline.evaluation.evaluate_checkpoint._shown": "says which images are shown",
        "pipeline.evaluation.evaluate_checkpoint.Job": "its values are in the key, or say where bytes lie",
    },
    sinks=(*PROGRESS, "pipeline.evaluation.image_figures.ImageFigures"),  # it watches
    settings=SETTINGS,
)
"""The definitions that make predictions and figures of a checkpoint."""

RETRIES = 3
"""How often the parts of a lost worker are begun again."""

PROGRESS_EVERY_S = 2.0

MOST_IMAGES, MOST_PARTS = 64, 64
"""Pictures of a part, and parts of a data set that needs fewer."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A checkpoint that is to be evaluated, and how. Can be sent to another process."""

    row: Row
    manifest: Manifest
    checkpoint: StoredPath
    sha256: str
    """Of the checkpoint."""
    run_key: str
    """Of the training that wrote it."""
    step: int
    run_dir: StoredPath
    key: str
    what: str
    """It in words, for progress lines: seed 0 of ade20k_r50, step 160000."""
    processes: int
    """Loader processes of a worker."""

    @property
    def folder(self) -> StoredPath:
        """Where all of it lies."""
        return evaluation_dir(self.run_dir, self.key)


def evaluation_key(
    row: Row, manifest: Manifest, *, sha256: str, device: Literal["cuda", "cpu"], code: Code = CODE
) -> str:
    """The name of one evaluation, 16 hexadecimal digits: equal keys, equal figures.

    A digest of the checkpoint's own (`sha256`), the row's network and test settings, the validation pictures, the
    definitions that make predictions and figures (`code`), the precision, the kind of device and the kernels.
    """
    return key_of(
        checkpoint=sha256,
        task=row.task,
        model=settings_facts(row.model),
        test=settings_facts(row.test),
        data=manifest.digest,
        code=code_digest(code),
        precision={"network": row.test.precision, "tf32": row.train.tf32 if device == "cuda" else None},
        device=device,
        path=row.train.kernels if device == "cuda" else _kernels_here(row),  # a driver may have no GPU
    )


def _kernels_here(row: Row) -> Literal["plain", "compiled"]:
    """What this machine's CPU makes of the row's choice. ValueError names the row."""
    try:
        return use(row.train.kernels)
    except ValueError as error:
        raise ValueError(f"rows.{row.name}.train.{error}") from None


def finished_evaluation(folder: StoredPath, task: Task) -> EvaluatedCheckpoint | None:
    """What a finished evaluation of a row of this task found; None: it is not finished, or something of it is gone or
    cannot be read: it is made again."""
    path = folder / "result.json"
    try:
        found = parse(EvaluatedCheckpoint, read_json(path, made_by=""), str(path))
        known = read_json(folder / "figures.json", made_by="")
    except ValueError:
        return None
    whole = found.key == folder.name and set(FIGURES[task]) <= set(found.figures) and known == _shown_figures(found)
    return found if whole and overlays_of(folder) else None


def overlays_of(folder: StoredPath) -> list[StoredPath]:
    """The pictures that an evaluation has drawn."""
    return matching(folder / "overlays", "*.png")


def evaluate(job: Job, resources: Resources) -> EvaluatedCheckpoint:
    """A checkpoint's figures: found, or made of the parts that are there and those that are still missing.

    In this process, or as one Ray task per worker. ValueError when the checkpoint is altered or of another run.
    """
    if (found := finished_evaluation(job.folder, job.row.task)) is not None:
        print(f"{job.what}: evaluated before", file=sys.stderr, flush=True)
        return found
    import torch

    from pipeline.runs.checkpoints import check_digest

    stored(f"runs/{job.run_key}/checkpoints/{job.checkpoint.name}", made_by=f"dvc repro -f train@{job.row.name}")
    check_digest(job.checkpoint, job.sha256, row=job.row.name)
    records = job.manifest.split("val").records
    parts = parts_of(records)
    missing = [part for part in parts if not _part_file(job, part).exists()]
    if missing:
        progress = Progress(f"evaluating {job.what}", records, unit="images")
        progress.restart(records - sum(map(len, missing)), records)
        try:
            if resources.workers == 0 or (resources.workers == 1 and not os.environ.get("RAY_ADDRESS")):
                _make_checked(job, missing, progress.add, use_gpu=resources.use_gpu)
            else:  # one worker too: a cluster's GPU may not be of this machine
                _make_with_ray(job, missing, resources, progress)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"{job.what}: the GPU has no memory for a validation image; end what else runs on it, or take one with "
                f"more ({next(iter(str(error).splitlines()), '')[:200]})"
            ) from None
        progress.done()
    try:
        metrics = _merged(job, parts)
    except FileNotFoundError:  # another process has finished it meanwhile
        if (found := finished_evaluation(job.folder, job.row.task)) is not None:
            return found
        raise
    images = merged_lines([images_file(job.folder, part) for part in parts])
    found = keep(job.run_dir, job.key, metrics, step=job.step, title=job.what, images=images)
    with contextlib.suppress(OSError):  # another process deletes them, or writes one that nobody needs any more
        delete(job.folder / "parts")
    return found


def parts_of(records: int) -> list[range]:
    """The places of all pictures in runs of neighbours, however many workers there are."""
    size = max(1, min(MOST_IMAGES, records // MOST_PARTS))
    return [range(first, min(first + size, records)) for first in range(0, records, size)]


def make_parts(job: Job, parts: Sequence[range], on_image: Callable[[], None] = lambda: None) -> None:
    """Evaluate the pictures of some parts in this process, and write each part when its last picture is done."""
    import torch

    from m2f.inference.recorded import RecordedNetwork
    from m2f.model import build_model
    from pipeline.compute.precision import allow_tf32
    from pipeline.evaluation.image_figures import ImageFigures
    from pipeline.evaluation.overlays import write_overlay
    from pipeline.evaluation.task_metrics import TaskMetrics, predict_images
    from pipeline.runs.checkpoints import load_checkpoint

    waiting = [part for part in parts if not _part_file(job, part).exists()]  # a task may be a second attempt
    if not waiting:
        return
    allow_tf32(job.row.train.tf32)
    use(job.row.train.kernels, device="cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(job.row.model)
    load_checkpoint(job.checkpoint, model=model, run_key=job.run_key, digest=job.sha256)
    if torch.cuda.is_available():
        model.cuda()
    shown = _shown(job.manifest.split("val").records)
    places = [place for part in waiting for place in part]
    val_images = predict_images(RecordedNetwork(model), job.manifest, job.row, places=places, processes=job.processes)
    for part in waiting:
        metrics = TaskMetrics(job.row, job.manifest)
        images = ImageFigures(job, part)
        for val_image, predictions in itertools.islice(val_images, len(part)):
            metrics.update(val_image, predictions)
            images.add(val_image, metrics)
            if val_image.index in shown:
                path = job.folder / "overlays" / f"{val_image.index:05d}.png"
                write_overlay(path, val_image, predictions, job.row.model.num_classes)
            on_image()
        images.save(metrics)
        write_json(_part_file(job, part), metrics.state())


def _make_checked(
    job: Job, parts: Sequence[range], on_image: Callable[[], None] = lambda: None, *, use_gpu: bool
) -> None:
    """`make_parts`; ValueError where they are to be made on a GPU that torch cannot use."""
    from pipeline.compute.resources import check_gpu

    if use_gpu:
        check_gpu()
    make_parts(job, parts, on_image)


def _make_with_ray(job: Job, parts: Sequence[range], resources: Resources, progress: Progress) -> None:
    """Evaluate parts in as many Ray tasks as there are workers. A worker that is lost is replaced."""
    import ray

    from pipeline.compute.ray_session import connect, tasks_said

    print(f"{job.what}: starting Ray and the workers", file=sys.stderr, flush=True)
    connect()
    workers = min(resources.workers, len(parts))
    task = ray.remote(_make_checked).options(
        num_cpus=resources.cpus_per_worker,
        num_gpus=1 if resources.use_gpu else 0,
        accelerator_type=resources.gpu_type,
        max_retries=RETRIES,
    )
    running = [task.remote(job, parts[worker::workers], use_gpu=resources.use_gpu) for worker in range(workers)]
    try:
        with tasks_said(job.what):
            while running:
                ended, running = ray.wait(running, num_returns=len(running), timeout=PROGRESS_EVERY_S)
                ray.get(ended)
                progress.add(job.manifest.split("val").records - _left(job) - progress.count)
    finally:
        for each in running:  # after an error or an interruption: what the others have finished stays
            ray.cancel(each, force=True)


def _left(job: Job) -> int:
    """Pictures of the parts that are not there."""
    there = files_below(job.folder / "parts")
    return sum(len(part) for part in parts_of(job.manifest.split("val").records) if _part_name(part) not in there)


def _merged(job: Job, parts: Sequence[range]) -> TaskMetrics:
    """The metrics of all parts together, in their order."""
    from pipeline.evaluation.task_metrics import TaskMetrics

    metrics = TaskMetrics(job.row, job.manifest)
    for part in parts:
        path = _part_file(job, part)
        try:
            metrics.add_state(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError) as error:
            path.unlink(missing_ok=True)
            raise ValueError(
                f"{path} was altered ({type(error).__name__}: {error}) and is deleted; run the same command again, "
                "which makes it anew"
            ) from None
    return metrics


def keep(
    run_dir: StoredPath,
    key: str,
    metrics: TaskMetrics,
    *,
    step: int,
    title: str,
    images: Sequence[ImageLine] = (),
) -> EvaluatedCheckpoint:
    """Write what is shown of an evaluation, and last its result, which this returns. images: the pictures' own
    figures."""
    folder = evaluation_dir(run_dir, key)
    found = EvaluatedCheckpoint(key=key, step=step, figures=metrics.figures(), per_class=metrics.per_class())
    _show(folder, found, metrics, title)
    if images:
        write_json(folder / "images.json", list(images))
    write_json(folder / "result.json", dataclasses.asdict(found))
    return found


def _show(folder: StoredPath, found: EvaluatedCheckpoint, metrics: TaskMetrics, title: str) -> None:
    """Write what MLflow shows of an evaluated checkpoint: figures.json, classes as a table and a chart, confusions.

    confusion.json holds pixels by true class (rows) and predicted class (columns).
    """
    from pipeline.evaluation.class_charts import draw_confusion, draw_per_class

    write_text(folder / "per_class.csv", _table(found.per_class))
    draw_per_class(folder / "per_class.png", found.per_class, title)
    if metrics.semantic is not None:
        confusion = metrics.semantic.confusion.cpu().numpy()
        pixels = {"class_names": metrics.class_names, "true_by_predicted": confusion.tolist()}
        write_text(folder / "confusion.json", json.dumps(pixels, ensure_ascii=False) + "\n")
        draw_confusion(folder / "confusion.png", confusion, metrics.class_names, title)
    write_json(folder / "figures.json", _shown_figures(found))


def _shown_figures(found: EvaluatedCheckpoint) -> dict[str, float]:
    """The figures by their names in MLflow; those that had nothing to count are left out."""
    return {f"test_{name}": value for name, value in found.figures.items() if value is not None}


def _table(per_class: Mapping[str, Figures]) -> str:
    """Per-class values as CSV, which MLflow shows as a table: a row per class, a column per metric."""
    classes = list(dict.fromkeys(name for values in per_class.values() for name in values))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["class", *per_class])
    for name in classes:
        values = [per_class[metric].get(name) for metric in per_class]
        writer.writerow([name, *("" if value is None else f"{value:.4f}" for value in values)])
    return text.getvalue()


def _part_name(part: range) -> str:
    return f"{part.start:06d}-{part.stop - 1:06d}.json"


def _part_file(job: Job, part: range) -> StoredPath:
    return job.folder / "parts" / _part_name(part)


def _shown(records: int) -> set[int]:
    """The places of the pictures that are drawn."""
    import numpy as np

    return set(np.linspace(0, records - 1, min(OVERLAYS, records)).round().astype(int).tolist())
