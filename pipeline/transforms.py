"""The recipes' training augmentations as albumentations transforms: resize, crop, flip, photometric distortion.

Semantic rows resize by the short side, crop, flip and distort colours; COCO's rows flip and then resize and crop by
large-scale jitter. Flipping is the library's own. Resizing by the short side with a cap on the long one, cropping with
a limit on the commonest label, large-scale jitter and the distortion are written here, because the library's nearest
transforms compute something else (its ColorJitter blends, scales hue differently and rounds once; the recipe truncates
to uint8 after every step). All draw from the generators that `seed_transform` sets, so one seed decides a whole
augmentation.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
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
    """Compose for `image`, (h, w, 3) uint8 RGB, and any of what belongs to it:

    `mask`: (h, w) ids, uint8 (255: none) or int32 (-1: none);
    `masks`: (N, h, w) uint8, N may be 0;
    `boxes`: (N, 4) float, x1, y1, x2, y2 in pixels. They are moved, not clipped: `touching` says which are left.

    Gives at most `augmentation.crop`; a smaller picture stays smaller, for the caller to pad right and bottom.
    """
    flip = Flip(p=augmentation.flip)
    steps: list[A.BasicTransform]
    if augmentation.jitter is not None:
        steps = [flip, LargeScaleJitter(augmentation.crop, augmentation.jitter)]
    else:
        steps = [
            ResizeShortSide(augmentation.short_sides, augmentation.long_side_max),
            LimitedCrop(augmentation.crop, augmentation.max_label_share),
            flip,
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


def resize_ids(ids: np.ndarray, size: tuple[int, int], part: tuple[slice, slice] = (slice(None),) * 2) -> np.ndarray:
    """`part` (rows, columns) of (..., h, w) ids resized to `size` (height, width) as OpenCV's nearest does it.

    There are no new ids. Nearest chooses rows and columns apart, so those of the part are looked up and the rest is
    never made.
    """
    rows, columns = (_nearest(ids.shape[axis], size[axis])[part[axis]] for axis in (-2, -1))
    return ids.take(columns, axis=-1).take(rows, axis=-2)


def _nearest(pixels: int, resized: int) -> np.ndarray:
    """Which of a line's pixels every one of its resized pixels shows, (resized,)."""
    line = np.arange(pixels, dtype=np.int32)[None]
    return cv2.resize(line, (resized, 1), interpolation=cv2.INTER_NEAREST)[0]


