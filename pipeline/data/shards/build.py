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
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.compute.resources import share
from pipeline.data.datasets import cityscapes, coco, folder, shapes
from pipeline.data.images.codecs import IGNORE
from pipeline.data.records import Record
from pipeline.data.shards.sample_sheet import counted, sample_places, sample_sheet
from pipeline.data.shards.writer import (
    PictureLabels,
    ShardFacts,
    ShardJob,
    expected_bytes,
    finished_shard,
    make_shard,
    read_rows,
    same_labels,
)
from pipeline.provenance.code import Code, code_digest
from pipeline.provenance.run_key import KEEPS_BYTES, PROGRESS, key_of, settings_facts
from pipeline.storage.files import files_below, link_or_copy, matching, read_json, whole_file, write_json
from pipeline.storage.progress import Progress
from pipeline.storage.results import FetchedSource, Manifest, Samples, Shard, Source, Split
from pipeline.storage.root import storage_root
from pipeline.storage.stores import StoredPath, store_of

if TYPE_CHECKING:
    from pipeline.params.schema import DatasetConfig

LAYOUTS: Mapping[str, ModuleType] = {"folder": folder, "cityscapes": cityscapes, "coco": coco, "shapes": shapes}
"""Modules whose `records(config, sources, split)` lists the records of a split."""

FEW_RECORDS = 1500
"""Below this many records, starting Ray takes longer than it saves."""

MAX_SKIPPED = 0.05
"""Share of a split's records that `on_error: skip` leaves out at most; more are no slips but a wrong setting."""

RETRIES = 3
"""How often a shard is begun again whose process was lost."""

_MIB = 1 << 20

_SAMPLED = 8
"""Records of a split that are read to tell how many make a shard."""

_LIBRARIES = ("numpy", "pillow", "pyarrow", "pycocotools", "scipy")
"""Libraries, beside OpenCV, whose code decides the bytes of a shard."""

_SHAPES_NO_RECORD = (
    "sources",
    "bytes",
    "sha256",
    "mirrors",
    "login",
    "terms",
    "accept_terms",
    "shard_mib",
    "on_error",
)
"""Fields of DatasetConfig that do not decide the bytes of a record."""


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
    finished by then stay for the next build; nothing half-written does.
    """
    _check_classes(dataset, config)
    listed = _listed(dataset, config, sources)
    jobs, record_bytes = _plan(listed, config, tuple(sources), _archives(facts))
    key = _build_key(jobs, config, facts)
    shards_root = storage_root() / "shards"
    building = shards_root / f".building-{key}"
    with store_of(building).held_alone(f"another process is sharding {dataset} in {building}; wait for it to end"):
        found = _take_up(dataset, jobs, config.on_error, [building, *_finished_builds(shards_root, key)])
        shards = _Shards(dataset, {split: len(records) for split, records in listed.items()})
        work = _Work([job for job in jobs if job.name not in found], record_bytes, building, shards)
        store_of(storage_root()).check_space(f"sharding {dataset}", work.bytes)
        for job in jobs:
            if job.name in found:
                shards.add(job, found[job.name].facts)
        _make(work, processes)
        splits = _splits(config, jobs, shards)
        target = shards_root / _content_digest(splits)[:16]
        write_json(building / "build.json", {"dataset": dataset, "key": key})
        places = {job.name: found[job.name].folder if job.name in found else building for job in jobs}
        files = {name: place / f"{name}.arrow" for name, place in places.items()}
        samples = _paint_samples(building, config, splits, files)
        _bring_together(places, building, target)
        store_of(building).move_folder_to(target, last="build.json")
    return _manifest(dataset, config, jobs, shards, facts, splits, samples, folder=f"shards/{target.name}")


def _check_classes(dataset: str, config: DatasetConfig) -> None:
    """ValueError unless the dataset has some classes, not too many, and its things are among them."""
    if not config.class_names or len(config.class_names) >= IGNORE:
        raise ValueError(
            f"datasets.{dataset}.class_names lists {len(config.class_names)} classes; 1 to 254 are possible"
        )
    unknown = set(config.thing_classes) - set(config.class_names)
    if unknown:
        raise ValueError(f"datasets.{dataset}.thing_classes: {', '.join(sorted(unknown))} is not among class_names")


def _listed(dataset: str, config: DatasetConfig, sources: Sequence[Path]) -> dict[str, Sequence[Record]]:
    """The records of every split. ValueError for a split without any."""
    listed = {split: LAYOUTS[config.layout].records(config, sources, split) for split in config.splits}
    for split, records in listed.items():
        if not records:
            raise ValueError(f"split {split} of {dataset} has no pictures; leave it out of `splits` in params.yaml")
    return listed


def _archives(facts: Sequence[FetchedSource]) -> tuple[tuple[str, str], ...]:
    """Path under the storage root and SHA-256 of the sources that lie there; folders are read in place."""
    return tuple((fact.path, fact.sha256) for fact in facts if not fact.path.endswith("/folder.json"))


def _content_digest(splits: Mapping[str, Split]) -> str:
    """SHA-256 of what the shards are: a digest of their names, lengths and digests."""
    return hashlib.sha256(json.dumps(_plain(splits), sort_keys=True).encode()).hexdigest()


def manifest_digest(manifest: Manifest) -> str:
    """SHA-256 of everything in a manifest but its digest, its sample pictures and the terms, which train nothing.

    A field that holds its default is left out: a new one changes no digest until it is used.
    """
    rest = {key: value for key, value in _plain(manifest).items() if key not in ("digest", "samples", "terms")}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Dataclasses and what is in them as JSON values, without the fields that hold their defaults."""
    if dataclasses.is_dataclass(value):
        held = ((entry, getattr(value, entry.name)) for entry in dataclasses.fields(value))
        return {entry.name: _plain(each) for entry, each in held if each != _default(entry)}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value


