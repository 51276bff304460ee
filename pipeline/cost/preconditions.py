"""What all later stages of a row need of its shards, its settings and this machine, checked before the first step.

No shard is read: the manifest knows what is in them. Whether there are GPUs is asked where a setting depends on it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from m2f.kernels.build import use
from pipeline.compute.resources import check_workers, gpus_here
from pipeline.compute.variables import CHECKPOINT_ACTIVATIONS, GROUPS_AT_ONCE, environment_int
from pipeline.cost.needs import training_needs
from pipeline.cost.plan import checkpoint_bytes, known_checkpoint_bytes
from pipeline.cost.speed import CHECKPOINTS, GIB
from pipeline.data.images.sizes import Size, area, shown_size
from pipeline.data.shards.look import LABELS_OF, MIN_SIDE, Findings, lacks_labels, nothing_in, other_settings
from pipeline.params.schema import DatasetConfig, Params, Row
from pipeline.provenance.run_key import run_key
from pipeline.runs.outcome import run_status
from pipeline.runs.reuse import reused_run
from pipeline.storage.disk import in_gib
from pipeline.storage.files import files_below
from pipeline.storage.results.data import ConvertedWeights, Manifest
from pipeline.storage.results.folder import RESULTS, sound_result
from pipeline.storage.root import storage_root
from pipeline.storage.stores import store_of

if TYPE_CHECKING:
    from pipeline.storage.stores import StoredPath

MIN_INPUT = 32
"""Pixels of the network's shortest input: its coarsest map has a stride of 32."""


def preconditions(
    row: Row, manifest: Manifest, config: DatasetConfig, *, results: Path = RESULTS, build: bool = True
) -> Findings:
    """All that would end a stage of the row later, and what makes its figures worse than they need to be.

    config: of the row's dataset. build: builds the network where only that tells how large its checkpoints are, which
    takes seconds; otherwise their room is not checked.
    """
    errors = [*_of_splits(row, manifest), *_of_contents(row, manifest, config), *_of_sizes(row, manifest)]
    errors += [*_of_workers(row), *_of_kernels(row), *_of_disk(row, manifest, results, build=build)]
    return Findings(errors, [*_too_many_things(row, manifest), *_too_little_memory(row, manifest), *_too_slow(row)])


def known_errors(row: Row, params: Params, *, results: Path = RESULTS) -> list[str]:
    """The errors of `preconditions` by the shards that are there; none where they are to be made anew. At once."""
    manifest, config = sound_result(Manifest, row.dataset, results=results), params.dataset(row.dataset)
    if manifest is None or other_settings(manifest, config):
        return []
    return preconditions(row, manifest, config, results=results, build=False).errors


def refuse_to_train(row: Row, manifest: Manifest, config: DatasetConfig, *, results: Path = RESULTS) -> None:
    """ValueError with all that keeps a row from being trained and evaluated here; says what is only a warning."""
    found = preconditions(row, manifest, config, results=results)
    for warning in found.warnings:
        print(f"warning: {row.name}: {warning}", file=sys.stderr, flush=True)
    problems = [f"it needs {need}" for need in training_needs(row, results)] + found.errors
    if len(problems) > 1:
        problems = [f"({number}) {problem}" for number, problem in enumerate(problems, start=1)]
    if problems:
        raise ValueError(f"row {row.name} is not trained here: {'; '.join(problems)}")


def _of_splits(row: Row, manifest: Manifest) -> list[str]:
    """Splits and labels that are not there."""
    errors = [
        f"dataset {manifest.dataset} has no split {split}, which the row {does}; name its folder in "
        f"datasets.{manifest.dataset}.splits in params.yaml"
        for split, does in (("train", "is trained on"), ("val", "is measured on"))
        if split not in manifest.splits
    ]
    if LABELS_OF[row.task] not in manifest.labels:
        errors.append(lacks_labels(manifest, row.task))
    return errors


def _of_contents(row: Row, manifest: Manifest, config: DatasetConfig) -> list[str]:
    """Splits in which there is nothing to learn or to measure."""
    if LABELS_OF[row.task] not in manifest.labels:
        return []
    learnt = nothing_in(manifest, "train", row.task, config) if config.on_empty == "stop" else ""
    measured = nothing_in(manifest, "val", row.task, config)
    errors = [f"{learnt}, or set on_empty: allow if that is meant"] if learnt else []
    errors += [f"{measured}: validation would measure nothing"] if measured else []
    if row.train.images == "with_things" and "train" in manifest.splits:
        sides = manifest.image_sizes["train"]
        if not sum(manifest.instances["train"]) or min(sides.height[-1], sides.width[-1]) < MIN_SIDE:
            errors.append(
                f"no training image of dataset {manifest.dataset} has things and sides of at least {MIN_SIDE} px; set "
                f"rows.{row.name}.train.images to all"
            )
    return errors


def _of_sizes(row: Row, manifest: Manifest) -> list[str]:
    """Validation images that the test settings make too small for the network."""
    extremes, test = manifest.extreme_sizes.get("val"), row.test
    if extremes is None:
        return []
    sizes = dict.fromkeys((extremes.narrowest, extremes.smallest, extremes.largest))
    scales: list[tuple[str, tuple[int, ...], int]] = [("test", (test.short_side,), test.long_side_max)]
    if test.ms_flip is not None:
        scales.append(("test.ms_flip", test.ms_flip.short_sides, test.ms_flip.long_side_max))
    errors = []
    for name, short_sides, long_side_max in scales:
        for size in sizes:
            shown = [
                shown_size(size, short_side=side, long_side_max=long_side_max, pad_multiple=test.pad_multiple)
                for side in short_sides
            ]
            smallest = min(shown, key=min)
            if min(smallest) < MIN_INPUT:
                errors.append(
                    f"a validation image of {_by(size)} (height x width) is tested at {_by(smallest)} by "
                    f"rows.{row.name}.{name}, but the network needs {MIN_INPUT} pixels on both sides; set "
                    f"rows.{row.name}.test.pad_multiple to 32 (now {test.pad_multiple}), or take such images out"
                )
                break
    return errors


