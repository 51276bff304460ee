"""Shards and measurements as far as costs are read from them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from pipeline.params.schema import Row
from pipeline.provenance.run_key import settings_key
from pipeline.storage.results.data import ImageSides, Manifest, Split
from pipeline.storage.results.folder import write_result
from pipeline.storage.results.rows import TrainedSeed
from tests.helpers.made_up import A100, CPU, benchmark, checkpoint, padded, published_evaluation, trained_seed, training
from tests.helpers.manifests import made_up_manifest

H200 = dataclasses.replace(A100, device="NVIDIA H200")


def write_benchmark(
    results: Path,
    row: str,
    *,
    step_s: float,
    images: int,
    fps: float = 10.0,
    device_type: str = "cuda",
    **fields: Any,
) -> None:
    """A benchmark, as far as a plan reads it."""
    environment = H200 if device_type == "cuda" else dataclasses.replace(CPU, device="AMD EPYC")
    made = benchmark(row, environment=environment, fps=fps, step_s=step_s, images=images, **fields)
    write_result(made, row, results=results)


def write_trained(results: Path, row: Row, *seeds: TrainedSeed) -> None:
    write_result(training(row.name, seeds, settings_key(row)), row.name, results=results)


def seed(number: int, *, status: str = "finished", steps: int, images_per_s: float | None = 10.0) -> TrainedSeed:
    """A training on 4 GPUs, as far as a plan reads it."""
    return trained_seed(number, status=status, steps=steps, workers=4, images_per_s=images_per_s, environment=H200)


def write_log(results: Path, row: Row, *, step_s: float | None) -> None:
    """A published checkpoint's evaluation, with the step time of its log."""
    made = published_evaluation(row.name, padded(checkpoint("semantic", 0.5)), step_s=step_s)
    write_result(made, row.name, results=results)


def manifest(*, train: int, val: int, dataset: str = "ade20k") -> Manifest:
    """Of so many pictures; a plan reads no more of it than is said here."""
    sides = ImageSides(height=(100, 128, 200), width=(100, 192, 300))
    return made_up_manifest(
        dataset=dataset,
        splits={"train": Split(records=train, shards=()), "val": Split(records=val, shards=())},
        image_sizes={"train": sides, "val": sides},
        bytes={"train": 3 * 2**30, "val": 2**30},
    )
