"""Cityscapes' label files, drawn at random, and predictions for them."""

from __future__ import annotations

import numpy as np

from pipeline.data.datasets.cityscapes import TRAIN_IDS

STUFF = (7, 8, 11, 21, 23)
"""Label ids of evaluated stuff."""
VOID = (0, 1, 3, 4, 9, 15, 29, 30)
"""Label ids that are not evaluated; 29 and 30 are of classes with objects."""
THINGS = (24, 26, 28, 33)
"""Label ids of some evaluated classes with objects."""


def instance_ids(seed: int, size: tuple[int, int] = (96, 160)) -> np.ndarray:
    """(h, w) uint16, what *_gtFine_instanceIds.png holds: stuff, void, groups, and objects from small to large."""
    rng = np.random.default_rng(seed)
    ids = np.zeros(size, np.uint16)
    for column in range(0, size[1], 20):
        ids[:, column : column + 20] = rng.choice((*STUFF, *STUFF, *VOID))
    for label in (*THINGS, 29):
        for number in range(3):
            _paste(ids, 1000 * label + number, rng, (6, 45))
        if rng.random() < 0.6:  # a group
            _paste(ids, label, rng, (6, 45))
    return ids


def predictions(ids: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(P, h, w) bool masks, (P,) train ids and (P,) scores with ties: objects, groups and void nearly met, some of them
    twice, and masks anywhere."""
    rng = np.random.default_rng(seed)
    masks, labels = [], []
    for value in np.unique(ids).tolist():
        label = value if value < 1000 else value // 1000
        for _ in range(rng.integers(0, 3)):
            shifted = np.roll(ids == value, rng.integers(-1, 3, 2), (0, 1))
            masks.append(shifted & (rng.random(ids.shape) < rng.choice((0.85, 0.95, 1.0))))
            labels.append(label if label in THINGS and rng.random() < 0.9 else rng.choice(THINGS))
    for _ in range(4):
        masks.append(np.zeros(ids.shape, bool))
        _paste(masks[-1], True, rng, (4, 40))
        labels.append(rng.choice(THINGS))
    train_ids = np.array([TRAIN_IDS.index(label) for label in labels])
    return np.stack(masks), train_ids, rng.integers(1, 20, len(masks)) / 20


def _paste(into: np.ndarray, value: int, rng: np.random.Generator, sides: tuple[int, int]) -> None:
    height, width = rng.integers(*sides, 2)
    top, left = (rng.integers(0, max(1, side - 8)) for side in into.shape)
    into[top : top + height, left : left + width] = value
