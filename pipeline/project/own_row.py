"""One's own images as entries of params.yaml: a dataset, and a row of a small network that a CPU can train."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pipeline.project.own_images import OwnImages

_SHORT_SIDE_MAX = 352
"""Short side, in pixels, to which larger images are brought: what a CPU trains on in minutes."""
_SCALES = (0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.4)
"""Short sides of training images, as multiples of that of test images."""
_STRIDE = 32
"""Crops and sizes are multiples of it: the network's coarsest."""
_TINY_QUERIES = 30
"""Of the preset tiny."""


def dataset_name(source: Path) -> str:
    """A name for a dataset, from that of its folder or archive."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", re.sub(r"(\.(zip|tar|tgz|gz|bz2|xz))+$", "", source.name)).strip("_-")
    name = name if re.match(r"[A-Za-z]", name) else f"images_{name}".rstrip("_")
    return "my_shapes" if name.lower() == "shapes" else name[:90]


def dataset_entry(name: str, found: OwnImages, *, source: str) -> str:
    """The dataset's text. `source`: its path, as params.yaml is to have it."""
    entries: dict[str, Any] = {"layout": found.layout, "sources": [source], "splits": found.splits}
    if found.label_suffix:
        entries["label_suffix"] = found.label_suffix
    entries |= {"annotation_files": found.annotation_files} if found.annotation_files else {}
    entries["class_names"] = list(found.class_names)
    if found.palette:
        entries["palette"] = {each: list(colour) for each, colour in found.palette.items()}
    if found.thing_classes:
        entries["thing_classes"] = list(found.thing_classes)
    lines = [f"{name}: # as found in {found.read}", *(f"  {key}: {_flow(value)}" for key, value in entries.items())]
    if not found.named:
        named = "in class_names and palette" if found.palette else "in class_names, in the order of their ids"
        lines.insert(1, f"  # Give the classes their names, {named}.")
        lines.insert(
            2,
            "  # For what is neither trained on nor scored, remove the class and ",
        )
        lines[2] += "call its colours `ignore`." if found.palette else "set ignore_label to its id (now 255)."
    return "\n".join(lines) + "\n"


def row_name(dataset: str) -> str:
    """A name for the dataset's row."""
    return f"{dataset}_tiny"


def row_entry(dataset: str, found: OwnImages) -> str:
    """The row's text: sizes follow from those of the images."""
    short, long = sorted(found.size)
    ratio = long / short
    test = _multiple(min(short, _SHORT_SIDE_MAX))
    sides = sorted({8 * round(scale * test / 8) for scale in _SCALES})
    crop_short = _multiple(0.75 * test)
    crop = sorted(
        (crop_short, min(_multiple(crop_short * ratio), 2 * crop_short)), reverse=found.size[0] > found.size[1]
    )
    objects = found.task != "semantic"
    share = ", max_label_share: 1.0" if objects else ""
    queries = -(-max(found.most_objects + 1, _TINY_QUERIES) // 10) * 10
    model = [f"  model: {{query_decoder: {{queries: {queries}}}}} # more than objects in any image"]
    return "\n".join(
        [
            f"{row_name(dataset)}:",
            f"  dataset: {dataset}",
            "  preset: tiny # a small network, for a CPU; on GPUs: none, with model: {backbone: {name: r50}}",
            "  weights: none # with r50: torchvision_r50",
            f"  task: {found.task}",
            *(model if queries > _TINY_QUERIES else []),
            "  train:",
            "    steps: 3000",
            f"    augmentation: {{crop: [{crop[0]}, {crop[1]}], short_sides: {sides},",
            f"                   long_side_max: {_multiple(1.4 * 1.25 * ratio * test)}{share}}}",
            "    val_interval: 500",
            f"  test: {{short_side: {test}, long_side_max: {_multiple(1.25 * ratio * test)}}}",
            "",
        ]
    )


def _multiple(pixels: float) -> int:
    return max(2 * _STRIDE, _STRIDE * round(pixels / _STRIDE))


def _flow(value: Any) -> str:
    """YAML on one line, or on several within brackets, to stand below a key that is indented by four."""
    import yaml

    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=90)
    return text.removesuffix("\n...\n").strip().replace("\n", "\n    ")
