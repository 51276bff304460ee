"""The recipe's training augmentation as albumentations transforms: resize, crop, flip, photometric distortion.

Flipping is the library's own. Resizing by the short side with a cap on the long one, cropping with a limit on the
commonest label, and the distortion are written here, because the library's nearest transforms compute something else
(its ColorJitter blends, scales hue differently and rounds once; the recipe truncates to uint8 after every step).
All draw from the generators that `seed_transform` sets, so one seed decides a whole augmentation.
"""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING, Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask a server for its newest version on import

import albumentations as A
import cv2
import numpy as np

from pipeline.pictures import IGNORE

if TYPE_CHECKING:
    from pipeline.params import AugmentationConfig

CROP_REDRAWS = 10


def training_transform(augmentation: AugmentationConfig) -> A.Compose:
    """Compose for `image` (h, w, 3) uint8 RGB and `mask` (h, w) ids, uint8 (255: none) or int32 (-1: none).

    Gives at most `augmentation.crop`; a smaller picture stays smaller, for the caller to pad right and bottom.
    """
    steps: list[A.BasicTransform] = [
        ResizeShortSide(augmentation.short_sides, augmentation.long_side_max),
        LimitedCrop(augmentation.crop, augmentation.max_label_share),
        A.HorizontalFlip(p=augmentation.flip),
    ]
    if augmentation.photometric:
        steps.append(PhotometricDistortion())
    return A.Compose(steps)


def seed_transform(transform: A.Compose, seed: int) -> None:
    """Let `seed` (below 2**32) decide the next augmentation.

    `Compose.set_random_seed` would give every step a generator of its own with the same seed, so that the steps' first
    draws are one number: small pictures would be those that are flipped, cropped at the top and darkened.
    """
    transform.set_random_state(np.random.default_rng(seed), random.Random(seed))


def resized_size(height: int, width: int, *, short_side: int, long_side_max: int) -> tuple[int, int]:
    """(height, width) whose short side is `short_side`, or less where the long side would exceed its maximum.

    Both are rounded half up, as in the published implementation.
    """
    scale = min(short_side / min(height, width), long_side_max / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h, w, 3) uint8 to `size` (height, width), bilinear."""
    return cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)


def label_counts(ids: np.ndarray) -> np.ndarray:
    """Pixels of every id from 0 on; pixels of nothing (255 in uint8, below 0 in int32) are left out."""
    if ids.dtype == np.uint8:
        return cv2.calcHist([ids], [0], None, [256], [0, 256]).ravel()[:IGNORE].astype(np.int64)
    return np.bincount(ids[ids >= 0])


class ResizeShortSide(A.DualTransform):
    """Scale the short side to one of `short_sides`, drawn uniformly; the long side stays within its maximum."""

    def __init__(self, short_sides: tuple[int, ...], long_side_max: int) -> None:
        super().__init__(p=1.0)
        self.short_sides = short_sides
        self.long_side_max = long_side_max

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the short side."""
        short_side = self.py_random.choice(self.short_sides)
        height, width = params["shape"][:2]
        return {"size": resized_size(height, width, short_side=short_side, long_side_max=self.long_side_max)}

    def apply(self, img: np.ndarray, size: tuple[int, int], **params: Any) -> np.ndarray:
        """Bilinear."""
        return resize_image(img, size)

    def apply_to_mask(self, mask: np.ndarray, size: tuple[int, int], **params: Any) -> np.ndarray:
        """Nearest: no new ids."""
        return cv2.resize(mask, (size[1], size[0]), interpolation=cv2.INTER_NEAREST)


class LimitedCrop(A.DualTransform):
    """Crop at a uniform offset, drawn again while one label covers too much.

    A crop is drawn again, at most CROP_REDRAWS times, unless it holds at least two labels and the commonest covers
    less than `max_label_share` of the labelled pixels; the last draw is kept whatever it holds. 1: never again.
    """

    def __init__(self, crop: tuple[int, int], max_label_share: float) -> None:
        super().__init__(p=1.0)
        self.crop = crop
        self.max_label_share = max_label_share

    @property
    def targets_as_params(self) -> list[str]:
        """The labels decide whether a crop is kept."""
        return ["mask"]

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw (top, left) of the crop."""
        height, width = params["shape"][:2]
        room = max(height - self.crop[0], 0), max(width - self.crop[1], 0)
        redraws = CROP_REDRAWS if self.max_label_share < 1 and any(room) else 0
        for draw in range(redraws + 1):
            top, left = self.py_random.randint(0, room[0]), self.py_random.randint(0, room[1])
            if draw == redraws:
                break
            counts = label_counts(data["mask"][top : top + self.crop[0], left : left + self.crop[1]])
            if np.count_nonzero(counts) >= 2 and counts.max() < self.max_label_share * counts.sum():
                break
        return {"top": top, "left": left}

    def apply(self, img: np.ndarray, top: int, left: int, **params: Any) -> np.ndarray:
        """The part of an image or mask inside the crop."""
        return img[top : top + self.crop[0], left : left + self.crop[1]]


class PhotometricDistortion(A.ImageOnlyTransform):
    """Brightness, contrast, saturation and hue, each with probability 0.5, truncated to uint8 after every step.

    Brightness adds U(-32, 32). Contrast multiplies by U(0.5, 1.5), before or after the colour steps (0.5 each). In HSV,
    saturation is multiplied by U(0.5, 1.5) and the hue, of 180, moved by -18 to 17.
    """

    def __init__(self) -> None:
        super().__init__(p=1.0)

    def get_params(self) -> dict[str, Any]:
        """Draw every step; None: left out. Every draw is made, so that a step's value does not depend on another's."""
        draw = self.py_random
        some = [draw.random() < 0.5 for _ in range(4)]
        brightness, contrast, saturation = draw.uniform(-32, 32), draw.uniform(0.5, 1.5), draw.uniform(0.5, 1.5)
        hue, contrast_first = draw.randint(-18, 17), draw.random() < 0.5
        values = (brightness, contrast, saturation, hue)
        drawn = {
            name: value if applied else None
            for name, value, applied in zip(("brightness", "contrast", "saturation", "hue"), values, some, strict=True)
        }
        return {**drawn, "contrast_first": contrast_first}

    def apply(
        self,
        img: np.ndarray,
        brightness: float | None,
        contrast: float | None,
        saturation: float | None,
        hue: int | None,
        contrast_first: bool,
        **params: Any,
    ) -> np.ndarray:
        """The distorted picture, (h, w, 3) uint8 RGB."""
        if brightness is not None:
            img = cv2.LUT(img, _linear(1.0, brightness))
        if contrast is not None and contrast_first:
            img = cv2.LUT(img, _linear(contrast, 0.0))
        if saturation is not None:
            img = _on_hsv_channel(img, 1, _linear(saturation, 0.0))
        if hue is not None:
            img = _on_hsv_channel(img, 0, ((np.arange(256) + hue) % 180).astype(np.uint8))
        if contrast is not None and not contrast_first:
            img = cv2.LUT(img, _linear(contrast, 0.0))
        return img


def _linear(factor: float, offset: float) -> np.ndarray:
    """Table of every uint8 value times a factor plus an offset, clipped and truncated."""
    values = np.arange(256, dtype=np.float32) * np.float32(factor) + np.float32(offset)
    return np.clip(values, 0, 255).astype(np.uint8)


def _on_hsv_channel(image: np.ndarray, channel: int, table: np.ndarray) -> np.ndarray:
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    cv2.insertChannel(cv2.LUT(cv2.extractChannel(hsv, channel), table), hsv, channel)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
