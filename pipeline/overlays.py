"""Pictures of what was predicted beside what is true."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np

from pipeline.loader import Picture
from pipeline.measures import Outcome

SHOWN_SCORE = 0.5
"""Instances that are less sure are not drawn."""

_GOLDEN_ANGLE = 0.618034


def class_colours(count: int) -> np.ndarray:
    """One RGB colour per class, (count, 3) uint8: hues a golden angle apart, in three lightnesses."""
    colours = [colorsys.hls_to_rgb(i * _GOLDEN_ANGLE % 1, (0.45, 0.6, 0.32)[i % 3], 0.75) for i in range(count)]
    return (np.array(colours).reshape(-1, 3) * 255).astype(np.uint8)


def write_overlay(path: Path, picture: Picture, outcome: Outcome, num_classes: int) -> None:
    """A PNG of three panels: the picture, the prediction over it, the truth over it; where there is nothing, grey.

    Panoptic segments have their class's colour, things lighter or darker than their neighbours; instances a colour
    each, the surest on top.
    """
    import cv2

    from pipeline.files import whole_file

    height, width = picture.original_size
    image = picture.image.permute(1, 2, 0).numpy()
    image = cv2.resize(np.ascontiguousarray(image), (width, height), interpolation=cv2.INTER_AREA)
    grey = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)

    if outcome.segments is not None:
        assert picture.segments is not None
        found = outcome.segments
        panels = [
            _painted(grey, found.segments.cpu().numpy(), _segment_colours(found.labels.cpu().numpy(), num_classes)),
            _painted(grey, picture.segments.numpy(), _segment_colours(picture.labels.numpy(), num_classes)),
        ]
    elif outcome.instances is not None:
        assert picture.instances is not None
        from pycocotools import mask as coco

        sure = outcome.instances.masks[outcome.instances.scores >= SHOWN_SCORE].cpu().numpy()  # best first
        real = [
            run for run, crowd in zip(picture.instances.run_lengths, picture.instances.crowd, strict=True) if not crowd
        ]
        true = coco.decode(real).transpose(2, 0, 1) if real else np.zeros((0, height, width), np.uint8)
        panels = [_painted(grey, _stacked(masks, (height, width)), class_colours(len(masks))) for masks in (sure, true)]
    else:
        assert outcome.labels is not None and picture.label_map is not None
        colours = class_colours(num_classes)
        panels = [
            _painted(grey, labels, colours, borders=False)
            for labels in (outcome.labels.cpu().numpy(), picture.label_map.numpy())
        ]
    gap = np.full((height, 4, 3), 255, np.uint8)
    sheet = np.hstack([image, gap, panels[0], gap, panels[1]])
    done, encoded = cv2.imencode(".png", sheet[..., ::-1])
    if not done:
        raise OSError(f"could not encode the overlay {path}")
    with whole_file(path) as partial:
        partial.write_bytes(encoded.tobytes())


def _segment_colours(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """(S, 3) uint8: the class's colour, every further segment of a class in another shade."""
    of_class, seen = class_colours(num_classes), np.zeros(num_classes, np.int64)
    colours = np.zeros((len(labels), 3), np.uint8)
    for segment, label in enumerate(labels.tolist()):
        shade = (1.0, 1.3, 0.7, 1.15, 0.85)[seen[label] % 5]
        colours[segment] = np.clip(of_class[label] * shade, 0, 255)
        seen[label] += 1
    return colours


def _stacked(masks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(N, h, w) masks as one map of indices, the first on top; -1 where there is none."""
    ids = np.full(size, -1, np.int32)
    for index in reversed(range(len(masks))):
        ids[masks[index] > 0] = index
    return ids


def _painted(grey: np.ndarray, ids: np.ndarray, colours: np.ndarray, *, borders: bool = True) -> np.ndarray:
    """The grey picture with every pixel of id i tinted in colours[i]; other ids stay grey. Borders are white lines."""
    inside = (ids >= 0) & (ids < len(colours))
    if not inside.any():
        return grey
    tint = colours[np.where(inside, ids, 0)]
    painted = np.where(inside[..., None], (0.35 * grey + 0.65 * tint).astype(np.uint8), grey)
    if borders:
        edge = np.zeros(ids.shape, bool)
        edge[:, 1:] |= ids[:, 1:] != ids[:, :-1]
        edge[1:] |= ids[1:] != ids[:-1]
        painted[edge] = 255
    return painted
