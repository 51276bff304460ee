"""Which float32 products a GPU may take in TF32."""

from __future__ import annotations

from typing import Literal

import torch


def allow_tf32(choice: Literal["off", "convolutions", "all"]) -> None:
    """Set it for this process, whatever the environment or PyTorch's defaults say. No effect on CPUs."""
    torch.backends.cudnn.conv.fp32_precision = "ieee" if choice == "off" else "tf32"  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.fp32_precision = "tf32" if choice == "all" else "ieee"
