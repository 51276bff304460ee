"""A dataset as Arrow files of verified records, made by Ray tasks, and the manifest that says what is in them.

Which records form a shard follows from the records alone, so that the bytes do not depend on how many processes or
hosts make them. Shards are written under shards/.building-<key>/ in the storage root, <key> being a digest of all that
decides their bytes; when the last one is there, the folder becomes shards/<digest of the contents>/. A build that was
interrupted, or one that is repeated, takes up the shards that are there and whole.

On a cluster the sources and the storage root must be visible to all hosts under the same paths. Where the storage root
is a URL, every host has its own copies of the archives, shards are uploaded one by one, and the last step is a copy
within the store, at the end of which build.json says that the folder is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.compute.resources import share
from pipeline.data.datasets import ade20k, cityscapes, coco, folder, shapes, vistas, voc
from pipeline.data.images.codecs import IGNORE_WIDE
from pipeline.data.images.image_files import ImageReading, memory_said
from pipeline.data.records import Record
from pipeline.data.shards.build_folder import bring_together, finished_builds, take_up
from pipeline.data.shards.look import record_settings
from pipeline.data.shards.manifest import MadeShards, check_things, content_digest, make_manifest, splits_of
from pipeline.data.shards.sample_sheet import sample_places, sample_sheet
from pipeline.data.shards.writer import (
    ShardJob,
    expected_bytes,
    make_shard,
    read_rows,
)
from pipeline.provenance.code import Code, code_digest
from pipeline.provenance.run_key import KEEPS_BYTES, PROGRESS, key_of
from pipeline.storage.files import whole_file, write_json
from pipeline.storage.progress import Progress
from pipeline.storage.results.data import FetchedSource, Manifest, Samples, Split
from pipeline.storage.root import storage_root
from pipeline.storage.stores import StoredPath, store_of

if TYPE_CHECKING:
    from pipeline.params.schema import DatasetConfig


LAYOUTS: Mapping[str, ModuleType] = {
    "folder": folder,
    "voc": voc,
    "cityscapes": cityscapes,
    "ade20k": ade20k,
    "coco": coco,
    "vistas": vistas,
    "shapes": shapes,
}
"""Modules whose `records(config, sources, split)` lists the records of a split."""

FEW_RECORDS = 1500
"""Below this many records, starting Ray takes longer than it saves."""

RETRIES = 3
"""How often a shard is begun again whose process was lost."""

_MIB = 1 << 20

_SAMPLED = 8
"""Records of a split that are read to tell how many make a shard."""

_LIBRARIES = ("numpy", "pillow", "pyarrow", "pycocotools", "scipy")
"""Libraries, beside OpenCV, whose code decides the bytes of a shard."""


def build(
    dataset: str,
    config: DatasetConfig,
    sources: Sequence[Path],
    *,
    facts: Sequence[FetchedSource],
    processes: int | None = None,
) -> Manifest:
    """Verify every record of every split and write the shards; returns the manifest.

    facts: of each source; what an earlier build left is taken up only where their contents are the same.
    processes: shards made at once by Ray tasks; None: as many as the cluster has cores; 0: all in this process, as with
    few records. The same input gives the same bytes.

    ValueError names the first file that is wrong, or the first record that is not labelled as the others are; with
    `on_error: skip`, wrong records are listed in the manifest instead, up to MAX_SKIPPED of a split. Shards that were
    finished by then stay for the next build; nothing half-written does. Another process that makes the same shards is
    waited for.
    """
    _check_classes(dataset, config)
    listed = _listed(dataset, config, sources)
    jobs, record_bytes = _plan(listed, config, tuple(sources), _archives(facts))
    key = _build_key(jobs, config, facts)
    shards_root = storage_root() / "shards"
    building = shards_root / f".building-{key}"
    if store_of(building).is_held():
        print(f"{dataset}: another process is sharding it; this one waits for the shards", file=sys.stderr, flush=True)
    with store_of(building).held_alone(f"another process is sharding {dataset}", wait_s=math.inf):
        found = take_up(dataset, jobs, config.on_error, [building, *finished_builds(shards_root, key)])
        shards = MadeShards(dataset, {split: len(records) for split, records in listed.items()})
        work = _Work([job for job in jobs if job.name not in found], record_bytes, building, shards)
        store_of(storage_root()).check_space(f"sharding {dataset}", work.bytes)
        for job in jobs:
            if job.name in found:
                shards.add(job, found[job.name].facts)
        _make(work, processes)
        for split in listed:
            facts_of = [shards.facts[job.name] for job in jobs if job.split == split]
            check_things(dataset, split, facts_of, config.on_empty)
        splits = splits_of(config, jobs, shards)
        target = shards_root / content_digest(splits)[:16]
        write_json(building / "build.json", {"dataset": dataset, "key": key})
        places = {job.name: found[job.name].folder if job.name in found else building for job in jobs}
        files = {name: place / f"{name}.arrow" for name, place in places.items()}
        samples = _paint_samples(building, config, splits, files)
        bring_together(places, building, target)
        store_of(building).move_folder_to(target, last="build.json")
    return make_manifest(dataset, config, jobs, shards, facts, splits, samples, folder=f"shards/{target.name}")


def _check_classes(dataset: str, config: DatasetConfig) -> None:
    """ValueError unless the dataset has some classes, and not too many."""
    if not config.class_names or len(config.class_names) > IGNORE_WIDE:
        raise ValueError(
            f"datasets.{dataset}.class_names lists {len(config.class_names)} classes; 1 to 65,535 are possible"
        )


def _listed(dataset: str, config: DatasetConfig, sources: Sequence[Path]) -> dict[str, Sequence[Record]]:
    """The records of every split. ValueError for a split without any."""
    listed = {split: LAYOUTS[config.layout].records(config, sources, split) for split in config.splits}
    for split, records in listed.items():
        if not records:
            raise ValueError(f"split {split} of {dataset} has no images; leave it out of `splits` in params.yaml")
    return listed


def _archives(facts: Sequence[FetchedSource]) -> tuple[tuple[str, str], ...]:
    """Path under the storage root and SHA-256 of the sources that lie there; folders are read in place."""
    return tuple((fact.path, fact.sha256) for fact in facts if not fact.path.endswith("/folder.json"))


# What is made


def _plan(
    listed: Mapping[str, Sequence[Record]],
    config: DatasetConfig,
    sources: tuple[Path, ...],
    archives: tuple[tuple[str, str], ...],
) -> tuple[list[ShardJob], dict[str, float]]:
    """The shards: every split's records in order, in runs of equal length that should take about `shard_mib`; and the
    bytes expected of a record, by split, from some that are spread over it."""
    things = frozenset(config.class_names.index(name) for name in config.thing_classes)
    reading = ImageReading.of(config)
    jobs, record_bytes = [], {}
    for split, records in listed.items():
        sizes = []
        for place in np.linspace(0, len(records) - 1, min(_SAMPLED, len(records))).round().astype(int).tolist():
            # the shard that holds a wrong one will say so
            with contextlib.suppress(ValueError), memory_said(records[place].image_file):
                sizes.append(expected_bytes(records[place], config.pixels, reading))
        record_bytes[split] = float(np.mean(sizes)) if sizes else float(_MIB)
        per_shard = max(1, round(config.shard_mib * _MIB / record_bytes[split]))
        count = math.ceil(len(records) / per_shard)
        for number in range(count):
            part = share(len(records), worker=number, workers=count)
            jobs.append(
                ShardJob(
                    name=f"{split}-{number:05d}",
                    split=split,
                    records=records[part.start : part.stop],
                    num_classes=len(config.class_names),
                    things=things,
                    pixels=config.pixels,
                    on_error=config.on_error,
                    sources=sources,
                    archives=archives,
                    reading=reading,
                    label_maps=own_label_maps(config),
                )
            )
    return jobs, record_bytes


def own_label_maps(config: DatasetConfig) -> bool:
    """Whether a dataset's pictures may have label maps that their segments do not say."""
    return bool(config.thing_classes) and config.layout in ("ade20k", "cityscapes")


