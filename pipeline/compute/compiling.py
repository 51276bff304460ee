"""Code that torch.compile makes for the training on a GPU, before its first step."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from m2f.kernels.build import cache_folder, own_folder
from m2f.model import Mask2Former
from pipeline.provenance.environment import device_name
from pipeline.storage.root import storage_root

_CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
"""Variables that PyTorch and Triton read when they compile."""


def keep_compiled_code() -> None:
    """Let this process keep compiled code in the storage root, in a folder for its device, version of PyTorch and user;
    in the user's cache where the root is a URL, or lies where others may write, for the code is run. Variables that are
    set stay as they are."""
    root = storage_root()
    name = re.sub(r"[^\w.-]+", "-", f"{device_name()}-torch-{torch.__version__}-{os.getuid()}")
    own = own_folder(root / "compiled" / name) if isinstance(root, Path) else None
    folder = own or cache_folder(f"m2f-compiled-{name}") or _passing_folder()
    for variable, part in _CACHES.items():
        os.environ.setdefault(variable, str(folder / part))


def compile_training(model: Mask2Former, images: Tensor, seeds: Sequence[int], *, backend: str = "inductor") -> None:
    """Compile backbone and pixel decoder of a model in training, by a step on images of the training's size.

    The step leaves weights and running statistics as they are; gradients are added to. All workers call it together,
    for a synchronised norm sums in it. Where it fails, it is tried once more without code that was kept, which a crash
    may have cut short. RuntimeError: it cannot be compiled; then the model is as before.
    """
    try:
        _compile(model, images, seeds, backend)
    except RuntimeError as error:
        kept = [os.environ[variable] for variable in _CACHES if os.environ.get(variable)]
        folder = _passing_folder()
        os.environ.update({variable: str(folder / part) for variable, part in _CACHES.items()})
        try:
            _compile(model, images, seeds, backend)
        except RuntimeError:
            raise error from None
        if kept:
            where = " and ".join(kept)
            print(f"{error}; without the code kept in {where} it does not: delete that", file=sys.stderr, flush=True)


def _compile(model: Mask2Former, images: Tensor, seeds: Sequence[int], backend: str) -> None:
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        model.compile_training(backend=backend)
        model(images, seeds=seeds, auxiliary=False).mask_logits.sum().backward()
    except Exception as error:  # PyTorch's, Triton's and the C compiler's: of many classes
        model.uncompile()
        raise RuntimeError(f"torch.compile fails here ({' '.join(str(error).split())[:200]})") from None
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])


def _passing_folder() -> Path:
    """Of this process, until it ends."""
    folder = Path(tempfile.mkdtemp(prefix="m2f-compiled-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
