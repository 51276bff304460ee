"""What a row needs before it can be trained here: data, accepted terms, a GPU, and leave to use it for so long."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from pipeline.compute.resources import gpus_here
from pipeline.compute.variables import environment_int
from pipeline.cost.speed import estimated_gpu_hours
from pipeline.data.fetch import lacking
from pipeline.params.schema import Params, Row
from pipeline.storage.results.data import Manifest
from pipeline.storage.results.folder import RESULTS, sound_result
from pipeline.storage.results.rows import TrainingResult

WITHOUT_TRAINING = {"fetch", "shard", "weights", "published", "benchmark"}
"""Stages that need no training of a row."""


def needs(
    row: Row,
    params: Params,
    *,
    base: Path,
    training: bool = True,
    trained_counts: bool = False,
    by_name: bool = True,
    results: Path = RESULTS,
) -> list[str]:
    """What is missing, in words that say what to do; empty: nothing. Reads no archive and asks no web site.

    base: the folder that relative sources start at. training: also what a training needs. trained_counts: which is
    nothing where `results` say that all seeds are trained; their runs may be in another storage root all the same.
    by_name: the row was asked for by name; otherwise M2F_WORKERS, with which a CPU will do, says nothing of it.
    """
    found = []
    if sound_result(Manifest, row.dataset, results=results) is None:
        found = lacking(row.dataset, params.dataset(row.dataset), base=base, results=results)
    if training and not (trained_counts and _is_trained(row, results)):
        found += training_needs(row, results, by_name=by_name)
    return found


def untrained_weights(row: Row, params: Params, *, results: Path = RESULTS) -> list[str]:
    """The seed of another row whose network the row starts from, where `results` do not say that it is finished."""
    source = params.weights.get(row.weights)
    if source is None or not source.row:
        return []
    trained = sound_result(TrainingResult, source.row, results=results)
    if trained is not None and any(seed.seed == source.seed and seed.status == "finished" for seed in trained.seeds):
        return []
    return [f"a finished seed {source.seed} of row {source.row}, from which it starts (dvc repro train@{source.row})"]


def refuse(row: Row, params: Params, stages: Collection[str], *, base: Path) -> None:
    """ValueError where stages of a row, asked for by name, cannot work here. No stages: all of them."""
    if (asked := set(stages) - {"ready"}) and asked <= WITHOUT_TRAINING:
        missing = needs(row, params, base=base, training=False)
    else:
        missing = needs(row, params, base=base, trained_counts=True)
    if missing:
        raise ValueError(f"row {row.name} cannot be made here: it needs {'; '.join(missing)}")


def refuse_asked(
    asked: Mapping[str, Collection[str]], params: Params, concerned: Callable[[Row], bool], *, base: Path
) -> None:
    """`refuse` for those of the rows asked for, with their stages, that are concerned."""
    for name, stages in asked.items():
        if concerned(row := params.rows[name]):
            refuse(row, params, stages, base=base)


def any_ready(rows: Iterable[Row], params: Params, *, base: Path) -> bool:
    """Whether one of these rows needs nothing more, and so is made by a `dvc repro` of everything."""
    return not all(needs(row, params, base=base, by_name=False) for row in rows)


def _is_trained(row: Row, results: Path) -> bool:
    trained = sound_result(TrainingResult, row.name, results=results)
    finished = {seed.seed for seed in trained.seeds if seed.status == "finished"} if trained else set()
    return finished >= {*row.seeds}


def training_needs(row: Row, results: Path, *, by_name: bool = True) -> list[str]:
    """A GPU that is not here, or more GPU-hours than the row allows."""
    over = _over_budget(row, results)
    meant_to_be = by_name and environment_int("M2F_WORKERS") is not None
    on_cpu = row.model.backbone.name == "tiny" or meant_to_be
    if on_cpu and not over:
        return []
    if gpus_here(row):
        return over
    if on_cpu:
        return []
    return ["a GPU (or M2F_WORKERS=1, which trains on the CPU all the same)" if by_name else "a GPU"]


def _over_budget(row: Row, results: Path) -> list[str]:
    """More GPU-hours than the row allows, by an estimate; without any the training judges, by its first steps."""
    estimate = None
    with suppress(ValueError):  # a torn result, which this training may make again
        estimate = estimated_gpu_hours(row, results)
    if estimate is None or estimate.hours <= row.max_gpu_hours:
        return []
    return [
        f"rows.{row.name}.max_gpu_hours above {estimate.hours:.0f} in params.yaml (now {row.max_gpu_hours:g}; a seed "
        f"takes about that by {estimate.source}; see python -m stages.plan {row.name})"
    ]
