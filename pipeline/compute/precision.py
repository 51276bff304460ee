"""In which precision a training computes: TF32 in float32 products of a GPU, bf16, and fp16 with its scaled loss."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

_GROWTH_INTERVAL = 2000
_FIRST_SCALE = 2.0**16
"""As torch.amp.GradScaler begins, and after how many steps without overflow it doubles."""


_AUTOCAST = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def in_precision(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Where a network computes in float32, bf16 or fp16, as autocast does it."""
    dtype = _AUTOCAST[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


class LossScale:
    """A factor of the loss, so that small gradients are not 0 in fp16: as torch.amp.GradScaler, without waiting for the
    device.

    A step whose gradient is not finite is left out, and halves the factor; many good steps in a row double it.
    """

    def __init__(self, device: torch.device) -> None:
        self._scale = torch.tensor(_FIRST_SCALE, device=device)
        self._good_steps = torch.tensor(0.0, device=device)

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss times the factor."""
        return loss * self._scale

    def norm(self, scaled_norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the scaled gradient's norm: the gradient's own, 0 in a step that is left out; what has to be finite, where
        a lower factor would not help; and 1 for a step that is left out, else 0."""
        finite = scaled_norm.isfinite()
        norm = torch.where(finite, scaled_norm / self._scale, 0.0)
        to_check = torch.where(finite | (self._scale > 1.0), norm, scaled_norm)
        return norm, to_check, (~finite).float()

    def factor(self, clip: Tensor) -> Tensor:
        """What the scaled gradient is multiplied by, where the gradient itself is by `clip`."""
        return clip / self._scale

    def update(self, left_out: Tensor) -> None:
        """Adapt the factor after a step."""
        self._good_steps = (self._good_steps + 1) * (1 - left_out)
        grown = self._good_steps >= _GROWTH_INTERVAL
        self._scale = torch.where(left_out > 0, self._scale / 2, torch.where(grown, self._scale * 2, self._scale))
        self._scale = self._scale.clamp(min=1.0)
        self._good_steps = torch.where(grown, 0.0, self._good_steps)

    def state(self) -> list[float]:
        """For a checkpoint."""
        return [self._scale.item(), self._good_steps.item()]

    def load(self, state: list[float]) -> None:
        """Go on from a checkpoint."""
        self._scale.fill_(state[0])
        self._good_steps.fill_(state[1])


def allow_tf32(choice: Literal["off", "convolutions", "all"]) -> None:
    """Set it for this process, whatever the environment or PyTorch's defaults say. No effect on CPUs.

    PyTorch keeps these switches twice, and refuses to read the older ones where the two disagree. So both are set, for
    all of cuDNN's operations: the older ones first, because setting them leaves "none" in the newer ones where TF32 is
    off.
    """
    convolutions, matrix_products = choice != "off", choice == "all"
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.backends.cuda.matmul.allow_tf32 = matrix_products
    torch.backends.cudnn.conv.fp32_precision = "tf32" if convolutions else "ieee"  # type: ignore[attr-defined]
    torch.backends.cudnn.rnn.fp32_precision = "tf32" if convolutions else "ieee"  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.fp32_precision = "tf32" if matrix_products else "ieee"
