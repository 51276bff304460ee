"""What rows cost before they run: steps, GPU-hours, wall time on pools of GPUs, storage and money.

How long a picture takes comes from the best evidence there is: finished seeds of the row on GPUs, a benchmark of it on
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

from m2f.config import ModelConfig
from pipeline.cost.schedule import Job, Placed, Preemptions, simulate, utilisation
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
from pipeline.params.schema import Params, Row
from pipeline.runs.outcome import OVERLAYS
from pipeline.storage.results import (
    Evaluation,
    FetchedDataset,
    Manifest,
    find_result,
)

SHARD_MPX_PER_CORE_S = 18.0
"""Megapixels that a core turns into shards in a second (studies/measured.md, Sharding: the slowest of four)."""

RAW_BYTES_PER_PIXEL = 4
"""Of raw shards: three colours and a segment id."""

OVERLAY_BYTES_PER_PIXEL = 5
"""Of an overlay's PNG, three panels, per pixel of its picture: what the generated pictures of the demo take."""


# Plans


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Where rows would run, and at what price."""

    pools: int = 1
    """Groups of GPUs; a training has one to itself (or several)."""
    pool_gpus: int = 8
    efficiency: float = 0.9
    """Share of perfect scaling that several GPUs keep."""
    price_per_gpu_hour: float | None = None
    price_per_pool_hour: float | None = None
    """Of the instance that a pool is, whether or not a training uses all of its GPUs."""
    download_mib_s: float = 50.0
    cores: int = 16
    """That turn archives into shards."""
    preemption_hours: float | None = None
    """Mean time between two losses of a pool."""
    restart_minutes: float = 10.0

    def __post_init__(self) -> None:
        for name in ("pools", "pool_gpus", "cores"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.efficiency <= 1:
            raise ValueError(f"--efficiency is {self.efficiency:g}; it must be above 0 and at most 1")
        for name in ("download_mib_s", "preemption_hours", "price_per_gpu_hour", "price_per_pool_hour"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"--{name.replace('_', '-')} is {value:g}; it must be above 0")
        if self.price_per_gpu_hour is not None and self.price_per_pool_hour is not None:
            raise ValueError("give --price-per-gpu-hour or --price-per-pool-hour, not both")
        if self.restart_minutes < 0:
            raise ValueError(f"--restart-minutes is {self.restart_minutes:g}; it must be 0 or more")

    @property
    def price(self) -> float | None:
        """Of a pool for an hour; None: not given."""
        if self.price_per_gpu_hour is not None:
            return self.price_per_gpu_hour * self.pool_gpus
        return self.price_per_pool_hour

    @property
    def preemptions(self) -> Preemptions | None:
        """None: pools stay."""
        if self.preemption_hours is None:
            return None
        return Preemptions(mean_s=self.preemption_hours * HOUR_S, restart_s=self.restart_minutes * 60)


def make_plan(params: Params, names: Sequence[str], settings: Settings, *, results: Path) -> dict[str, Any]:
    """What rows cost and when they run, as JSON values. No names: all rows of the published tables.

    Every figure that rests on a duration is [least, expected, greatest]. ValueError names an unknown row.
    """
    rows = [params.row(name) for name in dict.fromkeys(names)] or [
        row for row in params.rows.values() if row.published or row.published_authors
    ]
    costs = [_Cost.of(row, settings, results) for row in rows]
    datasets = _preparation(params, list(dict.fromkeys(row.dataset for row in rows)), settings, results)
    jobs, schedules = [], []
    for side in range(3):
        jobs = _jobs(costs, datasets, side)
        schedules.append(simulate(jobs, pools=settings.pools, preemptions=settings.preemptions))
    entries = [_entry(cost, jobs, schedules, settings) for cost in costs]
    expected = schedules[1]
    return {
        "settings": dataclasses.asdict(settings),
        "rows": entries,
        "datasets": datasets,
        "total": {
            "seeds_left": sum(entry["seeds_left"] for entry in entries),
            "steps": sum(entry["steps"] * entry["seeds_left"] for entry in entries),
            "gpu_hours": _summed(entry["gpu_hours"] for entry in entries),
            "ends_h": [max((at.end_s for at in placed), default=0.0) / HOUR_S for placed in schedules],
            "money": None if settings.price is None else _summed(entry["money"] for entry in entries),
            "gib": sum(entry["gib"] for entry in entries)
            + sum(facts["archives_gib"] + facts["shards_gib"] for facts in datasets.values()),
            "preempted": sum(at.preempted for at in expected),
            "utilisation": utilisation(expected, pools=settings.pools),
        },
        "schedule": [
            {
                "row": job.name,
                "what": "evaluate" if job.first else "train",
                "start_h": at.start_s / HOUR_S,
                "end_h": at.end_s / HOUR_S,
                "pools": list(at.pools),
                "preempted": at.preempted,
            }
            for job, at in zip(jobs, expected, strict=True)
        ],
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cost:
    """One row on a plan's pools."""

    row: Row
    speed: Speed | None
    left: int
    """Seeds that are still to be trained."""
    pools: int
    workers: int
    step_s: float
    seed_s: float
    evaluation_s: float
    """Of all its seeds, with those that have been evaluated before; 0: nothing is left to evaluate."""
    bytes: int
    """That all its seeds leave behind."""

    @classmethod
    def of(cls, row: Row, settings: Settings, results: Path) -> _Cost:
        speed = known_speed(row, results)
        pictures = counted(row.dataset, find_result(Manifest, row.dataset, results=results))
        ended = settled(row, results)
        left = len(row.seeds) - len(ended)
        finished = {seed.seed for seed in ended if seed.status == "finished"}
        evaluated = find_result(Evaluation, row.name, results=results)
        done = {seed.seed for seed in evaluated.seeds if seed.checkpoints} if evaluated else set()
        to_evaluate = left or finished - done
        on_cpu = speed is not None and speed.kind == "cpu"
        pools = 1 if on_cpu else min(settings.pools, math.ceil(row.train.groups / settings.pool_gpus))
        workers = 1 if on_cpu else min(row.train.groups, pools * settings.pool_gpus)
        step_s = seed_s = tests_s = 0.0
        if speed is not None:
            alone = speed.evidence in ("benchmark", "published")  # of one device
            efficiency = settings.efficiency if alone and workers > 1 else 1.0
            groups = math.ceil(row.train.groups / workers)  # of the worker that has most
            step_s = groups * row.train.group_size * speed.train_s / efficiency
            seed_s = row.train.steps * step_s + validation_s(row, speed, pictures) / workers
            if to_evaluate:
                tests_s = (left + len(finished)) * evaluation_s(row, speed, pictures) / workers
        overlays = OVERLAYS * OVERLAY_BYTES_PER_PIXEL * area(pictures.usual) if pictures else 0
        size = len(row.seeds) * (CHECKPOINTS * checkpoint_bytes(row.model) + overlays)
        return cls(
            row=row,
            speed=speed,
            left=left,
            pools=pools,
            workers=workers,
            step_s=step_s,
            seed_s=seed_s,
            evaluation_s=tests_s,
            bytes=size,
        )

    def factor(self, side: int) -> float:
        """What durations are multiplied by for the least (0), expected (1) and greatest (2)."""
        low, high = SPREAD[self.speed.evidence] if self.speed else (1.0, 1.0)
        return (low, 1.0, high)[side]