def shaping(config: DatasetConfig) -> Code:
    """The definitions that decide the bytes of a dataset's shards."""
    return Code(
        roots=("pipeline.data.shards.writer.make_shard", f"{LAYOUTS[config.layout].__name__}.records"),
        left_out={**KEEPS_BYTES, "pipeline.storage.results": "says what was made"},
        sinks=PROGRESS,
        settings="pipeline.params.schema.DatasetConfig",
    )


def _build_key(jobs: Sequence[ShardJob], config: DatasetConfig, facts: Sequence[FetchedSource]) -> str:
    """A digest, 16 hexadecimal digits, of all that decides the shards' bytes; leaves out `on_error` (a shard without
    skipped records is the same either way) and what does not concern the records."""
    import cv2

    records = hashlib.sha256()
    for job in jobs:
        for record in job.records:
            records.update(f"{job.name}\0{record.name}\0{record.image_file}\0{record.label_file}\n".encode())
    return key_of(
        settings=record_settings(config),
        sources=[source.sha256 for source in facts],
        records=records.hexdigest(),
        code=code_digest(shaping(config)),
        libraries=[cv2.__version__, *(importlib.metadata.version(name) for name in _LIBRARIES)],
    )


# Making


@dataclass(frozen=True)
class _Work:
    """The shards that are still to be made."""

    jobs: Sequence[ShardJob]
    record_bytes: Mapping[str, float]
    """Expected of a record, by split."""
    folder: StoredPath
    """Where they are written."""
    shards: MadeShards
    """Gets the facts of every shard that is finished."""

    @property
    def records(self) -> int:
        """How many there are in all shards."""
        return sum(len(job.records) for job in self.jobs)

    @property
    def bytes(self) -> int:
        """About what all shards will take."""
        return round(sum(self.record_bytes[job.split] * len(job.records) for job in self.jobs))

    def progress(self) -> Progress:
        """A line that counts the records."""
        return Progress(f"{self.shards.dataset}: sharding", self.records, unit="images")

    def begun(self, job: ShardJob) -> int:
        """About the records that a running task has written, as far as its store shows them before the end."""
        written = store_of(self.folder / f"{job.name}.arrow").bytes_so_far()
        return min(len(job.records), int(written / self.record_bytes[job.split]))


