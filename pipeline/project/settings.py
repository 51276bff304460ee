"""params.yaml of a new project: the embedded row as this repository has it, and the user's own data and row."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

EMBEDDED = "shapes_tiny"
"""The row of generated images."""

_SHIPPED: dict[str, tuple[str, ...]] = {
    "datasets": ("shapes",),
    "sites": ("torchvision",),
    "weights": ("none", "torchvision_r50"),
    "presets": ("none", "tiny"),
    "rows": (EMBEDDED,),
}
"""Entries of the repository's params.yaml that every project begins with, by section."""

_COMMENTS = {
    "sites": "# What one publisher's weights share. {name} and {stamp} are an entry's.",
    "weights": "# What a row starts from: none for random weights, torchvision_r50 for a backbone trained on ImageNet.",
    "presets": "# Settings that several rows share.",
    "rows": "# dvc.yaml reads each row's dataset, preset and weights.",
}


class Entries(NamedTuple):
    """One's own part of params.yaml, as text that is not indented."""

    dataset: str
    row: str


NOTHING_OWN = Entries(
    dataset="""\
# Your own images, in data/mine or data/mine.zip:
#   images/training/a.jpg    annotations/training/a.png    each pixel a class id, 0 for the first of class_names
#   images/validation/b.jpg  annotations/validation/b.png  255: ignored
# mine:
#   layout: folder # or coco, or voc
#   sources: [data/mine] # a folder, a zip or tar archive, or a URL
#   class_names: [background, object]
""",
    row="""\
# mine_tiny:
#   dataset: mine
#   preset: tiny # a small network, for a CPU
#   weights: none
#   task: semantic # coco: also panoptic or instance
#   train:
#     steps: 3000
#     augmentation: {crop: [256, 320], short_sides: [256, 288, 320, 360, 400, 448, 512], long_side_max: 720}
#     val_interval: 500
#   test: {short_side: 352, long_side_max: 480}
""",
)
"""Examples, as comments."""


def project_settings(repository: str, own: Entries) -> str:
    """The text of a project's params.yaml, from that of the repository's."""
    parts = [
        "# Everything that changes a result. A row's settings are those that it gives, then its preset's, then the\n"
        "# package's defaults: the published recipe.",
        f"# How a row's seeds are judged against a published figure.\n{_section(repository, 'verdict')}",
    ]
    for section, names in _SHIPPED.items():
        entries = [_entry(repository, section, name) for name in names]
        entries += {"datasets": [_indented(own.dataset)], "rows": [_indented(own.row)]}.get(section, [])
        separator = "\n" if section in ("datasets", "rows") else ""
        text = f"{section}:\n{separator.join(entries)}".rstrip("\n")
        parts.append(f"{_COMMENTS[section]}\n{text}" if section in _COMMENTS else text)
    parts.append("# Published checkpoints; dvc.yaml reads this section.\ncheckpoints: {}")
    return "\n\n".join(parts) + "\n"


def _section(text: str, name: str) -> str:
    """A whole section, with its first line."""
    return _block(text.splitlines(), name, indent="")


def _entry(text: str, section: str, name: str) -> str:
    """One entry of a section, with its lines as they stand and a line end after each."""
    return _block(_section(text, section).splitlines(), name, indent="  ") + "\n"


def _block(lines: Sequence[str], key: str, *, indent: str) -> str:
    """The line of a key and those that are indented further, without empty ones at the end."""
    first = next(place for place, line in enumerate(lines) if line.startswith(f"{indent}{key}:"))
    inner = itertools.takewhile(lambda line: not line.strip() or line.startswith(f"{indent} "), lines[first + 1 :])
    return "\n".join([lines[first], *inner]).rstrip()


def _indented(text: str) -> str:
    return "".join(f"  {line}" if line.strip() else line for line in text.splitlines(keepends=True))