def _jobs(costs: Sequence[_Cost], datasets: Mapping[str, Mapping[str, Any]], side: int) -> list[Job]:
    """Every seed that is left, and after a row's seeds its evaluation; nothing of rows whose speed is not known."""
    jobs: list[Job] = []
    for cost in costs:
        if cost.speed is None:
            continue
        factor, first = cost.factor(side), len(jobs)
        seed = Job(
            name=cost.row.name,
            duration_s=factor * cost.seed_s,
            pools=cost.pools,
            ready_s=datasets[cost.row.dataset]["ready_h"] * HOUR_S,
            saves_every_s=factor * cost.step_s * cost.row.train.checkpoint_interval,
        )
        jobs += [seed] * cost.left
        if cost.evaluation_s:
            after = tuple(range(first, len(jobs)))
            duration_s = factor * cost.evaluation_s
            jobs.append(Job(name=cost.row.name, duration_s=duration_s, pools=cost.pools, after=after, first=True))
    return jobs


def _entry(
    cost: _Cost, jobs: Sequence[Job], schedules: Sequence[Sequence[Placed]], settings: Settings
) -> dict[str, Any]:
    """A row's line."""
    mine = [place for place, job in enumerate(jobs) if job.name == cost.row.name]
    pool_hours = [
        sum(len(placed[place].pools) * (placed[place].end_s - placed[place].start_s) for place in mine) / HOUR_S
        for placed in schedules
    ]
    on_gpu = cost.speed is not None and cost.speed.kind == "cuda"
    hours = [settings.pool_gpus * each for each in pool_hours] if on_gpu else None
    return {
        "row": cost.row.name,
        "dataset": cost.row.dataset,
        "seeds": len(cost.row.seeds),
        "seeds_left": cost.left,
        "steps": cost.row.train.steps,
        "pools": cost.pools,
        "workers": cost.workers,
        "step_s": cost.step_s if cost.speed else None,
        "seed_h": [cost.factor(side) * cost.seed_s / HOUR_S for side in range(3)] if cost.speed else None,
        "evaluation_h": [cost.factor(side) * cost.evaluation_s / HOUR_S for side in range(3)] if cost.speed else None,
        "gpu_hours": hours,
        "money": None if settings.price is None or hours is None else [settings.price * each for each in pool_hours],
        "ends_h": [max((placed[place].end_s for place in mine), default=0.0) / HOUR_S for placed in schedules],
        "gib": cost.bytes / GIB,
        "evidence": cost.speed.evidence if cost.speed else None,
        "device": cost.speed.device if cost.speed else None,
        "device_kind": cost.speed.kind if cost.speed else None,
        "source": cost.speed.source if cost.speed else None,
    }


