"""How large a row's pictures are: as published, and as the network is shown them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.params.schema import MsFlipConfig, TestConfig
    from pipeline.storage.results.data import Manifest

Size = tuple[int, int]
"""(height, width)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageCounts:
    """A dataset's pictures, counted."""

    train: int
    val: int
    usual: Size
    """(height, width) that stands for all: the commonest, or medians of both."""


_CITYSCAPES = ImageCounts(train=2975, val=500, usual=(1024, 2048))
_ADE20K = ImageCounts(train=20210, val=2000, usual=(512, 683))

PUBLISHED: Mapping[str, ImageCounts] = {
    "cityscapes": _CITYSCAPES,
    "cityscapes_objects": _CITYSCAPES,
    "ade20k": _ADE20K,
    "ade20k_objects": _ADE20K,
    "vistas": ImageCounts(train=18000, val=2000, usual=(2448, 3264)),
    "coco": ImageCounts(train=118287, val=5000, usual=(480, 640)),
}
"""The published datasets, for use before their shards are made. Counts: the datasets' own pages. All of Cityscapes'
pictures are of one size; those of the others differ, and the commonest landscape size stands for them."""


def counted(dataset: str, manifest: Manifest | None) -> ImageCounts | None:
    """A dataset's pictures by the manifest of its shards or, without one, as published; None: neither is there."""
    if manifest is None:
        return PUBLISHED.get(dataset)
    records = {split: entry.records for split, entry in manifest.splits.items()}
    sides = manifest.image_sizes["val" if "val" in records else "train"]
    (_, height, _), (_, width, _) = sides.height, sides.width
    return ImageCounts(train=records.get("train", 0), val=records.get("val", 0), usual=(height, width))


def shown_size(size: Size, *, short_side: int, long_side_max: int, pad_multiple: int) -> Size:
    """(height, width) of the network's input for a picture of `size`: resized to the short side, or to less where the
    long side would exceed its maximum, both rounded half up, and padded to a multiple."""
    scale = min(short_side / min(size), long_side_max / max(size))
    height, width = (max(1, int(side * scale + 0.5)) for side in size)
    return height + -height % pad_multiple, width + -width % pad_multiple


def input_size(size: Size, test: TestConfig) -> Size:
    """(height, width) of the network's input when a picture of `size` is tested at one scale."""
    return shown_size(
        size, short_side=test.short_side, long_side_max=test.long_side_max, pad_multiple=test.pad_multiple
    )


def ms_flip_factor(size: Size, test: TestConfig) -> float:
    """Pixels that all views of a picture (several sizes, each also mirrored) have, over those of the single scale."""
    views: MsFlipConfig | None = test.ms_flip
    if views is None:
        return 0.0
    sizes = (
        shown_size(size, short_side=side, long_side_max=views.long_side_max, pad_multiple=test.pad_multiple)
        for side in views.short_sides
    )
    return 2 * sum(area(view) for view in sizes) / area(input_size(size, test))


def area(size: Size) -> int:
    """Pixels."""
    return size[0] * size[1]
