"""The recipes' training augmentations as albumentations transforms: resize, crop, flip, photometric distortion.

Semantic rows resize by the short side, crop, flip and distort colours; COCO's rows flip and then resize and crop by
large-scale jitter. Flipping the crop is the library's own. Resizing by the short side with a cap on the long one,
cropping with a limit on the commonest label, large-scale jitter and the distortion are written here, because the
library's nearest transforms compute something else (its ColorJitter blends, scales hue differently and rounds once;
the recipe truncates to uint8 after every step). All draw from the generators that `seed_transform` sets, so one seed
decides a whole augmentation.

Size and crop are drawn before a pixel of the picture is read, and only what the crop shows is read and resized: a
picture that is a view of a memory-mapped file costs the pages of the crop's rows.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask a server for its newest version on import

import albumentations as A
import cv2
import numpy as np

from pipeline.data.images.label_maps import look_up, look_up_in_place
from pipeline.data.images.resize import WHOLE, Part, resize_image, resized_size
from pipeline.data.loader.pixels import distort_planes, label_counts

if TYPE_CHECKING:
    from pipeline.params.schema import AugmentationConfig


CROP_REDRAWS = 10


def training_transform(augmentation: AugmentationConfig, *, distort_later: bool = False) -> A.Compose:
    """Compose for `image`, (h, w, 3) uint8 RGB, and any of what belongs to it:

    `mask`: (h, w) ids, uint8 (255: none) or uint16 (65535: none);
    `label_of`: (S,) label of every id, -1: none, for the limit on the commonest label; without it, ids are labels;
    `masks`: (N, h, w) uint8, N may be 0;
    `boxes`: (N, 4) float, x1, y1, x2, y2 in pixels. They are moved, not clipped: `touching` says which are left.

    Gives at most `augmentation.crop`; a smaller picture stays smaller, for the caller to pad right and bottom. Gives
    `counts` too: the label_counts of the cropped `mask`, or None where nothing had to be counted. distort_later: gives
    the `distortion` that the picture is to undergo, if any, and leaves it to the caller.
    """
    steps: list[A.BasicTransform]
    detectron2 = augmentation.rules == "detectron2"
    if augmentation.jitter is not None:
        steps = [LargeScaleJitter(augmentation.crop, augmentation.jitter, augmentation.flip, one_offset=detectron2)]
    else:
        steps = [
            ShortSideCrop(
                augmentation.crop, augmentation.short_sides, augmentation.long_side_max, augmentation.max_label_share
            ),
            Flip(p=augmentation.flip),
        ]
    if augmentation.photometric:
        steps.append(PhotometricDistortion(later=distort_later, most_hue=18 if detectron2 else 17))
    return A.Compose(steps)


def seed_transform(transform: A.Compose, seed: int) -> None:
    """Let `seed` (below 2**32) decide the next augmentation.

    `Compose.set_random_seed` would give every step a generator of its own with the same seed, so that the steps' first
    draws are one number: small pictures would be those that are flipped, cropped at the top and darkened.
    """
    transform.set_random_state(np.random.default_rng(seed), random.Random(seed))


def resize_ids(ids: np.ndarray, size: tuple[int, int], part: Part = WHOLE, *, mirrored: bool = False) -> np.ndarray:
    """`part` (rows, columns) of (h, w) ids, uint8 or uint16, resized to `size` (height, width) by OpenCV's nearest.

    mirrored: of the ids whose left is right. There are no new ids. Nearest chooses rows and columns apart, so those of
    the part are looked up and the rest is neither read nor made.
    """
    rows, columns = (_nearest(ids.shape[axis], size[axis])[part[axis]] for axis in (0, 1))
    if mirrored:
        columns = ids.shape[1] - 1 - columns
    first, last = sorted((int(columns[0]), int(columns[-1])))
    # rows are copied whole, which is fast, so columns are chosen as rows too
    return cv2.transpose(cv2.transpose(ids[rows, first : last + 1])[columns - first])


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
        return _mirrored(boxes, params["shape"][1])


class _ResizedCrop(_WithBoxes):
    """A part of the resized picture. Drawn are `size`, the whole's (height, width), the `part` and, if any, `mirrored`:
    whether the picture is mirrored first."""

    def __init__(self, crop: tuple[int, int]) -> None:
        super().__init__(p=1.0)
        self.crop = crop

    def _part(self, size: tuple[int, int]) -> Part:
        """A crop at a uniform offset."""
        top, left = (self.py_random.randint(0, max(0, side - most)) for side, most in zip(size, self.crop, strict=True))
        return slice(top, top + self.crop[0]), slice(left, left + self.crop[1])

    def apply_with_params(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What is given, transformed, and `counts`."""
        return {**super().apply_with_params(params, *args, **kwargs), "counts": params.get("counts")}

    def apply(
        self, img: np.ndarray, size: tuple[int, int], part: Part, mirrored: bool = False, **params: Any
    ) -> np.ndarray:
        """Bilinear."""
        return resize_image(img, size, part, mirrored=mirrored)

    def apply_to_mask(
        self, mask: np.ndarray, size: tuple[int, int], part: Part, mirrored: bool = False, **params: Any
    ) -> np.ndarray:
        """Nearest."""
        return resize_ids(mask, size, part, mirrored=mirrored)

    def apply_to_masks(
        self, masks: np.ndarray, size: tuple[int, int], part: Part, mirrored: bool = False, **params: Any
    ) -> np.ndarray:
        """Nearest."""
        height, width = (len(range(*kept.indices(side))) for kept, side in zip(part, size, strict=True))
        resized = np.empty((len(masks), height, width), masks.dtype)
        for place, mask in enumerate(masks):
            resized[place] = resize_ids(mask, size, part, mirrored=mirrored)
        return resized

    def apply_to_boxes(
        self, boxes: np.ndarray, size: tuple[int, int], part: Part, mirrored: bool = False, **params: Any
    ) -> np.ndarray:
        """Scaled and moved."""
        shape, (top, left) = params["shape"], (kept.start for kept in part)
        if mirrored:
            boxes = _mirrored(boxes, shape[1])
        return _scaled(boxes, shape, size) - (left, top, left, top)