def touching(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """(N,) bool: boxes (N, 4) of which something lies inside a picture."""
    x1, y1, x2, y2 = boxes.T
    return (x1 < x2) & (y1 < y2) & (x1 < width) & (y1 < height) & (x2 > 0) & (y2 > 0)


class _WithBoxes(A.DualTransform):
    """A transform that takes `boxes` too; the library would clip and drop `bboxes` by rules of its own."""

    apply_to_boxes: Callable[..., np.ndarray]
    """(N, 4) x1, y1, x2, y2 in pixels, and the drawn parameters, to (N, 4)."""

    @property
    def targets(self) -> dict[str, Callable[..., Any]]:
        """What is transformed, by name."""
        return {**super().targets, "boxes": self.apply_to_boxes}


class Flip(_WithBoxes, A.HorizontalFlip):
    """The library's horizontal flip, also of no masks and of boxes."""

    def apply_to_masks(self, masks: np.ndarray, **params: Any) -> np.ndarray:
        """(N, h, w)."""
        return masks[..., ::-1]

    def apply_to_boxes(self, boxes: np.ndarray, **params: Any) -> np.ndarray:
        """Left becomes right."""
        x1, y1, x2, y2 = boxes.T
        width = params["shape"][1]
        return np.stack((width - x2, y1, width - x1, y2), axis=1)


class ResizeShortSide(_WithBoxes):
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
        """Nearest."""
        return resize_ids(mask, size)

    def apply_to_masks(self, masks: np.ndarray, size: tuple[int, int], **params: Any) -> np.ndarray:
        """Nearest."""
        return resize_ids(masks, size)

    def apply_to_boxes(self, boxes: np.ndarray, size: tuple[int, int], **params: Any) -> np.ndarray:
        """Scaled."""
        return _scaled(boxes, params["shape"], size)


class LimitedCrop(_WithBoxes):
    """Crop at a uniform offset, drawn again while one label covers too much.

    A crop is drawn again, at most CROP_REDRAWS times, unless it holds at least two labels and the commonest covers
    less than `max_label_share` of the labelled pixels; the last draw is kept whatever it holds. 1, or no `mask` to
    count in: never again.
    """

    def __init__(self, crop: tuple[int, int], max_label_share: float) -> None:
        super().__init__(p=1.0)
        self.crop = crop
        self.max_label_share = max_label_share

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw (top, left) of the crop."""
        height, width = params["shape"][:2]
        room = max(height - self.crop[0], 0), max(width - self.crop[1], 0)
        labels = data.get("mask")
        redraws = CROP_REDRAWS if self.max_label_share < 1 and any(room) else 0
        for draw in range(redraws + 1):
            top, left = self.py_random.randint(0, room[0]), self.py_random.randint(0, room[1])
            if labels is None or draw == redraws:
                break
            counts = label_counts(labels[top : top + self.crop[0], left : left + self.crop[1]])
            if np.count_nonzero(counts) >= 2 and counts.max() < self.max_label_share * counts.sum():
                break
        return {"top": top, "left": left}

    def apply(self, img: np.ndarray, top: int, left: int, **params: Any) -> np.ndarray:
        """The part of an image or mask inside the crop."""
        return img[top : top + self.crop[0], left : left + self.crop[1]]

    def apply_to_masks(self, masks: np.ndarray, top: int, left: int, **params: Any) -> np.ndarray:
        """The same part of (N, h, w)."""
        return masks[:, top : top + self.crop[0], left : left + self.crop[1]]

    def apply_to_boxes(self, boxes: np.ndarray, top: int, left: int, **params: Any) -> np.ndarray:
        """Moved."""
        return boxes - (left, top, left, top)


class LargeScaleJitter(_WithBoxes):
    """Scale to fit into the crop times a factor drawn uniformly from `jitter`, then crop at a uniform offset.

    The two sides of the crop times the factor, truncated to pixels, limit the long and the short side. The crop is
    never drawn again. (mmdetection 3.3: RandomResize with ratio_range and keep_ratio, RandomCrop.)
    """

    def __init__(self, crop: tuple[int, int], jitter: tuple[float, float]) -> None:
        super().__init__(p=1.0)
        self.crop = crop
        self.jitter = jitter

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the size of the whole picture and the part of it that is kept."""
        height, width = params["shape"][:2]
        factor = self.py_random.uniform(*self.jitter)
        limits = [int(side * factor) for side in self.crop]
        size = resized_size(height, width, short_side=min(limits), long_side_max=max(limits))
        starts = [self.py_random.randint(0, max(0, side - most)) for side, most in zip(size, self.crop, strict=True)]
        part = tuple(slice(start, start + most) for start, most in zip(starts, self.crop, strict=True))
        return {"size": size, "part": part}

    def apply(self, img: np.ndarray, size: tuple[int, int], part: tuple[slice, slice], **params: Any) -> np.ndarray:
        """Bilinear."""
        return resize_image(img, size)[part]

    def apply_to_mask(
        self, mask: np.ndarray, size: tuple[int, int], part: tuple[slice, slice], **params: Any
    ) -> np.ndarray:
        """Nearest."""
        return resize_ids(mask, size, part)

    def apply_to_masks(
        self, masks: np.ndarray, size: tuple[int, int], part: tuple[slice, slice], **params: Any
    ) -> np.ndarray:
        """Nearest."""
        return resize_ids(masks, size, part)

    def apply_to_boxes(
        self, boxes: np.ndarray, size: tuple[int, int], part: tuple[slice, slice], **params: Any
    ) -> np.ndarray:
        """Scaled and moved."""
        top, left = part[0].start, part[1].start
        return _scaled(boxes, params["shape"], size) - (left, top, left, top)


def _scaled(boxes: np.ndarray, shape: tuple[int, ...], size: tuple[int, int]) -> np.ndarray:
    """Boxes of a picture of `shape` (height, width, ...) when it is resized to `size`."""
    down, right = size[0] / shape[0], size[1] / shape[1]
    return boxes * (right, down, right, down)


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
