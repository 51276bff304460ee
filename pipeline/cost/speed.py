"""How fast a row trains and what a seed of it costs: measured here, from a published log, or from published speeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pipeline.data.images.sizes import PUBLISHED, ImageCounts, Size, area, counted, input_size, ms_flip_factor
from pipeline.params.schema import Row
from pipeline.provenance.run_key import settings_key
from pipeline.storage.results.data import Manifest
from pipeline.storage.results.folder import find_result
from pipeline.storage.results.rows import Benchmark, PublishedEvaluation, TrainedSeed, TrainingResult

_CITYSCAPES_FPS: Mapping[str, tuple[float, Size]] = {
    "r50": (9.17, (1024, 2048)),
    "r101": (7.11, (1024, 2048)),
    "swin-t": (7.18, (1024, 2048)),
    "swin-s": (5.57, (1024, 2048)),
    "swin-b": (4.32, (1024, 2048)),
    "swin-l": (2.86, (1024, 2048)),
}
_ADE20K_FPS: Mapping[str, tuple[float, Size]] = {
    "r50": (26.59, (512, 704)),
    "r101": (22.97, (512, 704)),
    "swin-t": (23.82, (512, 704)),
    "swin-s": (19.69, (512, 704)),
    "swin-b": (12.48, (640, 854)),
    "swin-l": (8.81, (640, 854)),
}
"""Published inference speeds on one A100 by backbone, and the usual input's size (mmsegmentation 1.2.2,
configs/mask2former/README.md): what rows without a published speed of their own are derived from."""

A100_FPS = {"ade20k": _ADE20K_FPS, "ade20k_objects": _ADE20K_FPS}
"""By dataset; on others, Cityscapes' speeds stand for all."""

FAPN_OPERATIONS: Mapping[str, float] = {
    "r50": 1.25,
    "r101": 1.19,
    "swin-t": 1.23,
    "swin-s": 1.17,
    "swin-b": 1.11,
    "swin-l": 1.06,
}
"""By backbone: operations of a network with FaPN's pixel decoder over those with the default one, 640 x 640 pixels
(`pipeline.cost.benchmark.forward_flops`)."""

TRAINING_FACTOR = 3.0
"""Forward and backward pass over the forward pass: the backward pass computes gradients by inputs and by weights."""

CHECKPOINTS = 2
"""Kept of a seed: the last and the best; both are evaluated."""

SPREAD: Mapping[str, tuple[float, float]] = {
    "trained": (1.0, 1.0),
    "benchmark": (0.9, 1.15),
    "log": (0.7, 1.4),
    "published": (0.5, 2.2),
}
"""Least and greatest plausible duration by evidence, as factors. benchmark: perfect scaling, and 0.78 of it instead of
0.9. log: another implementation, on other machines. published: durations that others report (docs/costs.md) are 0.9 to
2.1 times the derived ones, those at the upper end on V100s."""

GIB, HOUR_S = 2**30, 3600.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one seed of a row costs."""

    hours: float
    """GPU-hours of its training, validations included, if several GPUs share the work perfectly."""
    source: str
    """Where that comes from, for messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """How long a row's pictures take on one device."""

    evidence: Literal["trained", "benchmark", "log", "published"]
    train_s: float
    """Device-seconds per training picture: forward, backward and its share of the optimiser's step."""
    test_s: float
    """Device-seconds per validation picture at one size; 0: not known, or in `train_s` already."""
    device: str
    device_type: Literal["cuda", "cpu"]
    """cpu: a device is a whole machine."""
    source: str
    devices: int = 1
    """That were measured together; of 1, sums over workers are not in `train_s`."""


def estimated_gpu_hours(row: Row, results: Path) -> Estimate | None:
    """GPU-hours of one seed of a row, from what lies in the `results` folder or the published speed of its network.

    None when nothing is known: another network than the published ones, never run on a GPU. What was measured on a CPU
    says nothing about GPUs.
    """
    speed = known_speed(row, results)
    if speed is None or speed.device_type == "cpu":
        return None
    images = counted(row.dataset, find_result(Manifest, row.dataset, results=results))
    hours = (_training_s(row, speed) + validation_s(row, speed, images)) / HOUR_S
    return Estimate(hours, speed.source)


def known_speed(row: Row, results: Path) -> Speed | None:
    """The best evidence for a row's speed, on a GPU if there is any; None: there is none."""
    published = _published_speed(row, results)
    found = (
        _speed_of_trainings(row, results),
        _speed_of_benchmark(row, results),
        _speed_of_log(row, published, results),
        published,
    )
    known = [speed for speed in found if speed is not None]
    best = next((speed for speed in known if speed.device_type == "cuda"), known[0] if known else None)
    if best is None or best.evidence != "trained":
        return best
    # how long the pictures of an evaluation take, a training does not say
    return replace(
        best, test_s=next((speed.test_s for speed in known[1:] if speed.device_type == best.device_type), 0.0)
    )


