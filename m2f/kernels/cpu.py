"""The loops of cpu.c for tensors, shared over as many threads as PyTorch uses.

They give what the plain forms give within the rounding of float32, and the draws bit for bit. The bits do not depend on
the number of threads.
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from m2f.kernels.build import loops

LOOPS = "677685963d529ddf5e425c4ad4d21a20a15251d915013d0568317df93e26133e"
"""`m2f.kernels.build.source_digest()`, by which the loops count in digests of the code; a test holds it."""

MOST_CHANNELS = 256
MOST_POINTS = 64
"""Of one head, in the attention: cpu.c's."""

_QUERIES_AT_ONCE = 4
"""In the matching costs: cpu.c's."""

Sizes = tuple[tuple[int, int], ...]
"""(height, width) of every level."""


def takes(*tensors: Tensor) -> bool:
    """Whether the loops can be used for these tensors, of 32 bits on a CPU and not empty."""
    right = all(t.device.type == "cpu" and t.dtype in _TYPES and type(t) in _REAL and t.numel() for t in tensors)
    return right and not torch.compiler.is_compiling() and loops(LOOPS) is not None


_TYPES = (torch.float32, torch.int32)
_REAL = (Tensor, torch.nn.Parameter)
"""Types of tensors that have memory: fake ones have none."""


# Calls


def deformable_attention(
    value_BSKD: Tensor, sizes: Sizes, positions_N2: Tensor, offsets_BNKLP2: Tensor, logits_BNKLP: Tensor
) -> Tensor:
    """`m2f.deformable_attention.attend`, (B, N, C); the positions have no gradient."""
    return _Attention.apply(value_BSKD, sizes, positions_N2, offsets_BNKLP2, logits_BNKLP)


def equal(maps_MHW: Tensor, map_R: Tensor, value_R: Tensor, points_GP2: Tensor) -> Tensor:
    """The masks `maps[map_R[r]] == value_R[r]` at points, (R, P); R / G masks in turn share a row of points."""
    rows, points = len(map_R), points_GP2.shape[-2]
    if maps_MHW.dtype in (torch.bool, torch.uint8):
        name, maps = "equal_1", maps_MHW
    else:
        name, maps = "equal_4", maps_MHW.int()
    output = torch.empty(rows, points)
    if rows:
        height, width = maps.shape[-2:]
        group = rows // len(points_GP2)
        tensors = (maps.contiguous(), map_R.contiguous(), value_R.int().contiguous(), points_GP2.contiguous(), output)
        _call(name, *tensors, group, height, width, points, work=rows)
    return output


def draw(keys_2R: Tensor, count: int) -> Tensor:
    """Uniform draws, (R, count), of int32 keys: `m2f.draws.uniform`."""
    rows = keys_2R.shape[1]
    output = torch.empty(rows, count)
    _call("draw", keys_2R.contiguous(), output, rows, count, work=rows)
    return output


def uncertain_points(maps_Rhw: Tensor, keys_2R: Tensor, *, candidates: int, certain: int, points: int) -> Tensor:
    """`m2f.points.uncertain_points`, (R, points, 2), of int32 keys of the draws."""
    rows, height, width = maps_Rhw.shape
    output = torch.empty(rows, points, 2)
    tensors = (maps_Rhw.contiguous(), keys_2R.contiguous(), output)
    if 0 in _call("uncertain", *tensors, rows, height, width, candidates, certain, points, work=rows):
        raise MemoryError(f"there is no memory to draw {candidates + points - certain} points")
    return output


