"""The same bits in every run on a GPU, as on a CPU.

What the step of a training does on a GPU that PyTorch documents as nondeterministic
(torch.use_deterministic_algorithms), and what becomes of it:

* Backward of convolutions (cuDNN), of index_select, gather and indexing, and writing by index: PyTorch has another
  algorithm for each, and takes it.
* Matrix products on several streams: a workspace of fixed size, CUBLAS_WORKSPACE_CONFIG.
* Backward of bilinear F.interpolate: PyTorch takes it apart into indexing.
* Backward of scaled_dot_product_attention: its flash and memory-efficient kernels add in a fixed order; cuDNN's is
  switched off.
* Backward of F.grid_sample: there is no other; m2f.deterministic_sampling has one.
* Backward of m2f.kernels.triton_attention: it gathers the values' gradient in a fixed order, without atomics.

Sums over workers are NCCL's, whose order follows from the number of GPUs and how they are connected.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch


def be_deterministic(on: bool, device: torch.device) -> None:
    """Set for this process whether operations of a GPU give the same bits in every run. Changes nothing on a CPU.

    To be called before the first matrix product. An operation that has no such form raises RuntimeError.
    """
    if device.type != "cuda":
        return
    torch.use_deterministic_algorithms(on)
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # NVIDIA's documentation of cuBLAS, reproducibility
        torch.backends.cudnn.benchmark = False  # it would choose algorithms by how long they take
        torch.backends.cuda.enable_cudnn_sdp(False)


@contextlib.contextmanager
def any_algorithm() -> Iterator[None]:
    """Operations without a deterministic form warn while the block runs: what it computes shapes no weights."""
    on, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(on, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(on, warn_only=warn_only)