def _by(size: Size) -> str:
    return f"{size[0]} x {size[1]}"


def _of_workers(row: Row) -> list[str]:
    """What variables of the environment say that the row cannot be trained with."""
    try:
        for name in (CHECKPOINT_ACTIVATIONS, GROUPS_AT_ONCE, "M2F_LOADER_PROCESSES"):
            environment_int(name)
        workers = environment_int("M2F_WORKERS")
        if workers is not None:
            check_workers(row, workers=workers, use_gpu=True)
    except ValueError as error:
        return [str(error)]
    return []


def _of_kernels(row: Row) -> list[str]:
    """Compiled kernels that this machine's CPU cannot have. Whether a GPU can, its own process finds out."""
    if row.train.kernels != "compiled" or gpus_here(row):
        return []
    try:
        use("compiled")
    except ValueError as error:
        return [f"rows.{row.name}.train.{error}"]
    return []


def _of_disk(row: Row, manifest: Manifest, results: Path, *, build: bool) -> list[str]:
    """Too little free space for the checkpoints of all seeds that are still to be trained."""
    try:
        size = checkpoint_bytes(row.model) if build else known_checkpoint_bytes(row.model)
    except ValueError as error:  # no such network can be built
        return [str(error)]
    if size is None or not _no_room(size, len(row.seeds)):
        return []
    runs = _unfinished_runs(row, manifest, results)  # asked only now: it takes longer
    kept = sum(min(CHECKPOINTS * size, sum(files_below(run / "checkpoints").values())) for run in runs if run)
    return _no_room(size, len(runs), kept) if runs else []


def _no_room(size: int, seeds: int, kept: int = 0) -> list[str]:
    """Says that checkpoints of `size` bytes do not fit on the disk; `kept`: bytes that lie there already."""
    needed = (CHECKPOINTS * seeds + 1) * size - kept  # one more is written before another is deleted
    training = f"training {seeds} seed{'s' * (seeds > 1)} (a checkpoint is {in_gib(size)})"
    try:
        store_of(storage_root()).check_space(training, needed)
    except ValueError as error:
        return [str(error)]
    return []


def _unfinished_runs(row: Row, manifest: Manifest, results: Path) -> list[StoredPath | None]:
    """The run folders of seeds that have not ended; None: there is none yet."""
    weights = sound_result(ConvertedWeights, row.weights, results=results)
    runs = storage_root() / "runs"
    if weights is None or not runs.is_dir():
        return [None] * len(row.seeds)
    keys = [run_key(row, seed=seed, data_digest=manifest.digest, weights_sha256=weights.sha256) for seed in row.seeds]
    folders = [runs / (note.run_key if (note := reused_run(runs / key)) else key) for key in keys]
    ended = [end is not None and end.status in ("finished", "diverged") for end in map(run_status, folders)]
    return [folder for folder, over in zip(folders, ended, strict=True) if not over]


def _too_many_things(row: Row, manifest: Manifest) -> list[str]:
    """Images with more things than the network can find, or than are kept of what it finds."""
    if row.task == "semantic":
        return []
    queries, kept = row.model.query_decoder.queries, row.test.max_instances
    limits = [
        (queries, f"the {queries} queries of rows.{row.name}.model.query_decoder.queries", ("train", "val")),
        (kept, f"rows.{row.name}.test.max_instances ({kept})", ("val",)),
    ]
    warnings = []
    for limit, what, splits in limits:
        more = {split: _more_than(limit, manifest.things_per_image.get(split, {})) for split in splits}
        images = [
            f"{(n := sum(counts.values()))} {'training' if split == 'train' else 'validation'} image{'s' * (n > 1)}"
            for split, counts in more.items()
            if counts
        ]
        if images:
            most = max(things for counts in more.values() for things in counts)
            warnings.append(
                f"more things than {what}: in {' and '.join(images)}, up to {most}; those beyond cannot be found"
            )
    return warnings


def _too_slow(row: Row) -> list[str]:
    """fp16 on a CPU. Of a test's network, only the forward pass, a CPU takes no more time."""
    if row.train.precision != "fp16" or gpus_here(row):
        return []
    return [
        f"rows.{row.name}.train.precision is fp16, in which a CPU takes many times as long for a step; there is no GPU "
        "here that torch can use: take bf16 or float32, or train on GPUs"
    ]


def _more_than(limit: int, things_per_image: Mapping[int, int]) -> dict[int, int]:
    return {things: images for things, images in things_per_image.items() if things > limit}


def _too_little_memory(row: Row, manifest: Manifest) -> list[str]:
    """A largest validation image whose masks or scores take more than this machine's memory."""
    import psutil

    extremes = manifest.extreme_sizes.get("val")
    if extremes is None:
        return []
    pixels, memory = area(extremes.largest), psutil.virtual_memory().total
    masks = row.test.max_instances if row.task != "semantic" else 0
    scores = 4 * row.model.num_classes if row.test.ms_flip is not None else 0
    needed = pixels * max(masks, scores)
    if needed <= memory:
        return []
    setting = "max_instances" if masks else "ms_flip"
    return [
        f"evaluating a validation image of {_by(extremes.largest)} takes about {needed / GIB:.0f} GiB, for "
        f"rows.{row.name}.test.{setting}; this machine has {memory / GIB:.0f} GiB"
    ]
