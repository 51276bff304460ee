"""Pascal VOC's layout: JPEGImages/<name>.jpg, SegmentationClass/<name>.png, ImageSets/Segmentation/<split>.txt."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.data.archives import file_names, read_file
from pipeline.data.datasets import label_maps
from pipeline.data.records import IMAGE_SUFFIXES, Record

if TYPE_CHECKING:
    from pipeline.params.schema import DatasetConfig

_LISTS = "ImageSets/Segmentation/"


def records(config: DatasetConfig, sources: Sequence[Path], split: str) -> list[Record]:
    """The split's records by name, from one folder or archive; the three folders may lie below others, such as
    VOCdevkit/VOC2012. Files that no list names are left alone.

    ValueError names the first picture of the list that is missing, or has no label.
    """
    if len(sources) != 1:
        raise ValueError(f"layout voc reads one source, found {len(sources)}; put all splits in one folder or archive")
    source = sources[0]
    names = file_names(source)
    top = _top(names, source)
    listed = _listed(names, f"{top}{_LISTS}", config.splits[split], source)
    files = label_maps.by_stem(names, f"{top}JPEGImages/", IMAGE_SUFFIXES, source)
    for stem in listed:
        if stem not in files:
            raise ValueError(
                f"{source.name}: {top}{_LISTS}{config.splits[split]}.txt lists {stem}, but there is no "
                f"{top}JPEGImages/{stem}.jpg; lines are names without folder and suffix"
            )
    images = {stem: files[stem] for stem in listed}
    labels = label_maps.paired(config, source, images, names, f"{top}SegmentationClass/")
    return label_maps.records(config, source, images, labels)


def _top(names: Sequence[str], source: Path) -> str:
    """The folder that holds ImageSets/, with its slash; "" if it is the source itself."""
    tops = sorted({match[1] for name in names if (match := re.fullmatch(rf"((?:.*/)?){_LISTS}[^/]+\.txt", name))})
    if len(tops) != 1:
        found = f"several: {', '.join(f'{top}{_LISTS}' for top in tops)}" if tops else f"no {_LISTS}<split>.txt"
        raise ValueError(f"{source} has {found}; `sources` names the folder with one ImageSets/ (docs/own-data.md)")
    return tops[0]


def _listed(names: Sequence[str], folder: str, split: str, source: Path) -> list[str]:
    """The names that a split's list holds, sorted."""
    file = f"{folder}{split}.txt"
    if file not in names:
        known = ", ".join(name[len(folder) : -len(".txt")] for name in names if name.startswith(folder))
        raise ValueError(
            f"{source.name} has no {file}; there are lists called {known}: name them in `splits` in params.yaml"
        )
    try:
        lines = [line.strip() for line in read_file(source, file).decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{source.name}: {file} is no UTF-8 text ({error})") from None
    for name, count in Counter(filter(None, lines)).items():
        if count > 1:
            raise ValueError(f"{source.name}: {file} lists {name} {count} times; keep one of them")
    return sorted(filter(None, lines))
