"""The key that names a training: equal keys, equal experiment."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from m2f.config import OFF
from pipeline.provenance.code import Code, code_digest

if TYPE_CHECKING:
    from pipeline.params.schema import Row

SETTINGS = "pipeline.params.schema.Row"
"""The dataclass whose values, and whose parts' values, are in keys by themselves."""

KEEPS_BYTES: Mapping[str, str] = {
    "pipeline.storage.files": "keeps bytes as they are",
    "pipeline.storage.root": "says where bytes lie",
    "pipeline.storage.stores": "keeps bytes as they are",
}
"""What every kind of work leaves out."""

COMPILES: Mapping[str, str] = {"m2f.kernels.build": "compiles loops whose digests count (LOOPS where they are called)"}
"""What all that runs the network leaves out."""

READS_SHARDS: Mapping[str, str] = {
    "pipeline.data.shards.reader.verify_shards": (
        "refuses bytes that are not those of the manifest, whose digest is in the key"
    ),
    "pipeline.data.shards.reader._made_by": "says what to do",
}
"""What work on a dataset's shards leaves out besides."""

FREEZE = "m2f.weights.start.freeze"
"""Does nothing in a row that freezes nothing."""

PROGRESS = ("pipeline.storage.progress.Progress", FREEZE)
"""Calls of these may be added anywhere: they print, or do nothing unless the row has a setting that is in its key."""

TRAINING = Code(
    roots=("pipeline.training.loop.train",),
    left_out={
        **KEEPS_BYTES,
        **READS_SHARDS,
        **COMPILES,
        "m2f.weights.read_checkpoint": "reads tensors as they are; the digest of the initial weights is in the key",
        "pipeline.evaluation.task_metrics": "validation watches a training",
        "pipeline.provenance": "says where a number came from",
        "pipeline.runs.outcome": "says how a training ended",
        "pipeline.params.tasks": "names figures",
        "pipeline.training.loop.agreed_kernels": "chooses between forms that differ in rounding; a run keeps its own",
        "pipeline.training.loop.divergence_noted": "says where a training diverged",
        "pipeline.training.loop.fell_below_reference": "watches; a training that it stops has no result",
        "pipeline.training.loop.peak_memory_mib": "watches",
        "pipeline.training.loop.why_stopped": "says why a training was stopped",
        "pipeline.training.loop.refuse_if_too_long": "a training that it stops has no result",
        "pipeline.training.loop.StepTime": "tells refuse_if_too_long the time",
        "pipeline.training.loop.summary": "says what a training left",
    },
    sinks=(
        *PROGRESS,
        "pipeline.tracking.curve.Curve",
        "pipeline.training.loop_progress",
        # puts a file's tensors where their names say; the digest of the initial weights is in the key
        "pipeline.training.loop.start_from_network",
    ),
    settings=SETTINGS,
)
"""The definitions that decide the weights a training ends with, and which of them are kept."""

TRAINING_WITH_FROZEN_PARTS = dataclasses.replace(
    TRAINING, sinks=tuple(sink for sink in TRAINING.sinks if sink != FREEZE)
)
"""Those of a row with `train.freeze`."""

_SHAPES_NOTHING = ("log_every", "checkpoint_interval")
"""Fields of TrainConfig that say only how often a run logs and saves."""


def run_key(row: Row, *, seed: int, data_digest: str, weights_sha256: str | None) -> str:
    """The name of one training, 16 hexadecimal digits.

    A digest of the resolved model and train settings (defaults included, so that YAML's spelling does not matter), the
    seed, the dataset's manifest, the initial weights and the definitions that shape a training. Left out: how often a
    run logs and saves, the row's name, its other seeds, its test sizes (evaluation is made again when they change), its
    published figures, and settings at the value at which they do nothing (m2f.config.OFF).
    """
    return key_of(
        **_settings(row),
        seed=seed,
        data=data_digest,
        weights=weights_sha256,
        code=code_digest(TRAINING_WITH_FROZEN_PARTS if row.train.freeze else TRAINING),
    )


def settings_key(row: Row) -> str:
    """What `run_key` holds of a row's settings, and its dataset's name: another one is another training."""
    return key_of(**_settings(row), dataset=row.dataset)


def _settings(row: Row) -> dict[str, Any]:
    train = settings_facts(row.train)
    for name in _SHAPES_NOTHING:
        del train[name]
    return {"task": row.task, "model": settings_facts(row.model), "train": train}


def key_of(**facts: Any) -> str:
    """A key, 16 hexadecimal digits, of all that decides a piece of work: JSON values by name."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def settings_facts(settings: Any) -> Any:
    """Settings as JSON values. A field at its off value is left out: the program is as before the field was there."""
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        values = {entry: getattr(settings, entry.name) for entry in dataclasses.fields(settings)}
        return {
            entry.name: settings_facts(value)
            for entry, value in values.items()
            if not (OFF in entry.metadata and value == entry.metadata[OFF])
        }
    if isinstance(settings, Mapping):
        return {str(name): settings_facts(value) for name, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [settings_facts(value) for value in settings]
    if settings is None or isinstance(settings, bool | int | float | str):
        return settings
    raise TypeError(f"{type(settings).__name__} in a row's settings cannot be part of a key")
