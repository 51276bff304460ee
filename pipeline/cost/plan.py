"""What rows cost before they run: steps, GPU-hours, days on the GPUs at hand, storage and money.

How long an image takes comes from the best evidence there is: finished seeds of the row on GPUs, a benchmark of it on
a GPU, the log of its published training, the published inference speed of its network on an A100, and for rows that
have none of these, what was measured on a CPU. docs/costs.md derives the formulae.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from m2f.config import ModelConfig, PixelDecoderConfig, QueryDecoderConfig
from pipeline.comparison.verdict import chance_to_tell
from pipeline.cost.speed import (
    CHECKPOINTS,
    GIB,
    HOUR_S,
    SPREAD,
    Speed,
    evaluation_s,
    known_speed,
    settled,
    validation_s,
)
from pipeline.data.images.sizes import area, counted
from pipeline.params.schema import DatasetConfig, Params, Row, VerdictConfig
from pipeline.params.tasks import primary
from pipeline.runs.outcome import OVERLAYS
from pipeline.storage.results.data import FetchedDataset, Manifest
from pipeline.storage.results.folder import find_result
from pipeline.storage.results.rows import Evaluation

RAW_BYTES_PER_PIXEL = 4
"""Of raw shards: three colours and a segment id."""

OVERLAY_BYTES_PER_PIXEL = 5
"""Of an overlay's PNG, three panels, per pixel of its image: what the generated images of the demo take."""

SEED_COUNTS = (1, 3, 5)
"""Numbers of seeds whose costs a plan compares."""

DIFFERENCE_POINTS = 0.5
"""The difference from the published figure that they are to show."""

NETWORKS: Mapping[tuple[str, str], tuple[int, int, int]] = {
    ("r50", "deformable"): (44_004_586, 43_898_240, 345),
    ("r101", "deformable"): (63_049_040, 62_838_144, 396),
    ("swin-t", "deformable"): (47_349_626, 47_349_626, 469),
    ("swin-s", "deformable"): (68_667_530, 68_667_530, 625),
    ("swin-b", "deformable"): (106_832_184, 106_832_184, 625),
    ("swin-l", "deformable"): (215_398_772, 215_398_772, 625),
    ("swin-l", "fapn"): (220_287_548, 220_287_548, 555),
}
"""By backbone and pixel decoder, of the published decoders without classes and queries: values saved, values trained,
and tensors that they are in, so that a plan builds no network."""

LEARNED_NORMS: Mapping[str, tuple[int, int]] = {"r50": (53_120, 106), "r101": (105_344, 208)}
"""By backbone: the values trained besides, and their tensors, where batch norm's scale and shift learn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Where rows would run, and at what price."""

    gpus: int = 8
    """At hand. A training takes as many of them as it has groups."""
    efficiency: float = 0.9
    """Share of perfect scaling that several GPUs keep."""
    price_per_gpu_hour: float | None = None
    spread: float | None = None
    """Standard deviation between seeds, in points; None: what params.yaml assumes."""

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ValueError(f"--gpus is {self.gpus}; it must be at least 1")
        if not 0 < self.efficiency <= 1:
            raise ValueError(f"--efficiency is {self.efficiency:g}; it must be above 0 and at most 1")
        if self.price_per_gpu_hour is not None and self.price_per_gpu_hour <= 0:
            raise ValueError(f"--price-per-gpu-hour is {self.price_per_gpu_hour:g}; it must be above 0")
        if self.spread is not None and self.spread <= 0:
            raise ValueError(f"--spread is {self.spread:g} points; it must be above 0")


