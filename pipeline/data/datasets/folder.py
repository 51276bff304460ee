"""A user's own pictures in ADE20K's layout: images/<split>/<name>.jpg with annotations/<split>/<name>.png."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from pipeline.data.archives import below, file_names, read_file
from pipeline.data.images.codecs import IGNORE
from pipeline.data.images.files import class_ids, read_labels
from pipeline.data.records import IMAGE_SUFFIXES, Labelled, Record

if TYPE_CHECKING:
    import numpy as np

    from pipeline.params.schema import DatasetConfig


def records(config: DatasetConfig, sources: Sequence[Path], split: str) -> list[Record]:
    """The split's records by name, from one folder or zip archive (a single top-level folder is looked into).

    ValueError names the first picture without label, label without picture, or name used twice.
    """
    if len(sources) != 1:
        raise ValueError(
            f"layout folder reads one source, found {len(sources)}; put all splits in one folder or archive"
        )
    source = sources[0]
    names = file_names(source)
    top = below(names, "images", source)
    folder = config.splits[split]
    images = _by_stem(names, f"{top}images/{folder}/", IMAGE_SUFFIXES, source)
    labels = _by_stem(names, f"{top}annotations/{folder}/", (".png",), source)
    if not images:
        raise ValueError(
            f"{source} has no pictures in {top}images/{folder}/ for split {split}; known suffixes: "
            f"{' '.join(IMAGE_SUFFIXES)} (`splits` in params.yaml names the folders)"
        )
    for stem in sorted(images.keys() - labels.keys()):
        raise ValueError(f"{source.name}: {images[stem]} has no label {top}annotations/{folder}/{stem}.png")
    for stem in sorted(labels.keys() - images.keys()):
        raise ValueError(f"{source.name}: {labels[stem]} has no picture in {top}images/{folder}/")
    return [
        Record(
            name=stem,
            image_file=f"{source.name}: {images[stem]}",
            label_file=f"{source.name}: {labels[stem]}",
            read=partial(_read, source, images[stem], labels[stem], config),
        )
        for stem in sorted(images)
    ]


def _by_stem(names: Sequence[str], prefix: str, suffixes: tuple[str, ...], source: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        path = PurePosixPath(name)
        if not name.startswith(prefix) or path.suffix.lower() not in suffixes:
            continue
        stem = name[len(prefix) : -len(path.suffix)]
        if stem in found:
            raise ValueError(f"{source.name}: {found[stem]} and {name} have the same name; keep one of them")
        found[stem] = name
    return found


def _read(source: Path, image: str, label: str, config: DatasetConfig) -> Labelled:
    file = f"{source.name}: {label}"
    labels = read_labels(read_file(source, label), file, config.max_pixels)
    known = f"0 to {len(config.class_names) - 1} with ignore_label {config.ignore_label}"
    if config.label_offset:
        known += f" after adding label_offset {config.label_offset}"
    return Labelled(read_file(source, image), class_ids(labels, _lookup(config), file, known=known), None)


def _lookup(config: DatasetConfig) -> np.ndarray:
    """Class id of every stored id: `label_offset` is added modulo 256, so that ADE20K's 0 becomes 255."""
    import numpy as np

    shifted = (np.arange(256) + config.label_offset) % 256
    lookup = np.where(shifted < len(config.class_names), shifted, -1)
    lookup[shifted == config.ignore_label] = IGNORE
    return lookup.astype(np.int16)
