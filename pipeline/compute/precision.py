"""Which float32 products a GPU may take in TF32."""

from __future__ import annotations

from typing import Literal

import torch


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
