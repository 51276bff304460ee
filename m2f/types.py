"""What goes into and comes out of the network.

B pictures, Q queries, C classes, T true masks of one picture, P points
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Prediction(NamedTuple):
    """One decoder layer's answer for a batch of pictures."""

    class_logits: Tensor
    """(B, Q, C + 1), "no object" last."""
    mask_logits: Tensor
    """(B, Q, H / 4, W / 4), rounded up, for network inputs of H x W."""
    auxiliary: tuple[Prediction, ...] = ()
    """The earlier layers' predictions, first to last."""


class Target:
    """True masks of one picture and their classes.

    `Target(labels, masks)` takes any masks, overlapping ones too. Where masks do not overlap,
    `from_segments` and `from_label_map` keep one map of indices instead of T masks.
    """

    __slots__ = ("_masks", "labels", "segments")

    labels: Tensor
    """(T,) int64 class of every mask."""
    segments: Tensor | None
    """(H, W) integers: the index of the mask that holds the pixel; outside [0, T) it is none. None: dense masks."""

    def __init__(self, labels: Tensor, masks: Tensor | None = None, *, segments: Tensor | None = None) -> None:
        if (masks is None) == (segments is None):
            raise ValueError("a Target holds either masks or segments")
        if masks is not None and masks.shape[0] != labels.shape[0]:
            raise ValueError(f"{labels.shape[0]} labels for {masks.shape[0]} masks")
        self.labels, self._masks, self.segments = labels, masks, segments

    def __len__(self) -> int:
        return self.labels.shape[0]

    @classmethod
    def from_segments(cls, labels: Tensor, segments: Tensor) -> Target:
        """From a map of mask indices, (H, W), and the class of each index, (T,)."""
        return cls(labels, segments=segments)

    @classmethod
    def from_label_map(cls, label_map: Tensor, ignore_label: int = 255) -> Target:
        """One mask for every class present in a (H, W) map of class ids, by rising id."""
        ids = label_map.long()
        present = torch.unique(ids)
        present = present[present != ignore_label]
        lookup = torch.full((max(int(ids.max()), ignore_label) + 1,), -1, device=ids.device)
        lookup[present] = torch.arange(len(present), device=ids.device)
        return cls(present, segments=lookup[ids])

    @property
    def masks(self) -> Tensor:
        """All masks, (T, H, W) bool; made from `segments` on every call where those are kept instead."""
        if self._masks is not None:
            return self._masks
        assert self.segments is not None
        index = torch.arange(len(self), device=self.segments.device)
        return self.segments[None] == index[:, None, None]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the masks."""
        height, width = (self._masks if self.segments is None else self.segments).shape[-2:]  # type: ignore[union-attr]
        return height, width

    def to(self, device: torch.device | str) -> Target:
        """The same target on another device."""
        labels, masks, segments = (
            None if t is None else t.to(device) for t in (self.labels, self._masks, self.segments)
        )
        assert labels is not None
        return Target(labels, masks, segments=segments)