class ShortSideCrop(_ResizedCrop):
    """Scale the short side to one of `short_sides`, crop at a uniform offset, again while one label covers too much.

    The long side stays within its maximum. A crop is drawn again, at most CROP_REDRAWS times, unless it holds at least
    two labels and the commonest covers less than `max_label_share` of the labelled pixels; the last draw is kept
    whatever it holds. 1, or no `mask` to count in: never again.
    """

    def __init__(
        self, crop: tuple[int, int], short_sides: tuple[int, ...], long_side_max: int, max_label_share: float
    ) -> None:
        super().__init__(crop)
        self.short_sides = short_sides
        self.long_side_max = long_side_max
        self.max_label_share = max_label_share

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the short side and the part; the part's ids, which were counted, are kept with their counts."""
        short_side = self.py_random.choice(self.short_sides)
        height, width = params["shape"][:2]
        size = resized_size(height, width, short_side=short_side, long_side_max=self.long_side_max)
        ids, label_of = data.get("mask"), data.get("label_of")
        part = self._part(size)
        if ids is None or self.max_label_share >= 1 or (size[0] <= self.crop[0] and size[1] <= self.crop[1]):
            return {"size": size, "part": part}
        shown = resize_ids(ids, size, part)
        counts = label_counts(shown)
        for _ in range(CROP_REDRAWS):
            if self._varied(counts, label_of):
                break
            part = self._part(size)
            shown = resize_ids(ids, size, part)
            counts = label_counts(shown)
        return {"size": size, "part": part, "ids": shown, "counts": counts}

    def _varied(self, counts: np.ndarray, label_of: np.ndarray | None) -> bool:
        """Whether there are two labels and none covers too much, by the pixels of every id."""
        if label_of is not None:
            labelled = label_of >= 0
            counts = np.bincount(label_of[labelled], counts[: len(label_of)][labelled])
        return bool(np.count_nonzero(counts) >= 2 and counts.max() < self.max_label_share * counts.sum())

    def apply_to_mask(
        self,
        mask: np.ndarray,
        size: tuple[int, int],
        part: Part,
        mirrored: bool = False,
        ids: np.ndarray | None = None,
        **params: Any,
    ) -> np.ndarray:
        """Nearest."""
        return resize_ids(mask, size, part) if ids is None else ids


