"""What a person wants to know about a dataset: counts and histograms from its shards, and sample pictures."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.data.images.codecs import decode_image, decode_masks, decode_segments, nothing_of
from pipeline.data.images.draw import class_colours, painted, segment_colours, stacked

SAMPLES = 8
"""Pictures of the sample sheet."""

TILE = (360, 480)
"""(height, width) in pixels that a sample fits into."""

_COLUMNS, _GAP, _LINE, _ENTRY = 4, 8, 24, 200
"""Tiles in a row; pixels between tiles, of a line of text, of an entry of the legend."""


# Samples


def sample_places(counts: Sequence[int]) -> list[tuple[int, int]]:
    """(shard, record) of up to SAMPLES records spread evenly over shards of these many records."""
    total, ends = sum(counts), np.cumsum(counts)
    chosen = np.linspace(0, total - 1, min(SAMPLES, total)).round().astype(int).tolist()
    shards = [int(np.searchsorted(ends, place, side="right")) for place in chosen]
    return [(shard, place - int(ends[shard]) + counts[shard]) for shard, place in zip(shards, chosen, strict=True)]


def sample_sheet(rows: Sequence[Mapping[str, Any]], classes: Sequence[str], layout: str, title: str) -> bytes:
    """A PNG of stored records, each with its labels painted over it, and a legend of the classes that they show.

    Segments and instances have white borders, and shades of their class's colour. `layout`: of the pixels.
    """
    from PIL import Image, ImageDraw, ImageFont

    tiles, shown = [], set[int]()
    for row in rows:
        tile, class_ids = _tile(row, layout, len(classes))
        tiles.append(tile)
        shown |= class_ids
    columns = min(_COLUMNS, len(tiles))
    lines = math.ceil(len(tiles) / columns)
    across, down = TILE[1] + _GAP, max(tile.shape[0] for tile in tiles) + _LINE + _GAP
    width = max(columns * across + _GAP, 2 * across)
    per_line = (width - _GAP) // _ENTRY
    height = _LINE + _GAP + lines * down + math.ceil(len(shown) / per_line) * _LINE + _GAP
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    draw.text((_GAP, _GAP), title, "black", font)
    for place, (tile, row) in enumerate(zip(tiles, rows, strict=True)):
        x, y = _GAP + place % columns * across, _LINE + _GAP + place // columns * down
        sheet.paste(Image.fromarray(tile), (x, y))
        draw.text((x, y + down - _LINE - _GAP + 2), _fitting(row["name"], TILE[1], font), "dimgrey", font)
    colours = class_colours(len(classes))
    for place, class_id in enumerate(sorted(shown)):
        x, y = _GAP + place % per_line * _ENTRY, _LINE + _GAP + lines * down + place // per_line * _LINE
        draw.rectangle((x, y + 3, x + 16, y + 18), tuple(colours[class_id].tolist()))
        draw.text((x + 22, y + 1), _fitting(classes[class_id], _ENTRY - 28, font), "black", font)
    data = io.BytesIO()
    sheet.save(data, "PNG", compress_level=3)
    return data.getvalue()


def _fitting(text: str, width: int, font: Any) -> str:
    """The text, or as much of its end as is not wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"...{text}") > width:
        text = text[1:]
    return f"...{text}"


def _tile(row: Mapping[str, Any], layout: str, num_classes: int) -> tuple[np.ndarray, set[int]]:
    """A stored record with its labels painted over it, fitted into TILE, and the classes that it shows.

    What is labelled is grey below its colours, what is not keeps its own.
    """
    import cv2

    size = row["height"], row["width"]
    ids, classes = _labels(row, layout)
    if layout == "raw":
        image = np.frombuffer(row["image"], np.uint8).reshape(*size, 3)
    else:
        image = decode_image(row["image"], row["name"])
    scale = min(TILE[0] / size[0], TILE[1] / size[1])
    height, width = (max(1, round(side * scale)) for side in size)
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    ids = cv2.resize(ids, (width, height), interpolation=cv2.INTER_NEAREST)
    of_classes = row["segments"] is not None and row["segment_classes"] is None
    colours = class_colours(num_classes) if of_classes else segment_colours(classes, num_classes)
    shown = {classes[index] for index in np.unique(ids).tolist() if 0 <= index < len(classes)}
    grey = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    tinted = np.where((ids >= 0)[..., None], grey, image)  # so that colours are those of the legend
    return painted(tinted, ids, colours, borders=not of_classes, strength=0.5), shown


def _labels(row: Mapping[str, Any], layout: str) -> tuple[np.ndarray, list[int]]:
    """(h, w) int32 indices, -1 for nothing, and the class of every index; of overlapping instances the smallest."""
    size = row["height"], row["width"]
    if row["segments"] is None:
        instances = sorted(row["instances"], key=lambda instance: float(instance["area"]))
        masks = decode_masks([{"size": list(size), "counts": each["counts"]} for each in instances], size)
        return stacked(masks, size), [each["class"] for each in instances]
    class_ids = row["segment_classes"]
    if layout == "raw":
        wide = len(row["segments"]) > size[0] * size[1]
        ids = np.frombuffer(row["segments"], "<u2" if wide else np.uint8).reshape(size)
    else:
        ids = decode_segments(row["segments"], row["name"])
    nothing = nothing_of(ids)
    return np.where(ids == nothing, -1, ids.astype(np.int32)), list(range(nothing)) if class_ids is None else class_ids
