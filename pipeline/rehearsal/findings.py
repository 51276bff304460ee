"""What a rehearsal says of the whole row: speed, memory and projected hours, and what will not hold."""

from __future__ import annotations

import json
import math
import re
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cost.plan import checkpoint_bytes
from pipeline.cost.speed import CHECKPOINTS, GIB, HOUR_S
from pipeline.data.images.sizes import counted, ms_flip_factor
from pipeline.runs.curve_file import lines_of, read_points
from pipeline.storage.progress import duration
from pipeline.storage.results.data import Manifest
from pipeline.storage.results.folder import find_result, sound_result
from pipeline.storage.results.rows import TrainedSeed, TrainingResult
from pipeline.storage.root import storage_root

if TYPE_CHECKING:
    from pipeline.params.schema import Params, Row
    from pipeline.rehearsal.project import Extent, Project
    from pipeline.rehearsal.steps import Step

ENOUGH = 1.2
"""Pictures that the loader should make for each that is trained on."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A line of the page: what was measured, and what it means."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that a rehearsal has found."""

    figures: tuple[Figure, ...]
    problems: tuple[str, ...]
    """What will not hold."""
    measured: Mapping[str, Any]
    """The numbers behind the figures."""


def find(
    row: Row,
    params: Params,
    project: Project,
    extent: Extent,
    steps: Sequence[Step],
    *,
    missing: Sequence[str],
    price_per_gpu_hour: float | None,
) -> Findings:
    """Judge the steps. missing: what the row itself lacks here."""
    problems = [f"{step.name}: {step.error}" for step in steps if step.error is not None]
    problems += [f"the row needs {need}" for need in missing]
    trained = find_result(TrainingResult, row.name, results=project.folder / "results")
    seed = trained.seeds[0] if trained is not None else None
    rates = _rates(steps)
    figures: list[Figure] = []
    measured: dict[str, Any] = dict(rates)
    if seed is not None and seed.status == "finished":
        step_s = step_seconds(project, seed)
        measured |= {"step_s": step_s, "workers": seed.workers, "gpu_memory_mib": seed.peak_memory_mib}
        evaluation = next((_seconds_of_pictures(step) for step in steps if step.name == "evaluation"), None)
        parts = [_memory(row, steps, seed)]
        if step_s is None:
            parts.insert(0, ([Figure(name="training", value="not timed: too few steps; give more --steps")], []))
        else:
            parts.insert(0, _speed(row, extent, step_s, seed))
            parts.append(_loading(row, extent, step_s, rates))
            parts.append(_projected(row, extent, step_s, evaluation, seed, price_per_gpu_hour))
        for part in parts:
            figures += part[0]
            problems += part[1]
    if rates:
        figures.append(
            Figure(
                name="storage root",
                value=f"{rates['write_mib_per_s']:,.0f} MiB/s written, {rates['read_mib_per_s']:,.0f} MiB/s read",
                note="one file, from this machine's driver; a read may come from memory",
            )
        )
    disk = _disk(row, params, rates)
    return Findings(
        figures=(*figures, *disk[0]), problems=tuple(dict.fromkeys([*problems, *disk[1]])), measured=measured
    )


def step_seconds(project: Project, seed: TrainedSeed) -> float | None:
    """Median seconds between the points of the curve, which has one for every step; None: there were too few steps.

    Neither the first steps count, in which libraries choose algorithms, nor the one before which a worker was replaced.
    """
    points = read_points(lines_of(project.storage / seed.run_dir / "curve.jsonl"))
    times = {point["step"]: point["time_ms"] / 1000 for point in points if "loss" in point}
    resumed = {span.from_step for span in seed.worker_groups}
    steps = [step for step in sorted(times) if step - 1 in times and step - 1 not in resumed]
    between = [times[step] - times[step - 1] for step in steps]
    return statistics.median(between[2:] or between) if between else None


def _seconds_of_pictures(step: Step) -> float | None:
    """Seconds that an evaluation's pictures took, by its own lines, which leave out its start; None: it has none."""
    found = [re.search(r": (\d+) images? in .*, ([\d.,]+) images/s", line) for line in step.lines]
    rates = [(int(match[1]), float(match[2].replace(",", ""))) for match in found if match]
    return sum(count / rate for count, rate in rates if rate) if rates else None


def _number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _rates(steps: Sequence[Step]) -> dict[str, float]:
    step = next((step for step in steps if step.name == "loading and sums" and step.error is None), None)
    line = next((line for line in reversed(step.lines) if line.startswith("{")), "{}") if step else "{}"
    rates: dict[str, float] = json.loads(line)
    return rates


_Part = tuple[list[Figure], list[str]]


def _images(row: Row, extent: Extent) -> int:
    """Of a rehearsed step."""
    return 1 if extent.one_image else row.train.global_batch


def _speed(row: Row, extent: Extent, step_s: float, seed: TrainedSeed) -> _Part:
    devices = ", ".join(sorted({device for span in seed.worker_groups for device in span.devices})) or "unknown"
    images = _images(row, extent)
    note = f"{images} of the {row.train.global_batch} images of the row's step" if extent.one_image else ""
    rate = Figure(name="training", value=f"{_number(step_s)} s a step, {_number(images / step_s)} images/s", note=note)
    group = Figure(name="workers", value=f"{seed.workers} on {devices}")
    return [group, rate], []


