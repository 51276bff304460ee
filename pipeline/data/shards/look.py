"""One look at a manifest, before anything is trained on it: what is wrong with a dataset, and what may be.

It reads no shard and imports nothing heavy: whoever only asks is answered at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.provenance.run_key import settings_facts
from pipeline.storage.results.data import FetchedDataset, Label, Manifest
from pipeline.storage.results.folder import RESULTS, made_by, read_result, sound_result

if TYPE_CHECKING:
    from pipeline.params.schema import DatasetConfig, Params, Task

LABELS_OF: Mapping[Task, Label] = {"semantic": "semantic", "panoptic": "panoptic", "instance": "instances"}
"""What a manifest's `labels` must list for a task."""

SHAPES_NO_RECORD = (
    "sources",
    "bytes",
    "sha256",
    "mirrors",
    "login",
    "terms",
    "accept_terms",
    "shard_mib",
    "on_error",
    "on_empty",
    "max_pixels",
)
"""Fields of DatasetConfig that do not decide the bytes of a record."""

MIN_SIDE = 32
"""Pixels of the shortest side of training images `with_things` (mmdetection's min_size)."""

NAMED = 10
"""Classes that a warning names at most; the manifest and the table beside it have all."""

MOSTLY = 0.5
"""Share of ignored pixels from which on they are warned of."""


class Findings(NamedTuple):
    """What was found, one sentence each."""

    errors: list[str]
    warnings: list[str]


def record_settings(config: DatasetConfig) -> dict[str, Any]:
    """The settings of a dataset that decide the bytes of its records, as JSON values."""
    return {name: value for name, value in settings_facts(config).items() if name not in SHAPES_NO_RECORD}


def other_settings(manifest: Manifest, config: DatasetConfig) -> list[str]:
    """In which settings a manifest's shards are not those of params.yaml, in words."""
    now = record_settings(config)
    made: dict[str, Any] = dict(manifest.settings) or {  # an older manifest knows these
        "class_names": list(manifest.class_names),
        "thing_classes": list(manifest.thing_classes),
        "pixels": manifest.pixel_layout,
    }
    names = [name for name in (*now, *made) if manifest.settings or name in made]
    return [
        f"{name} (now {_shown(now.get(name))}, then {_shown(made.get(name))})"
        for name in dict.fromkeys(names)
        if now.get(name) != made.get(name)
    ]


def _shown(value: Any) -> str:
    """A setting for a message, cut where it is long."""
    text = "its default" if value is None else str(value).replace("'", "")
    return text if len(text) <= 60 else f"{text[:57]}..."


def current_manifest(params: Params, dataset: str, *, results: Path = RESULTS) -> Manifest:
    """The manifest of a dataset. ValueError where its shards were made with other settings than params.yaml has, or of
    other sources than were fetched last."""
    manifest = read_result(Manifest, dataset, results=results)
    if differences := other_settings(manifest, params.dataset(dataset)):
        raise ValueError(
            f"the shards of dataset {dataset} were made with other settings than params.yaml has: "
            f"{'; '.join(differences)}; make them again with: {made_by(Manifest, dataset)}"
        )
    fetched = sound_result(FetchedDataset, dataset, results=results)
    here = {source.name: source.sha256[:16] for source in fetched.sources} if fetched else {}
    there = {source.name: source.sha256[:16] for source in manifest.sources}
    if fetched and here != there:
        raise ValueError(
            f"the shards of dataset {dataset} were made of other sources than were fetched since (now {_shown(here)}, "
            f"then {_shown(there)}); make them again with: {made_by(Manifest, dataset)}"
        )
    return manifest


def lacks_labels(manifest: Manifest, task: Task) -> str:
    """Says that a dataset has not the labels that a task needs."""
    return (
        f"dataset {manifest.dataset} has no {LABELS_OF[task]} labels, which the task {task} needs, but "
        f"{' and '.join(manifest.labels)}; give the row another `task` or another dataset"
    )