def mask_costs(logits_BQhw: Tensor, points_BP2: Tensor, masks_BTP: Tensor) -> tuple[Tensor, Tensor]:
    """`m2f.matcher.mask_costs` of logits read at the points of their image, twice (B, Q, T)."""
    B, Q, h, w = logits_BQhw.shape
    T, P = masks_BTP.shape[1:]
    parts = B * -(-Q // _QUERIES_AT_ONCE)
    sums = torch.zeros(parts, 2 * _QUERIES_AT_ONCE * T, dtype=torch.float64)
    entropy_BQT, dice_BQT = torch.empty(2, B, Q, T)
    tensors = (logits_BQhw.contiguous(), points_BP2.contiguous(), masks_BTP.contiguous(), masks_BTP.sum(2), sums)
    _call("mask_costs", *tensors, entropy_BQT, dice_BQT, Q, T, h, w, P, work=parts)
    return entropy_BQT, dice_BQT


def mask_losses(logits_Rhw: Tensor, points_RP2: Tensor, masks_RP: Tensor) -> tuple[Tensor, Tensor]:
    """`m2f.losses.point_losses` of logits read at their points, twice (R,); the points have no gradient."""
    return _MaskLosses.apply(logits_Rhw, points_RP2, masks_RP)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, sizes: Sizes, positions: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        value, positions, offsets, logits = (t.contiguous() for t in (value, positions, offsets, logits))
        B, S, K, D = value.shape
        _, N, _, L, P, _ = offsets.shape
        levels = torch.tensor(sizes, dtype=torch.int64)
        output = value.new_empty(B, N, K * D)
        _call("deformable_forward", value, levels, positions, offsets, logits, output, S, N, K, L, P, D, work=B * N)
        ctx.save_for_backward(value, levels, positions, offsets, logits)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        value, levels, positions, offsets, logits = ctx.saved_tensors
        B, S, K, D = value.shape
        _, N, _, L, P, _ = offsets.shape
        made = torch.zeros_like(value), torch.empty_like(offsets), torch.empty_like(logits)
        tensors = (value, levels, positions, offsets, logits, gradient.contiguous(), *made)
        _call("deformable_backward", *tensors, S, N, K, L, P, D, work=B * K)
        to_value, to_offsets, to_logits = made
        return to_value, None, None, to_offsets, to_logits


class _MaskLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, points: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        logits, points, masks = logits.contiguous(), points.contiguous(), masks.contiguous()
        R, h, w = logits.shape
        entropy, dice = torch.empty(2, R)
        sums = torch.empty(R, 2, dtype=torch.float64)
        _call("mask_losses", logits, points, masks, entropy, dice, sums, h, w, masks.shape[1], work=R)
        ctx.save_for_backward(logits, points, masks, sums)
        return entropy, dice

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_entropy: Tensor, to_dice: Tensor) -> tuple[Tensor | None, ...]:
        logits, points, masks, sums = ctx.saved_tensors
        R, h, w = logits.shape
        to_logits = torch.zeros_like(logits)
        tensors = (logits, points, masks, sums, to_entropy.contiguous(), to_dice.contiguous(), to_logits)
        _call("mask_losses_backward", *tensors, h, w, masks.shape[1], work=R)
        return to_logits, None, None


@cache
def _threads(count: int, process: int) -> ThreadPoolExecutor:
    """Threads beside the caller's. A forked process has none of its parent's."""
    return ThreadPoolExecutor(count, thread_name_prefix="m2f-kernel")


def _call(name: str, *arguments: Tensor | int, work: int) -> list[int]:
    """Call a loop for the parts [0, work) of its work, shared over as many threads as PyTorch uses. What it returns in
    every thread; of a loop that returns nothing, any numbers."""
    library = loops()
    assert library is not None
    function = getattr(library, name)
    values = [
        ctypes.c_void_p(argument.data_ptr()) if isinstance(argument, Tensor) else ctypes.c_int64(argument)
        for argument in arguments
    ]

    def part(number: int, parts: int) -> int:
        begin, end = (ctypes.c_int64(work * n // parts) for n in (number, number + 1))
        returned: int = function(*values, begin, end)  # releases the interpreter's lock
        return returned

    parts = max(1, min(torch.get_num_threads(), work))
    others = [_threads(parts - 1, os.getpid()).submit(part, number, parts) for number in range(1, parts)]
    return [part(0, parts), *(other.result() for other in others)]