class LargeScaleJitter(_ResizedCrop):
    """Mirror, scale to fit into the crop times a factor drawn uniformly from `jitter`, then crop at a uniform offset.

    flip: the probability of mirroring. The two sides of the crop times the factor, truncated to pixels, limit the long
    and the short side. The crop is never drawn again. (mmdetection 3.3: RandomFlip, RandomResize with ratio_range and
    keep_ratio, RandomCrop.) one_offset: one draw is the share of both sides' room (detectron2's FixedSizeCrop).
    """

    def __init__(
        self, crop: tuple[int, int], jitter: tuple[float, float], flip: float = 0.0, *, one_offset: bool = False
    ) -> None:
        super().__init__(crop)
        self.jitter = jitter
        self.flip = flip
        self.one_offset = one_offset

    def _part(self, size: tuple[int, int]) -> Part:
        if not self.one_offset:
            return super()._part(size)
        share = self.py_random.uniform(0.0, 1.0)
        top, left = (round(share * max(0, side - most)) for side, most in zip(size, self.crop, strict=True))
        return slice(top, top + self.crop[0]), slice(left, left + self.crop[1])

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw everything."""
        height, width = params["shape"][:2]
        mirrored = self.flip > 0 and (self.flip >= 1 or self.py_random.random() < self.flip)
        factor = self.py_random.uniform(*self.jitter)
        limits = [int(side * factor) for side in self.crop]
        size = resized_size(height, width, short_side=min(limits), long_side_max=max(limits))
        return {"size": size, "part": self._part(size), "mirrored": mirrored}


def _mirrored(boxes: np.ndarray, width: int) -> np.ndarray:
    """Boxes of a picture whose left becomes right."""
    x1, y1, x2, y2 = boxes.T
    return np.stack((width - x2, y1, width - x1, y2), axis=1)


def _scaled(boxes: np.ndarray, shape: tuple[int, ...], size: tuple[int, int]) -> np.ndarray:
    """Boxes of a picture of `shape` (height, width, ...) when it is resized to `size`."""
    down, right = size[0] / shape[0], size[1] / shape[1]
    return boxes * (right, down, right, down)


@dataclass(frozen=True, kw_only=True)
class Distortion:
    """What PhotometricDistortion has drawn; None: a step is left out."""

    brightness: float | None
    contrast: float | None
    saturation: float | None
    hue: int | None
    contrast_first: bool

    def tables(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """What becomes of every value of a colour before saturation and hue, and after them; None: it stays."""
        first = None if self.brightness is None else _linear(1.0, self.brightness)
        if self.contrast is None:
            return first, None
        contrasts = _linear(self.contrast, 0.0)
        if not self.contrast_first:
            return first, contrasts
        return contrasts if first is None else contrasts[first], None

    def of_image(self, image: np.ndarray) -> np.ndarray:
        """A picture, (h, w, 3) uint8 RGB, distorted."""
        first, last = self.tables()
        if first is not None:
            image = look_up(image, first)
        if self.saturation is not None:
            image = _on_hsv_channel(image, 1, _linear(self.saturation, 0.0))
        if self.hue is not None:
            image = _on_hsv_channel(image, 0, ((np.arange(256) + self.hue) % 180).astype(np.uint8))
        return image if last is None else look_up(image, last)

    def in_place(self, planes: np.ndarray) -> None:
        """The same picture as (3, h, w), distorted where it lies."""
        first, last = self.tables()
        if first is not None:
            look_up_in_place(planes, first)
        coloured = self.saturation is not None or self.hue is not None
        if coloured and not distort_planes(planes, saturation=self.saturation, hue=self.hue):
            colours = replace(self, brightness=None, contrast=None)
            planes[:] = colours.of_image(np.ascontiguousarray(planes.transpose(1, 2, 0))).transpose(2, 0, 1)
        if last is not None:
            look_up_in_place(planes, last)


class PhotometricDistortion(A.ImageOnlyTransform):
    """Brightness, contrast, saturation and hue, each with probability 0.5, truncated to uint8 after every step.

    Brightness adds U(-32, 32). Contrast multiplies by U(0.5, 1.5), before or after the colour steps (0.5 each). In HSV,
    saturation is multiplied by U(0.5, 1.5) and the hue, of 180, moved by -18 to `most_hue`. later: what is drawn is
    given as `distortion`, and the picture stays as it is.
    """

    def __init__(self, *, later: bool = False, most_hue: int = 17) -> None:
        super().__init__(p=1.0)
        self.later = later
        self.most_hue = most_hue

    def get_params(self) -> dict[str, Any]:
        """Draw every step; None: left out. Every draw is made, so that a step's value does not depend on another's."""
        draw = self.py_random
        some = [draw.random() < 0.5 for _ in range(4)]
        brightness, contrast, saturation = draw.uniform(-32, 32), draw.uniform(0.5, 1.5), draw.uniform(0.5, 1.5)
        hue, contrast_first = draw.randint(-18, self.most_hue), draw.random() < 0.5
        values = (brightness, contrast, saturation, hue)
        drawn = {
            name: value if applied else None
            for name, value, applied in zip(("brightness", "contrast", "saturation", "hue"), values, some, strict=True)
        }
        return {**drawn, "contrast_first": contrast_first}

    def apply_with_params(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What is given, distorted, or with the `distortion` that is to come."""
        names = ("brightness", "contrast", "saturation", "hue", "contrast_first")
        if self.later:
            return {**kwargs, "distortion": Distortion(**{name: params[name] for name in names})}
        done: dict[str, Any] = super().apply_with_params(params, *args, **kwargs)
        return done

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
        return Distortion(
            brightness=brightness, contrast=contrast, saturation=saturation, hue=hue, contrast_first=contrast_first
        ).of_image(img)


def _linear(factor: float, offset: float) -> np.ndarray:
    """Table of every uint8 value times a factor plus an offset, clipped and truncated."""
    values = np.arange(256, dtype=np.float32) * np.float32(factor) + np.float32(offset)
    return np.clip(values, 0, 255).astype(np.uint8)


def _on_hsv_channel(image: np.ndarray, channel: int, table: np.ndarray) -> np.ndarray:
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    cv2.insertChannel(look_up(cv2.extractChannel(hsv, channel), table), hsv, channel)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