def _preparation(params: Params, names: Sequence[str], settings: Settings, results: Path) -> dict[str, dict[str, Any]]:
    """By dataset: what it takes on disk, and when its shards are there, one dataset after the other."""
    facts, ready_s = {}, 0.0
    for name in names:
        config = params.dataset(name)
        fetched, manifest = (
            find_result(FetchedDataset, name, results=results),
            find_result(Manifest, name, results=results),
        )
        pictures = counted(name, manifest)
        archives = sum(source.bytes for source in fetched.sources) if fetched else sum(config.bytes)
        pixels = (pictures.train + pictures.val) * area(pictures.usual) if pictures else 0
        if manifest is not None:
            shards = sum(manifest.bytes.values())
        else:
            shards = RAW_BYTES_PER_PIXEL * pixels if config.pixels == "raw" else archives
            ready_s += 0 if fetched else archives / (settings.download_mib_s * 2**20)
            ready_s += pixels / (SHARD_MPX_PER_CORE_S * 1e6 * settings.cores)
        facts[name] = {
            "archives_gib": archives / GIB,
            "shards_gib": shards / GIB,
            "pixels": config.pixels,
            "made": manifest is not None,
            "ready_h": 0.0 if manifest is not None else ready_s / HOUR_S,
        }
    return facts


def _summed(ranges: Iterable[Sequence[float] | None]) -> list[float]:
    """Ranges added up, as if all were wrong in the same direction."""
    known = [each for each in ranges if each is not None]
    return [sum(each[side] for each in known) for side in range(3)]


@cache
def checkpoint_bytes(model: ModelConfig) -> int:
    """Size of a checkpoint: the weights, and two moments and a step count of every trained parameter."""
    import torch

    from m2f.model import build_model

    with torch.device("meta"):  # shapes only
        network = build_model(model)
    weights = sum(value.numel() * value.element_size() for value in network.state_dict().values())
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return weights + sum(2 * parameter.numel() * parameter.element_size() + 4 for parameter in trained)
