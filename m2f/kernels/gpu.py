"""The choice between PyTorch's own operations and kernels in Triton on a GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from m2f.config import Kernels

_used = False

_OLDEST = (8, 0)
"""Compute capability, an A100's: nobody has tried older ones."""

MOST_CLASSES = 255
"""In a label map: of uint8, and of scores that a program's registers hold."""

MOST_HEAD_CHANNELS = 64
"""Of a head of the masked attention, whose tiles a program's registers hold."""

_MOST_PLACES = 2**31 - 1
"""In what a kernel is given of one image, where it counts in 32 bits."""

Size = tuple[int, int]
"""(height, width)."""


class MaskWords(NamedTuple):
    """Where queries may look, one bit a pixel. A query that may look nowhere looks everywhere."""

    words_BQW: Tensor
    """int32; bit m % 32 of word m // 32 is pixel m's."""
    seen_BQ: Tensor
    """int32; 0 where no bit of the query is 1."""


_DEVICES = ("cuda", "meta")
"""meta: tensors without memory, which take a GPU's way."""

_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def use(choice: Kernels) -> Literal["plain", "compiled"]:
    """Choose for this process; what was chosen. ValueError where kernels are asked for and cannot be had."""
    global _used
    reason = None if choice == "plain" else _missing()
    if reason and choice == "compiled":
        raise ValueError(f"kernels is compiled, but {reason}; set it to plain, or to auto")
    _used = choice != "plain" and reason is None
    return "compiled" if _used else "plain"


@contextmanager
def as_if(used: bool) -> Iterator[None]:
    """As if the kernels were in use or not, to count what tensors without memory ask of a GPU."""
    global _used
    before, _used = _used, used
    try:
        yield
    finally:
        _used = before


def takes(value: Tensor) -> bool:
    """Whether the kernels are in use for a tensor of this device, type and size."""
    return _used and value.device.type in _DEVICES and value.dtype in _TYPES and value.shape[1:].numel() <= _MOST_PLACES


def deformable_attention(
    value_BSKD: Tensor,
    sizes: tuple[Size, ...],
    positions_N2: Tensor,
    offsets_BNKLP2: Tensor,
    logits_BNKLP: Tensor,
) -> Tensor:
    """`m2f.deformable_attention.attend`, (B, N, C) of the values' type; sums are float32."""
    from m2f.kernels.triton_attention import Attention

    flat = tuple(side for size in sizes for side in size)
    result: Tensor = Attention.apply(value_BSKD, flat, positions_N2, offsets_BNKLP2, logits_BNKLP)
    return result


def takes_masks(embedding_BQC: Tensor, features_BCM: Tensor, heads: int) -> bool:
    """Whether `mask_words` and `masked_attention` are in use for these."""
    channels = embedding_BQC.shape[2] // heads
    return takes(embedding_BQC) and takes(features_BCM) and channels <= MOST_HEAD_CHANNELS


def mask_words(embedding_BQC: Tensor, features_BCM: Tensor) -> MaskWords:
    """`m2f.query_decoder.allowed_pixels`, from products that are nowhere kept."""
    from m2f.kernels.triton_masked_attention import mask

    return MaskWords(*mask(embedding_BQC.contiguous(), features_BCM.contiguous()))


def masked_attention(query_BQC: Tensor, key_BMC: Tensor, value_BMC: Tensor, allowed: MaskWords, heads: int) -> Tensor:
    """Attention of projected queries to projected keys and values, (B, Q, C) of their type, whose heads have channels
    that follow each other; sums are float32."""
    from m2f.kernels.triton_masked_attention import MaskedAttention

    result: Tensor = MaskedAttention.apply(query_BQC, key_BMC, value_BMC, *allowed, heads)
    return result


def takes_labels(logits: Tensor, classes: int) -> bool:
    """Whether `labels` is in use for mask logits of this device and type, and for so many classes."""
    return takes(logits) and classes <= MOST_CLASSES


def labels(
    logits_BQhw: Tensor, probability_BQC: Tensor, *, size: Size, valid: Size, padded: Size, of_logits: bool
) -> Tensor:
    """`m2f.inference.semantic.semantic_labels`, (B, *size) uint8, of probabilities without "no object"."""
    from m2f.kernels.triton_labels import labels

    result: Tensor = labels(
        logits_BQhw.contiguous(), probability_BQC.contiguous(), size, valid, padded, of_logits, torch.uint8
    )
    return result


@cache
def _missing() -> str | None:
    """Why the kernels cannot be used here, said once on stderr too; None: they can."""
    try:
        reason = _tried()
    except Exception as error:  # Triton's own, the compiler's and CUDA's: of many classes
        kept = os.environ.get("TRITON_CACHE_DIR") or "~/.triton/cache"
        said = f"{' '.join(str(error).split())[-200:]}; its code is kept in {kept}, which may be deleted"
        reason = f"a kernel in Triton cannot be compiled here ({said})"
    if reason:
        print(f"{reason}: PyTorch's own operations are used, which are slower", file=sys.stderr, flush=True)
    return reason


def _tried() -> str | None:
    """Count 1.5 as the middle of the pixels 1, 2, 3 and 6, and a place outside, each of half the weight; and what a
    query gets that may look at the second of two pixels."""
    if not torch.cuda.is_available():
        return "there is no GPU"
    if torch.cuda.get_device_capability() < _OLDEST:
        return f"{torch.cuda.get_device_name()} is older than an A100"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed"
    device = torch.device("cuda")
    value = torch.tensor([1.0, 2.0, 3.0, 6.0], device=device).view(1, 4, 1, 1)
    offsets = torch.tensor([1.0, 1.0, 9.0, 9.0], device=device).view(1, 1, 1, 1, 2, 2)
    with torch.no_grad():
        found = deformable_attention(
            value, ((2, 2),), torch.zeros(1, 2, device=device), offsets, torch.zeros(1, 1, 1, 1, 2, device=device)
        ).item()
        features = torch.tensor([-1.0, 1.0], device=device)
        pixels = torch.tensor([1.0, 1.5], device=device).view(1, 2, 1)
        allowed = mask_words(torch.ones(1, 1, 1, device=device), features.view(1, 1, 2))
        attended = masked_attention(pixels[:, :1], pixels, pixels, allowed, heads=1).item()
    wrong = next((number for number in (found, attended) if number != 1.5), None)
    return None if wrong is None else f"a kernel in Triton counts {wrong} where 1.5 is right"
