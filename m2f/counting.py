"""Counting integers without making the host wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def counts(values: Tensor, size: int) -> Tensor:
    """How often 0, 1, ..., `size` - 1 are in `values`, integers of any shape in [0, size); (size,) int64.

    What `torch.bincount` gives, which on a GPU first looks at the largest value, and so makes the host wait.
    """
    result = torch.zeros(size, dtype=torch.int64, device=values.device)
    one = torch.ones(1, dtype=torch.int64, device=values.device)
    return result.index_add_(0, values.flatten(), one.expand(values.numel()))


def clipped(values: Tensor, size: int) -> Tensor:
    """A copy of the integers in which what is outside [0, size) is `size`."""
    return torch.where((values < 0) | (values >= size), size, values)