def _speed_of_trainings(row: Row, results: Path) -> Speed | None:
    known = [
        (seed.environment, seed.workers, seed.images_per_s)
        for seed in _ended(row, find_result(TrainingResult, row.name, results=results))
        if seed.environment and seed.workers and seed.images_per_s
    ]
    if not known:
        return None
    device, cuda = known[0][0].device, known[0][0].cuda is not None
    return Speed(
        evidence="trained",
        train_s=statistics.median((workers if cuda else 1) / images_per_s for _, workers, images_per_s in known),
        test_s=0.0,
        device=device,
        device_type="cuda" if cuda else "cpu",
        source=f"{len(known)} finished seed{'s' * (len(known) > 1)} on {device}",
    )


def _speed_of_benchmark(row: Row, results: Path) -> Speed | None:
    found = find_result(Benchmark, row.name, results=results)
    if found is None or found.training is None or found.training.precision != row.train.precision:
        return None
    return Speed(
        evidence="benchmark",
        train_s=found.training.step_s / found.training.images,
        test_s=1 / found.inference.fps,
        device=found.environment.device,
        device_type=found.device_type,
        source=f"benchmark@{row.name} on {found.environment.device}",
        devices=found.training.workers,
    )


def _speed_of_log(row: Row, published: Speed | None, results: Path) -> Speed | None:
    """By the log of the published training, whose GPUs had a group each; inference as published."""
    found = find_result(PublishedEvaluation, row.name, results=results)
    if published is None or found is None or not found.step_s:
        return None
    return replace(
        published,
        evidence="log",
        train_s=found.step_s / row.train.group_size,
        source=f"the log of the published training, {found.step_s:.3g} s a step on {row.train.groups} GPUs",
    )


def _published_speed(row: Row, results: Path) -> Speed | None:
    """Derived from the published inference speed: of the row or, where none is printed, of its backbone and data."""
    own, name = row.published.get("inf_fps"), row.model.backbone.name
    of_backbones = A100_FPS.get(row.dataset, _CITYSCAPES_FPS)
    if own and row.dataset in PUBLISHED:
        pixel_s = 1 / own / area(input_size(PUBLISHED[row.dataset].usual, row.test))
        source = f"published speed of {row.name} on an A100, {own:g} fps"
    elif name in of_backbones:
        fps, (height, width) = of_backbones[name]
        pixel_s = 1 / fps / (height * width)
        source = f"published speed of {name} on an A100, {fps:g} fps at {width} x {height}"
        if row.model.pixel_decoder.name == "fapn":
            pixel_s *= FAPN_OPERATIONS[name]
            source += f", and {FAPN_OPERATIONS[name]:g} times its operations with FaPN"
    else:
        return None
    images = counted(row.dataset, find_result(Manifest, row.dataset, results=results))
    return Speed(
        evidence="published",
        train_s=TRAINING_FACTOR * pixel_s * area(row.train.augmentation.crop),
        test_s=pixel_s * area(input_size(images.usual, row.test)) if images is not None else 0.0,
        device="NVIDIA A100",
        device_type="cuda",
        source=source,
    )


def settled(row: Row, results: Path) -> list[TrainedSeed]:
    """Seeds that will not be trained again: they finished or diverged with the settings that the row has now."""
    trained = find_result(TrainingResult, row.name, results=results)
    return [] if trained is None or trained.settings != settings_key(row) else _ended(row, trained)


def _ended(row: Row, trained: TrainingResult | None) -> list[TrainedSeed]:
    return [
        seed
        for seed in (trained.seeds if trained else ())
        if seed.seed in row.seeds and seed.status in ("finished", "diverged") and seed.steps == row.train.steps
    ]


def _training_s(row: Row, speed: Speed) -> float:
    """Device-seconds of one seed's steps."""
    return row.train.steps * row.train.global_batch * speed.train_s


def validation_s(row: Row, speed: Speed, images: ImageCounts | None) -> float:
    """Device-seconds of one seed's validations while it trains."""
    if images is None or speed.evidence == "trained":
        return 0.0
    return math.ceil(row.train.steps / row.train.val_interval) * images.val * speed.test_s


def evaluation_s(row: Row, speed: Speed, images: ImageCounts | None) -> float:
    """Device-seconds of evaluating one seed's checkpoints, at one size and with ms+flip."""
    if images is None:
        return 0.0
    return CHECKPOINTS * images.val * speed.test_s * (1 + ms_flip_factor(images.usual, row.test))
