"""Code that torch.compile makes for the training on a GPU, before its first step."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from m2f.model import Mask2Former
from pipeline.provenance.environment import device_name
from pipeline.storage.root import storage_root

_CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
"""Variables that PyTorch and Triton read when they first compile."""


def keep_compiled_code() -> None:
    """Let this process keep compiled code in the storage root, in a folder for its device and version of PyTorch; where
    the root is a URL, in the user's cache. Variables that are set stay as they are."""
    root = storage_root()
    if isinstance(root, Path):
        name = re.sub(r"[^\w.-]+", "-", f"{device_name()}-torch-{torch.__version__}")
        for variable, folder in _CACHES.items():
            os.environ.setdefault(variable, str(root / "compiled" / name / folder))


def compile_training(model: Mask2Former, images: Tensor, seeds: Sequence[int], *, backend: str = "inductor") -> None:
    """Compile backbone and pixel decoder of a model in training, by a step on images of the training's size.

    The step leaves weights and running statistics as they are; gradients are added to. All workers call it together,
    for a synchronised norm sums in it. RuntimeError: it cannot be compiled; then the model is as before.
    """
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.compile_training(backend=backend)
    try:
        model(images, seeds=seeds, auxiliary=False).mask_logits.sum().backward()
    except Exception as error:  # PyTorch's, Triton's and the C compiler's: of many classes
        model.uncompile()
        raise RuntimeError(f"torch.compile fails here ({' '.join(str(error).split())[:200]})") from None
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