def _default(entry: dataclasses.Field[Any]) -> Any:
    """MISSING: it has none."""
    return entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()


def _splits(config: DatasetConfig, jobs: Sequence[ShardJob], shards: _Shards) -> dict[str, Split]:
    """The splits with their shards, which are called by their names alone."""
    listed: dict[str, list[Shard]] = {split: [] for split in config.splits}
    for job in jobs:
        facts = shards.facts[job.name]
        listed[job.split].append(
            Shard(path=f"{job.name}.arrow", records=facts.records, bytes=facts.bytes, sha256=facts.sha256)
        )
    return {
        split: Split(records=sum(shard.records for shard in entries), shards=tuple(entries))
        for split, entries in listed.items()
    }


def _manifest(
    dataset: str,
    config: DatasetConfig,
    jobs: Sequence[ShardJob],
    shards: _Shards,
    facts: Sequence[FetchedSource],
    splits: Mapping[str, Split],
    samples: Samples,
    *,
    folder: str,
) -> Manifest:
    """The manifest of shards and samples that lie in `folder`, under the storage root."""

    def placed(split: Split) -> Split:
        shards = (dataclasses.replace(shard, path=f"{folder}/{shard.path}") for shard in split.shards)
        return dataclasses.replace(split, shards=tuple(shards))

    counts = {split: counted([shards.facts[job.name] for job in jobs if job.split == split]) for split in splits}
    manifest = Manifest(
        dataset=dataset,
        digest="",
        class_names=config.class_names,
        thing_classes=config.thing_classes,
        ignore_label=IGNORE,
        labels=shards.labels.kinds if shards.labels else (),
        pixel_layout=config.pixels,
        splits={name: placed(split) for name, split in splits.items()},
        pixels={split: count.pixels for split, count in counts.items()},
        ignored_pixels={split: count.ignored_pixels for split, count in counts.items()},
        pictures={split: count.pictures for split, count in counts.items()},
        instances={split: count.instances for split, count in counts.items()},
        things_per_picture={split: count.things_per_picture for split, count in counts.items()},
        picture_sizes={split: count.picture_sizes for split, count in counts.items()},
        bytes={split: count.bytes for split, count in counts.items()},
        skipped={split: count.skipped for split, count in counts.items()},
        sources=tuple(Source(name=source.name, bytes=source.bytes, sha256=source.sha256) for source in facts),
        samples=dataclasses.replace(samples, path=f"{folder}/{samples.path}"),
        terms=config.terms,
    )
    return dataclasses.replace(manifest, digest=manifest_digest(manifest))


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
    jobs, record_bytes = [], {}
    for split, records in listed.items():
        sizes = []
        for place in np.linspace(0, len(records) - 1, min(_SAMPLED, len(records))).round().astype(int).tolist():
            with contextlib.suppress(ValueError):  # the shard that holds it will say so
                sizes.append(expected_bytes(records[place], config.pixels))
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
                )
            )
    return jobs, record_bytes


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
    settings = settings_facts(config)
    return key_of(
        settings={name: value for name, value in settings.items() if name not in _SHAPES_NO_RECORD},
        sources=[source.sha256 for source in facts],
        records=records.hexdigest(),
        code=code_digest(shaping(config)),
        libraries=[cv2.__version__, *(importlib.metadata.version(name) for name in _LIBRARIES)],
    )


