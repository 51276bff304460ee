"""Pictures beside label maps of the same names: paired, and read as a dataset's settings say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from pipeline.data.archives import below, file_names, read_file
from pipeline.data.images.codecs import nothing_for
from pipeline.data.images.label_files import LABEL_SUFFIXES, class_ids, colour_ids, read_colours, read_labels
from pipeline.data.records import Labelled, Record

if TYPE_CHECKING:
    import numpy as np

    from pipeline.params.schema import DatasetConfig

IGNORED_COLOURS = "ignore"
"""The entry of `palette` for colours of no class, unless a class is called so."""


def holder(sources: Sequence[Path], top: str, layout: str) -> tuple[Path, str, Sequence[str]]:
    """The first source that holds the folder `top`, the prefix of its files, and the names of all files. ValueError
    where none does."""
    found = set[str]()
    for source in sources:
        names = file_names(source)
        with suppress(ValueError):
            return source, f"{below(names, top, source)}{top}/", names
        found |= {name.partition("/")[0] for name in names if "/" in name}
    raise ValueError(
        f"no folder {top}/ in {', '.join(map(str, sources)) or '`sources`, which lists nothing'} (found "
        f"{', '.join(sorted(found)[:5]) or 'no folders'}); layout {layout} needs it, see docs/data.md"
    )


def by_stem(
    names: Iterable[str], prefix: str, suffixes: tuple[str, ...], source: Path, ending: str = ""
) -> dict[str, str]:
    """The files of `names` below `prefix`, by their path below it without `ending` and suffix; others are left out.

    ValueError names two that differ in their suffix alone.
    """
    found: dict[str, str] = {}
    for name in names:
        path = PurePosixPath(name)
        if not name.startswith(prefix) or path.suffix.lower() not in suffixes:
            continue
        stem = name[len(prefix) : -len(path.suffix)]
        if not stem.endswith(ending):
            continue
        stem = stem.removesuffix(ending)
        if stem in found:
            raise ValueError(f"{source.name}: {found[stem]} and {name} have the same name; keep one of them")
        found[stem] = name
    return found


def paired(
    config: DatasetConfig, source: Path, images: Mapping[str, str], names: Sequence[str], label_folder: str
) -> dict[str, str]:
    """The label file of every picture in `images`, both by stem, and of label files without a picture.

    names: the source's files. ValueError names the first picture without label.
    """
    labels = by_stem(names, label_folder, LABEL_SUFFIXES, source, config.label_suffix)
    for stem in sorted(images.keys() - labels.keys()):
        label = f"{label_folder}{stem}{config.label_suffix}"
        suffixed = [other for other in sorted(labels.keys() - images.keys()) if other.startswith(stem)]
        others = [name for name in names if name.rpartition(".")[0] == label]
        hint = ""
        if suffixed and not config.label_suffix:
            hint = f"; for {labels[suffixed[0]]}, set `label_suffix: {suffixed[0][len(stem) :]}`"
        elif others:
            hint = f"; {others[0]} is none: known suffixes of labels are {' '.join(LABEL_SUFFIXES)}"
        raise ValueError(f"{source.name}: {images[stem]} has no label {label}.png{hint}")
    return labels


def records(config: DatasetConfig, source: Path, images: Mapping[str, str], labels: Mapping[str, str]) -> list[Record]:
    """A record of every picture in `images`, by stem, with its label file."""
    return [
        Record(
            name=stem,
            image_file=f"{source.name}: {images[stem]}",
            label_file=f"{source.name}: {labels[stem]}",
            read=partial(_read, source, images[stem], labels[stem], config),
        )
        for stem in sorted(images)
    ]


def _read(source: Path, image: str, label: str, config: DatasetConfig) -> Labelled:
    file, data = f"{source.name}: {label}", read_file(source, label)
    ids = _of_colours(data, file, config) if config.palette else _of_ids(data, file, config)
    return Labelled(read_file(source, image), ids, None)


def _of_colours(data: bytes, file: str, config: DatasetConfig) -> np.ndarray:
    nothing = nothing_for(len(config.class_names))
    class_of = dict.fromkeys(config.palette.get(IGNORED_COLOURS, ()), nothing)
    for class_id, name in enumerate(config.class_names):
        class_of |= dict.fromkeys(config.palette[name], class_id)
    return colour_ids(read_colours(data, file, config.max_pixels), class_of, file, nothing=nothing)


def _of_ids(data: bytes, file: str, config: DatasetConfig) -> np.ndarray:
    nothing, ignored, classes = nothing_for(len(config.class_names)), {*config.ignore_labels}, len(config.class_names)

    def class_of(stored: int) -> int | None:
        shifted = _shifted(stored, config)
        if shifted in ignored or stored + config.label_offset in ignored:
            return nothing
        return shifted if 0 <= shifted < classes else None

    def known(stored: int) -> str:
        said = f"outside the classes, 0 to {classes - 1}, and not ignored (ignore_label: {config.ignore_label})"
        if not config.label_offset:
            more = (
                "; for masks of 0 and 255, give both as colours in `palette`" if (stored, classes) == (255, 2) else ""
            )
            return f"which is {said}{more}"
        shifted = _shifted(stored, config)
        more = f"; to ignore it too, set ignore_label: {[*config.ignore_labels, shifted]}" if stored in ignored else ""
        return f"which label_offset {config.label_offset} makes {shifted}: {said}{more}"

    return class_ids(read_labels(data, file, config.max_pixels), class_of, file, nothing=nothing, known=known)


def _shifted(stored: int, config: DatasetConfig) -> int:
    """A stored id with `label_offset`. Below 0 it is counted from the top down, so that ADE20K's 0 becomes 255."""
    shifted = stored + config.label_offset
    return shifted + nothing_for(len(config.class_names)) + 1 if shifted < 0 <= stored else shifted
