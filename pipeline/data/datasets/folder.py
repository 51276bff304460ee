"""A user's own pictures in ADE20K's layout: images/<split>/<name>.jpg with annotations/<split>/<name>.png."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.data.archives import below, file_names
from pipeline.data.datasets import label_maps
from pipeline.data.records import IMAGE_SUFFIXES, Record

if TYPE_CHECKING:
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
    images = label_maps.by_stem(names, f"{top}images/{folder}/", IMAGE_SUFFIXES, source)
    if not images:
        raise ValueError(
            f"{source} has no images in {top}images/{folder}/ for split {split}; known suffixes: "
            f"{' '.join(IMAGE_SUFFIXES)} (`splits` in params.yaml names the folders)"
        )
    labels = label_maps.paired(config, source, images, names, f"{top}annotations/{folder}/")
    for stem in sorted(labels.keys() - images.keys()):
        raise ValueError(f"{source.name}: {labels[stem]} has no image in {top}images/{folder}/")
    return label_maps.records(config, source, images, labels)