def make_plan(params: Params, names: Sequence[str], settings: Settings, *, results: Path) -> dict[str, Any]:
    """What rows cost, as JSON values. No names: all rows of the published tables, or all where there are no such.

    Every figure that rests on a duration is [least, expected, greatest]. ValueError names an unknown row.
    """
    rows = [params.row(name) for name in dict.fromkeys(names)]
    rows = rows or [row for row in params.rows.values() if row.published or row.published_authors]
    rows = rows or list(params.rows.values())
    if not rows:
        raise ValueError("params.yaml has no rows, so there is nothing to plan; add one to `rows`")
    rule = params.verdict
    settings = dataclasses.replace(settings, spread=settings.spread or rule.assumed_spread_points)
    entries = [_entry(row, settings, rule, results) for row in rows]
    datasets, data_gib = _storage(params, list(dict.fromkeys(row.dataset for row in rows)), results)
    gpu_hours = _summed(entry["gpu_hours"] for entry in entries)
    # No order of the rows is shorter than all GPUs busy all the time, nor than the longest row.
    longest = [max((entry["hours"][side] for entry in entries if entry["hours"]), default=0.0) for side in range(3)]
    return {
        "settings": {**dataclasses.asdict(settings), "difference": DIFFERENCE_POINTS},
        "rows": entries,
        "datasets": datasets,
        "total": {
            "seeds_left": sum(entry["seeds_left"] for entry in entries),
            "steps": sum(entry["steps"] * entry["seeds_left"] for entry in entries),
            "gpu_hours": gpu_hours,
            "hours": [max(gpu_hours[side] / settings.gpus, longest[side]) for side in range(3)],
            "money": None if settings.price_per_gpu_hour is None else _summed(entry["money"] for entry in entries),
            "gib": sum(entry["gib"] for entry in entries) + data_gib,
        },
    }