# What is there already


def _finished_builds(shards_root: StoredPath, key: str) -> list[StoredPath]:
    """Folders of finished builds with this key."""
    found = []
    for note in matching(shards_root, "*/build.json"):
        with contextlib.suppress(ValueError):
            if read_json(note, made_by="python -m stages.shard")["key"] == key:
                found.append(note.parent)
    return found


class _Found(NamedTuple):
    """A shard that is there and whole."""

    facts: ShardFacts
    folder: StoredPath


def _take_up(dataset: str, jobs: Sequence[ShardJob], on_error: str, folders: Sequence[StoredPath]) -> dict[str, _Found]:
    """Every shard that one of the folders holds as it was written, by name."""
    listed = [files_below(folder) for folder in folders]
    there = [job for job in jobs if any(f"{job.name}.json" in files for files in listed)]
    progress = Progress(f"{dataset}: checking shards that are here already", len(there), unit="shards")
    found = {}
    for job in there:
        for place in folders:
            facts = finished_shard(place, job.name)
            if facts is not None and (on_error == "skip" or not facts.skipped):
                found[job.name] = _Found(facts, place)
                break
        progress.add()
    if there:
        progress.done()
    return found


class _Shards:
    """The facts of finished shards. What only several shards together can get wrong is found when one is added."""

    def __init__(self, dataset: str, records: Mapping[str, int]) -> None:
        self.dataset, self.records = dataset, records
        self.facts: dict[str, ShardFacts] = {}
        self.skipped = dict.fromkeys(records, 0)
        self.labels: PictureLabels | None = None

    def add(self, job: ShardJob, facts: ShardFacts) -> None:
        """ValueError when its pictures have other kinds of labels than the rest, or too many records are skipped."""
        self.facts[job.name] = facts
        if facts.labels is not None:
            self.labels = same_labels(self.labels, facts.labels)
        for record in facts.skipped:
            print(f"{self.dataset}: skipped {record.file}: {record.reason}", file=sys.stderr)
        self.skipped[job.split] += len(facts.skipped)
        if self.skipped[job.split] > MAX_SKIPPED * self.records[job.split]:
            raise ValueError(
                f"{self.skipped[job.split]} of the {self.records[job.split]:,} records of split {job.split} are wrong, "
                f"of which `on_error: skip` leaves out at most {MAX_SKIPPED:.0%}: {facts.skipped[0].reason}"
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
    shards: _Shards
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
        return Progress(f"{self.shards.dataset}: sharding", self.records, unit="pictures")

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

    from pipeline.compute.resources import connect

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
    title = f"{len(rows)} of {split.records:,} pictures of the split {name}, with their labels"
    data = sample_sheet(rows, config.class_names, config.pixels, title)
    with whole_file(folder / "samples.png") as partial:
        partial.write_bytes(data)
    return Samples(path="samples.png", bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _bring_together(places: Mapping[str, StoredPath], building: StoredPath, target: StoredPath) -> None:
    """Put what other builds have left into this one's folder too, unless it is in `target`, where all will be.

    places: the folder of every shard, by name.
    """
    for name, place in places.items():
        if place not in (building, target):
            for suffix in (".arrow", ".json"):
                link_or_copy(place / f"{name}{suffix}", building / f"{name}{suffix}")
