"""The sizes at which loading is measured, of images and of a batch."""

from __future__ import annotations

from dataclasses import dataclass

GROUP = 2
"""Pictures of a batch."""


@dataclass(frozen=True)
class Size:
    """Pictures as one of the published data sets has them."""

    row: str
    """Whose augmentation is used."""
    height: int
    width: int
    suffix: str


SIZES = {
    "Cityscapes": Size("cityscapes_r50", 1024, 2048, ".png"),
    "ADE20K": Size("ade20k_r50", 512, 683, ".jpg"),
    "COCO": Size("coco_panoptic_r50", 480, 640, ".jpg"),
}