def _entry(row: Row, settings: Settings, rule: VerdictConfig, results: Path) -> dict[str, Any]:
    """A row's line."""
    speed = known_speed(row, results)
    images = counted(row.dataset, find_result(Manifest, row.dataset, results=results))
    ended = settled(row, results)
    left = len(row.seeds) - len(ended)
    finished = {seed.seed for seed in ended if seed.status == "finished"}
    evaluated = find_result(Evaluation, row.name, results=results)
    done = {seed.seed for seed in evaluated.seeds if seed.checkpoints} if evaluated else set()
    on_gpu = speed is not None and speed.device_type == "cuda"
    workers = min(row.train.groups, settings.gpus) if on_gpu else 1
    step_s = seed_s = test_s = tests_s = 0.0
    if speed is not None:
        alone = speed.evidence in ("benchmark", "published") and speed.devices == 1
        efficiency = settings.efficiency if alone and workers > 1 else 1.0
        groups = math.ceil(row.train.groups / workers)  # of the worker that has most
        step_s = groups * row.train.group_size * speed.train_s / efficiency
        seed_s = row.train.steps * step_s + validation_s(row, speed, images) / workers
        test_s = evaluation_s(row, speed, images) / workers
        if left or finished - done:
            tests_s = (left + len(finished)) * test_s
    at_once = max(1, settings.gpus // workers) if on_gpu else 1
    hours = (math.ceil(left / at_once) * seed_s + tests_s) / HOUR_S
    gpu_hours = workers * (left * seed_s + tests_s) / HOUR_S if on_gpu else None
    one_seed = workers * (seed_s + test_s) / HOUR_S if on_gpu else None
    overlays = OVERLAYS * OVERLAY_BYTES_PER_PIXEL * area(images.usual) if images else 0
    return {
        "row": row.name,
        "dataset": row.dataset,
        "seeds": len(row.seeds),
        "seeds_left": left,
        "steps": row.train.steps,
        "workers": workers,
        "step_s": step_s if speed else None,
        "seed_h": _spread(speed, seed_s / HOUR_S),
        "evaluation_h": _spread(speed, tests_s / HOUR_S),
        "hours": _spread(speed, hours),
        "gpu_hours": _spread(speed, gpu_hours),
        "money": _spread(speed, _money(gpu_hours, settings)),
        "by_seeds": {str(count): _of_seeds(count, one_seed, row, speed, settings, rule) for count in SEED_COUNTS},
        "gib": len(row.seeds) * (CHECKPOINTS * checkpoint_bytes(row.model) + overlays) / GIB,
        "evidence": speed.evidence if speed else None,
        "device": speed.device if speed else None,
        "device_type": speed.device_type if speed else None,
        "source": speed.source if speed else None,
    }


def _of_seeds(
    count: int, one_seed: float | None, row: Row, speed: Speed | None, settings: Settings, rule: VerdictConfig
) -> dict[str, Any]:
    """What so many seeds cost with their evaluation, whatever is finished, and what they can show; `one_seed`: its
    GPU-hours. No chance where nothing is published that they are compared with."""
    gpu_hours = None if one_seed is None else count * one_seed
    published = row.reference.get(primary(row.task)) is not None
    return {
        "gpu_hours": _spread(speed, gpu_hours),
        "money": _spread(speed, _money(gpu_hours, settings)),
        "chance": chance_to_tell(
            count,
            DIFFERENCE_POINTS,
            spread=settings.spread or rule.assumed_spread_points,
            trainings=row.published_trainings,
            coverage=rule.coverage,
            assumed_spread=rule.assumed_spread_points,
        )
        if published
        else None,
    }


def _money(gpu_hours: float | None, settings: Settings) -> float | None:
    price = settings.price_per_gpu_hour
    return None if gpu_hours is None or price is None else price * gpu_hours


def _spread(speed: Speed | None, expected: float | None) -> list[float] | None:
    """[least, expected, greatest] by the evidence for a speed."""
    if speed is None or expected is None:
        return None
    low, high = SPREAD[speed.evidence]
    return [low * expected, expected, high * expected]


def _storage(params: Params, names: Sequence[str], results: Path) -> tuple[dict[str, dict[str, Any]], float]:
    """By dataset: what its archives and shards take on disk, None where nobody says. And all of that, in GiB, an
    archive of several datasets once."""
    facts: dict[str, dict[str, Any]] = {}
    every: dict[str, int] = {}
    for name in names:
        config = params.dataset(name)
        fetched = find_result(FetchedDataset, name, results=results)
        manifest = find_result(Manifest, name, results=results)
        images = counted(name, manifest)
        sources = _archives(config, fetched)
        archives = None if sources is None else sum(sources.values())
        every |= sources or {}
        if manifest is not None:
            shards: int | None = sum(manifest.bytes.values())
        elif config.pixels == "raw":
            shards = RAW_BYTES_PER_PIXEL * (images.train + images.val) * area(images.usual) if images else None
        else:
            shards = archives
        facts[name] = {
            "archives_gib": None if archives is None else archives / GIB,
            "shards_gib": None if shards is None else shards / GIB,
            "pixels": config.pixels,
            "made": manifest is not None,
        }
    return facts, sum(every.values()) / GIB + sum(each["shards_gib"] or 0.0 for each in facts.values())


def _archives(config: DatasetConfig, fetched: FetchedDataset | None) -> dict[str, int] | None:
    """Bytes of a dataset's sources, by digest or name; None: of one of them they are not known."""
    if fetched:
        return {source.sha256: source.bytes for source in fetched.sources}
    if len(config.bytes) < len(config.sources) or not all(config.bytes):
        return None
    return dict(zip(config.sha256 or config.sources, config.bytes, strict=True))


def _summed(ranges: Iterable[Sequence[float] | None]) -> list[float]:
    """Ranges added up, as if all were wrong in the same direction."""
    known = [each for each in ranges if each is not None]
    return [sum(each[side] for each in known) for side in range(3)]


@cache
def checkpoint_bytes(model: ModelConfig) -> int:
    """Size of a checkpoint: the weights, and two moments and a step count of every trained parameter."""
    return known_checkpoint_bytes(model) or built_checkpoint_bytes(model)


def known_checkpoint_bytes(model: ModelConfig) -> int | None:
    """The same without building the network; None where it has to be built."""
    name, queries = (model.backbone.name, model.pixel_decoder.name), model.query_decoder.queries
    published = ModelConfig(
        num_classes=model.num_classes,
        backbone=model.backbone,
        pixel_decoder=PixelDecoderConfig(name=model.pixel_decoder.name, float32=model.pixel_decoder.float32),
        query_decoder=QueryDecoderConfig(queries=queries),
        loss=model.loss,
    )
    if name in NETWORKS and model == published:
        saved, trained, tensors = NETWORKS[name]
        if not model.backbone.frozen_norm:
            values, more = LEARNED_NORMS.get(model.backbone.name, (0, 0))
            trained, tensors = trained + values, tensors + more
        own = 257 * (model.num_classes + 1) + 2 * 256 * queries
        return 4 * (saved + own) + 8 * (trained + own) + 4 * tensors
    return None


def built_checkpoint_bytes(model: ModelConfig) -> int:
    """The same of any network, by building it."""
    import torch

    from m2f.model import build_model

    with torch.device("meta"):  # shapes only
        network = build_model(model)
    weights = sum(value.numel() * value.element_size() for value in network.state_dict().values())
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return weights + sum(2 * parameter.numel() * parameter.element_size() + 4 for parameter in trained)
