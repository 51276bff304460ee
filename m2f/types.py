"""What goes into and comes out of the network.

B pictures, Q queries, C classes, T true masks of one picture, P points
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Prediction(NamedTuple):
    """One decoder layer's answer for a batch of pictures."""

    class_logits: Tensor
    """(B, Q, C + 1), "no object" last."""
    mask_logits: Tensor
    """(B, Q, H / 4, W / 4) for padded pictures of H x W."""
    auxiliary: tuple[Prediction, ...] = ()
    """The earlier layers' predictions, first to last."""


@dataclass(frozen=True, eq=False)
class Target:
    """True masks of one picture and their classes.

    `Target(labels, masks)` takes any masks, overlapping ones too. Where masks do not overlap,
    `from_segments` and `from_label_map` keep one map of indices instead of T masks.
    """

    labels: Tensor
    """(T,) int64 class of every mask."""
    masks: Tensor | None = None
    """(T, H, W) bool; None when `segments` holds them."""
    segments: Tensor | None = None
    """(H, W) integers: the index of the mask that holds the pixel; anything outside [0, T) is no mask."""

    def __post_init__(self) -> None:
        if (self.masks is None) == (self.segments is None):
            raise ValueError("a Target holds either masks or segments")
        if self.masks is not None and self.masks.shape[0] != self.labels.shape[0]:
            raise ValueError(f"{self.labels.shape[0]} labels for {self.masks.shape[0]} masks")

    def __len__(self) -> int:
        return self.labels.shape[0]

    @classmethod
    def from_segments(cls, labels: Tensor, segments: Tensor) -> Target:
        """From a map of mask indices, (H, W), and the class of each index, (T,)."""
        return cls(labels=labels, segments=segments)

    @classmethod
    def from_label_map(cls, label_map: Tensor, ignore_label: int = 255) -> Target:
        """One mask for every class present in a (H, W) map of class ids, by rising id."""
        present = torch.unique(label_map.long())
        present = present[present != ignore_label]
        lookup = torch.full((max(int(label_map.max()), ignore_label) + 1,), -1, device=label_map.device)
        lookup[present] = torch.arange(len(present), device=label_map.device)
        return cls(labels=present, segments=lookup[label_map.long()])

    def dense_masks(self) -> Tensor:
        """All masks, (T, H, W) bool."""
        if self.masks is not None:
            return self.masks
        assert self.segments is not None
        index = torch.arange(len(self), device=self.segments.device)
        return self.segments[None] == index[:, None, None]

    def to(self, device: torch.device | str) -> Target:
        """The same target on another device."""
        move = (None if t is None else t.to(device) for t in (self.labels, self.masks, self.segments))
        return Target(*move)  # type: ignore[arg-type]
