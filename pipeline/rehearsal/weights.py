"""Random weights of a backbone in the layout of the published ones."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from m2f.config import ModelConfig


def write_random_backbone(model: ModelConfig, layout: Literal["torchvision", "swin"], path: Path) -> None:
    """Write the backbone of `model` with fresh weights as a .pth file with torchvision's or mmsegmentation's names."""
    import torch

    from m2f.model import build_model
    from m2f.weights.reference import reference_name

    tensors = {name: value for name, value in build_model(model).state_dict().items() if name.startswith("backbone.")}
    if layout == "swin":  # a classifier has no norms of its levels
        tensors = {
            reference_name(name).removeprefix("backbone."): value
            for name, value in tensors.items()
            if not name.startswith("backbone.norms.")
        }
    else:
        tensors = {name.removeprefix("backbone."): value for name, value in tensors.items()}
    content = io.BytesIO()
    torch.save(tensors, content)  # into a file, it says nothing of a full disk
    path.write_bytes(content.getbuffer())