def _make(work: _Work, processes: int | None) -> None:
    """Make the shards in this process, or in `processes` Ray tasks at once (None: one for every core there is)."""
    if processes == 0 or work.records < FEW_RECORDS:
        _make_here(work)
    else:
        _make_with_ray(work, processes)


def _make_here(work: _Work) -> None:
    """Make the shards one after the other in this process."""
    if not work.jobs:
        return
    progress = work.progress()
    for job in work.jobs:
        work.shards.add(job, make_shard(job, work.folder, progress.add))
    progress.done()


def _make_with_ray(work: _Work, processes: int | None) -> None:
    """Make the shards in Ray tasks, `processes` at once; the first error by the order of the records is raised when the
    tasks that were running then have ended."""
    import ray

    from pipeline.compute.ray_session import connect

    connect()
    at_once = processes or int(ray.cluster_resources().get("CPU", 1))
    task = ray.remote(make_shard).options(num_cpus=1, max_retries=RETRIES, scheduling_strategy="SPREAD")
    progress, done = work.progress(), 0
    waiting, running, errors = iter(enumerate(work.jobs)), dict[Any, tuple[int, ShardJob]](), dict[int, Exception]()
    try:
        while True:
            while len(running) < at_once and not errors and (entry := next(waiting, None)) is not None:
                running[task.remote(entry[1], work.folder)] = entry  # a task gets its own records only
            if not running:
                break
            for reference in ray.wait(list(running), timeout=1.0)[0]:
                place, job = running.pop(reference)
                done += len(job.records)
                try:
                    work.shards.add(job, ray.get(reference))
                except (ValueError, OSError, ray.exceptions.RayError) as error:
                    errors[place] = _said(error)
            begun = sum(work.begun(job) for _, job in running.values())
            progress.add(max(0, done + begun - progress.count))
    finally:
        for reference in running:  # only after an interruption
            ray.cancel(reference, force=True)
    if errors:
        raise errors[min(errors)]
    progress.done()


def _said(error: Exception) -> Exception:
    """What a task's error says to the user."""
    import ray

    if isinstance(error, ray.exceptions.RayTaskError):  # its text is a traceback; the sentence is in its cause
        return error.cause if isinstance(error.cause, (ValueError, OSError)) else error
    if isinstance(error, ray.exceptions.RayError):
        return ValueError(
            f"a sharding process was lost {RETRIES + 1} times, perhaps for memory ({type(error).__name__}); run the "
            "command again, with fewer --processes: it goes on where it stopped"
        )
    return error


# Files


def _paint_samples(
    folder: StoredPath, config: DatasetConfig, splits: Mapping[str, Split], files: Mapping[str, StoredPath]
) -> Samples:
    """Write samples.png, of the training pictures or those of the first split."""
    name = "train" if "train" in splits else next(iter(splits))
    split = splits[name]
    rows = [
        row
        for shard, place in sample_places([shard.records for shard in split.shards])
        for row in read_rows(files[split.shards[shard].path.removesuffix(".arrow")], [place])
    ]
    title = f"{len(rows)} of {split.records:,} images of the split {name}, with their labels"
    data = sample_sheet(rows, config.class_names, config.pixels, title)
    with whole_file(folder / "samples.png") as partial:
        partial.write_bytes(data)
    return Samples(path="samples.png", bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
