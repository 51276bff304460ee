"""Images of rare classes are shown more often: repeat factor sampling (LVIS, arXiv 1908.03195, sec. 3.3 of v2)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from m2f.draws import mix
from pipeline.data.shards.reader import SplitReader
from pipeline.storage.progress import Progress


def repeat_factors(classes: Sequence[Sequence[int]], threshold: float) -> list[float]:
    """How often each image is shown in an epoch, from the classes that it holds.

    A class in the share f of the images has r = max(1, sqrt(threshold / f)); an image has the largest r of its classes,
    1 without any.
    """
    images = Counter(c for held in classes for c in set(held))
    of_class = {c: max(1.0, math.sqrt(threshold * len(classes) / count)) for c, count in images.items()}
    return [max((of_class[c] for c in held), default=1.0) for held in classes]


def classes_held(split: SplitReader, chosen: np.ndarray) -> list[list[int]]:
    """The classes that each of these records shows; reads all their labels once."""
    progress = Progress(f"classes in the images of {split.dataset}", len(chosen), unit="images")
    found = []
    for index in chosen.tolist():
        found.append(split[index].classes_shown(split.task).tolist())
        progress.add()
    progress.done(brief=True)
    return found


class RepeatOrder:
    """The endless order of images that are shown in turn as often as their factors say.

    Image i is in an epoch floor(r) times, and once more with the probability r - floor(r): where mix(seed, 6, epoch, i)
    is below it. mix(seed, 1, epoch, i) sorts an epoch, mix(seed, 1, epoch, i, k) its k-th repetition: with factors of 1
    the order is that without sampling.
    """

    def __init__(self, seed: int, factors: Sequence[float]) -> None:
        self.seed, self.factors = seed, factors
        self._ends: list[int] = []
        """By epoch, the position after its last."""
        self._order: tuple[int, list[int]] = (-1, [])
        """An epoch, and its images in order."""

    def __getitem__(self, position: int) -> int:
        """The image at a position of the order."""
        while not self._ends or self._ends[-1] <= position:
            epoch = len(self._ends)
            self._ends.append(sum(self._times(epoch)) + (self._ends[-1] if self._ends else 0))
        epoch = next(place for place, end in enumerate(self._ends) if position < end)
        if self._order[0] != epoch:
            self._order = (epoch, self.epoch(epoch))
        return self._order[1][position - (self._ends[epoch - 1] if epoch else 0)]

    def epoch(self, epoch: int) -> list[int]:
        """The images of an epoch, in their order."""
        copies = [(index, k) for index, times in enumerate(self._times(epoch)) for k in range(times)]
        copies.sort(key=lambda copy: mix(self.seed, 1, epoch, copy[0], *copy[1:] * (copy[1] > 0)))
        return [index for index, _ in copies]

    def _times(self, epoch: int) -> list[int]:
        """How often every image is in an epoch."""
        return [
            math.floor(factor) + (factor % 1 > 0 and mix(self.seed, 6, epoch, index) < factor % 1 * 2**63)
            for index, factor in enumerate(self.factors)
        ]