def _memory(row: Row, steps: Sequence[Step], seed: TrainedSeed) -> _Part:
    published = row.published.get("train_mem_gib")
    beside = f"published: {published:g} GiB on {row.published.get('device', 'its GPU')}" if published else ""
    if seed.peak_memory_mib is not None:
        gib = seed.peak_memory_mib / 1024
        value = f"{gib:.2f} GiB of a GPU"
    else:
        training = next(step for step in steps if step.name == "training")
        value = f"{(training.memory_mib or 0) / 1024:.2f} GiB, the worker's whole process on the CPU"
    return [Figure(name="training memory", value=value, note=beside)], []


def _loading(row: Row, extent: Extent, step_s: float, rates: Mapping[str, float]) -> _Part:
    if not rates:
        return [], []
    trained, loaded = _images(row, extent) / step_s, rates["loaded_per_s"]
    figures = [
        Figure(
            name="loader",
            value=f"{_number(loaded)} images/s, {_number(loaded / trained)} times what is trained on",
            note="all workers' loader processes at the same time, files in memory",
        ),
        Figure(
            name="sums over workers",
            value=f"{_number(rates['sum_s'] * 1000)} ms" if rates["workers"] > 1 else "one worker has none",
            note=f"{rates['sum_s'] / step_s:.1%} of a step, if nothing overlaps" if rates["workers"] > 1 else "",
        ),
    ]
    if loaded < ENOUGH * trained and not extent.one_image:
        return figures, [
            f"the loader makes {_number(loaded)} images/s and the network takes {_number(trained)}; give workers "
            "more loader processes (M2F_LOADER_PROCESSES) or cores, or set `pixels: raw` in the data set"
        ]
    return figures, []


def _projected(
    row: Row, extent: Extent, step_s: float, evaluation_s: float | None, seed: TrainedSeed, price: float | None
) -> _Part:
    """Hours of the whole row by the rehearsed step and evaluation, in pixels' proportion where they are scaled."""
    workers = seed.workers or 1
    larger = 1 / extent.scale**2
    full_step_s = step_s * larger * row.train.global_batch / _images(row, extent)
    images = counted(row.dataset, sound_result(Manifest, row.dataset))
    tests_s = 0.0
    if evaluation_s is not None and images is not None and extent.images:
        # an evaluation shows every picture once at one size and, for the second column, as often as this says
        shown = 1 + ms_flip_factor(images.usual, row.test)
        image_s = larger * evaluation_s / (extent.images * (1 if extent.one_image else shown))
        validations = math.ceil(row.train.steps / row.train.val_interval)
        tests_s = images.val * image_s * (validations + CHECKPOINTS * shown)
    hours = (row.train.steps * full_step_s + tests_s) / HOUR_S
    seeds = len(row.seeds)
    what = f"{seeds} seed{'s' * (seeds > 1)}"
    on_gpu = seed.peak_memory_mib is not None
    figures = [
        Figure(
            name="whole row",
            value=f"{duration(hours * HOUR_S)} a seed; {what}: {duration(seeds * hours * HOUR_S)} one after the other",
            note=f"{row.train.steps:,} steps of {_number(full_step_s)} s, validations and evaluations with {workers} "
            f"worker{'s' * (workers > 1)}; from few steps and images: a rough figure",
        )
    ]
    gpu_hours = workers * hours
    if on_gpu:
        cost = f", {price * gpu_hours * seeds:,.0f} at {price:g} per GPU-hour" if price else ""
        figures.append(Figure(name="cost", value=f"{gpu_hours * seeds:,.0f} GPU-hours{cost}"))
    if on_gpu and gpu_hours > row.max_gpu_hours:
        return figures, [
            f"a seed takes {gpu_hours:,.0f} GPU-hours, and max_gpu_hours of the row is {row.max_gpu_hours:g}: it will "
            "not start; raise max_gpu_hours"
        ]
    if not on_gpu and row.train.steps * full_step_s > 30 * 24 * HOUR_S:
        return figures, ["this machine has no GPU, on which alone the row ends in days"]
    return figures, []


def _disk(row: Row, params: Params, rates: Mapping[str, float]) -> _Part:
    """Room for checkpoints, shards and archives, and the time that a checkpoint takes."""
    gib = CHECKPOINTS * len(row.seeds) * checkpoint_bytes(row.model) / GIB
    note = ""
    if rates:
        seconds = checkpoint_bytes(row.model) / 2**20 / rates["write_mib_per_s"]
        note = f"one is written in {seconds:.2g} s, every {row.train.checkpoint_interval:,} steps"
    figures = [Figure(name="checkpoints", value=f"{gib:,.1f} GiB for all seeds", note=note)]
    root = storage_root()
    if isinstance(root, Path):
        free = shutil.disk_usage(next(path for path in (root, *root.parents) if path.exists())).free / GIB
        if free < gib:
            return figures, [f"the storage root has {free:,.1f} GiB left, and the checkpoints take {gib:,.1f}"]
    return figures, []
