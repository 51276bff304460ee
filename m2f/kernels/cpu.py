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

LOOPS = "e3a43798b13519d9ce6e37bff6b3a35835a34ac83ab73794c301716f684bbda2"
"""`m2f.kernels.build.source_digest()`, by which the loops count in digests of the code; a test holds it."""

MOST_CHANNELS = 256
"""Of one head, in the attention: cpu.c's."""

Sizes = tuple[tuple[int, int], ...]
"""(height, width) of every level."""


def takes(*tensors: Tensor) -> bool:
    """Whether the loops can be used for these tensors, of 32 bits on a CPU."""
    right = all(t.device.type == "cpu" and t.dtype in _TYPES and type(t) in _REAL for t in tensors)
    return right and not torch.compiler.is_compiling() and loops() is not None


_TYPES = (torch.float32, torch.int32)
_REAL = (Tensor, torch.nn.Parameter)
"""Types of tensors that have memory: fake ones have none."""


# Calls


def deformable_attention(value_BSKD: Tensor, sizes: Sizes, locations_BNKLP2: Tensor, weights_BNKLP: Tensor) -> Tensor:
    """`m2f.deformable_attention.sample_and_sum`, (B, N, C)."""
    return _Attention.apply(value_BSKD, sizes, locations_BNKLP2, weights_BNKLP)


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
    _call("uncertain", *tensors, rows, height, width, candidates, certain, points, work=rows)
    return output


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, sizes: Sizes, locations: Tensor, weights: Tensor) -> Tensor:
        value, locations, weights = value.contiguous(), locations.contiguous(), weights.contiguous()
        B, S, K, D = value.shape
        _, N, _, L, P, _ = locations.shape
        levels = torch.tensor(sizes, dtype=torch.int64)
        output = value.new_empty(B, N, K * D)
        _call("deformable_forward", value, levels, locations, weights, output, S, N, K, L, P, D, work=B * N)
        ctx.save_for_backward(value, levels, locations, weights)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        value, levels, locations, weights = ctx.saved_tensors
        B, S, K, D = value.shape
        _, N, _, L, P, _ = locations.shape
        to_value, to_locations, to_weights = (
            torch.zeros_like(value),
            torch.empty_like(locations),
            torch.empty_like(weights),
        )
        tensors = (value, levels, locations, weights, gradient.contiguous(), to_value, to_locations, to_weights)
        _call("deformable_backward", *tensors, S, N, K, L, P, D, work=B * K)
        return to_value, None, to_locations, to_weights


@cache
def _threads(count: int, process: int) -> ThreadPoolExecutor:
    """Threads beside the caller's. A forked process has none of its parent's."""
    return ThreadPoolExecutor(count, thread_name_prefix="m2f-kernel")


def _call(name: str, *arguments: Tensor | int, work: int) -> None:
    """Call a loop for the parts [0, work) of its work, shared over as many threads as PyTorch uses."""
    library = loops()
    assert library is not None
    function = getattr(library, name)
    values = [
        ctypes.c_void_p(argument.data_ptr()) if isinstance(argument, Tensor) else ctypes.c_int64(argument)
        for argument in arguments
    ]

    def part(number: int, parts: int) -> None:
        begin, end = (ctypes.c_int64(work * n // parts) for n in (number, number + 1))
        function(*values, begin, end)  # releases the interpreter's lock

    parts = max(1, min(torch.get_num_threads(), work))
    others = [_threads(parts - 1, os.getpid()).submit(part, number, parts) for number in range(1, parts)]
    part(0, parts)
    for other in others:
        other.result()
