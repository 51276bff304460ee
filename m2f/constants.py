"""Numbers that the host knows, as tensors made once per device.

A tensor made of such numbers in every forward pass would be a copy from the host each time, which a GPU waits for.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

_REAL = (Tensor, torch.nn.Parameter)
"""Types of tensors that may be kept: fake ones belong to the mode that made them."""


def constant(values: tuple[Any, ...], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of (nested tuples of) numbers on the device of `like`. It is shared: nobody may change it in place."""
    if torch.compiler.is_compiling() or type(like) not in _REAL:
        return torch.tensor(values, dtype=dtype, device=like.device)
    return _made(values, dtype, like.device)


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device; one of the host's comes without making the host wait for the work queued there."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@cache  # of any number, since recordings of forward passes read them where they lie; each is a few bytes
def _made(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a tensor made in inference mode would be refused in training
        return to_device(torch.tensor(values, dtype=dtype, device="cpu"), device)