def look(manifest: Manifest, config: DatasetConfig) -> Findings:
    """What is wrong with a dataset, whatever rows train on it. A split in which there is nothing to learn or to measure
    is an error, without `on_empty: allow`."""
    task: Task = "instance"
    if "semantic" in manifest.labels:
        task = "panoptic" if "panoptic" in manifest.labels and manifest.thing_classes else "semantic"
    empty = [problem for split in ("train", "val") if (problem := nothing_in(manifest, split, task, config))]
    warnings = [*_without_pixels(manifest, config), *_shared(manifest)]
    if config.on_empty == "allow":
        return Findings([], [*warnings, *empty])
    meant = "or, if that is meant, set on_empty: allow in the dataset"
    return Findings([f"{problem}; {meant}" for problem in empty], warnings)


def nothing_in(manifest: Manifest, split: str, task: Task, config: DatasetConfig) -> str:
    """Why a split holds nothing that a task can learn from (train) or be measured on (val); empty: it does, or is not
    there."""
    if split not in manifest.splits:
        return ""
    images = f"the {'training' if split == 'train' else 'validation'} images of dataset {manifest.dataset}"
    objects = sum(manifest.instances[split])
    held = [name for name, pixels in zip(manifest.class_names, manifest.pixels[split], strict=True) if pixels]
    if task == "instance" or (task == "panoptic" and split == "train" and manifest.thing_classes):
        if objects:
            return ""
        return f"{images} have no object of a thing class (crowds do not count); look at {_look_at(config)}"
    if task == "panoptic" and split == "val":
        held = [name for name in held if objects or name not in manifest.thing_classes]  # crowds do not count
    if len(held) > (split == "train"):
        return ""
    there = f"pixels of one class alone, {held[0]}" if held else "no pixel of a class"
    share = f"; {_ignored(manifest, split):.1%} of their pixels are ignored" if manifest.ignored_pixels[split] else ""
    return f"{images} have {there}{share}; look at {_look_at(config)}"


def _without_pixels(manifest: Manifest, config: DatasetConfig) -> list[str]:
    """Classes that no training image holds, and a large share of ignored pixels."""
    if "train" not in manifest.splits:
        return []
    has_pixels = "semantic" in manifest.labels
    held = (manifest.pixels if has_pixels else manifest.instances)["train"]
    missing = [name for name, count in zip(manifest.class_names, held, strict=True) if not count]
    ignored = _ignored(manifest, "train")
    said = []
    if missing:
        of = f"{len(missing)} of {len(manifest.class_names)} classes"
        names = ", ".join(missing[:NAMED]) + (", ..." if len(missing) > NAMED else "")
        said.append(f"{of} have no training {'pixel' if has_pixels else 'object'}: {names}")
    if has_pixels and (missing or ignored >= MOSTLY):
        said.append(f"{ignored:.1%} of the training pixels are ignored")
    return [f"dataset {manifest.dataset}: {'; '.join(said)}; look at {_look_at(config)}"] if said else []


def _ignored(manifest: Manifest, split: str) -> float:
    """Share of a split's pixels that belong to no class."""
    ignored = manifest.ignored_pixels[split]
    return ignored / max(1, ignored + sum(manifest.pixels[split]))


def _look_at(config: DatasetConfig) -> str:
    """The settings that decide which pixels and objects belong to a class."""
    if config.layout not in ("folder", "voc"):
        return "the annotations, class_names and thing_classes"
    if config.palette:
        return "the labels, palette and class_names"
    ignored = ", ".join(map(str, config.ignore_labels)) or "none"
    return f"the labels, ignore_label ({ignored}), label_offset ({config.label_offset}) and class_names"


def _shared(manifest: Manifest) -> list[str]:
    shared = manifest.shared_images
    if not shared.count:
        return []
    more = ", ..." if shared.count > len(shared.first) else ""
    return [
        f"dataset {manifest.dataset}: {shared.count} of {manifest.splits['val'].records} validation images are "
        f"training images too, byte for byte ({', '.join(shared.first)}{more}); figures on them say little, so take "
        "them out of one of the splits"
    ]
