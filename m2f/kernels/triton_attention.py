"""Multi-scale deformable attention in Triton, forward and backward, without a tensor per sampled point.

B images, N queries, S = sum of all levels' pixels, K heads of D channels, L levels, P points; a program takes ROWS
queries of one head. Sums and weights are float32, whatever the values' type. Values that are not finite in positions or
offsets count as outside, as in cpu.c.

Triton's interpreter runs the same kernels on a CPU where TRITON_INTERPRET=1 was set before this module is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from m2f.constants import constant

_ROWS = 16
"""Queries of a program, in the attention: of 32, its registers would not hold the tiles."""
_GATHERED_ROWS = 16
"""Pixels of a program, where the gradient of the values is gathered."""


@triton.jit
def _softmax(logits, first, inside, POINTS: tl.constexpr, POINTS_2: tl.constexpr):
    """(ROWS, POINTS_2): weights of the points; 0 behind the last."""
    column = tl.arange(0, POINTS_2)
    known = inside[:, None] & (column < POINTS)[None, :]
    logit = tl.load(logits + first[:, None] + column[None, :], mask=known, other=-float("inf")).to(tl.float32)
    logit = tl.where(inside[:, None], logit, 0.0)  # a row of no query: nothing that is not finite
    power = tl.exp(logit - tl.max(logit, axis=1)[:, None])
    return power / tl.sum(power, axis=1)[:, None]


@triton.jit
def _column(tile, index, COLUMNS: tl.constexpr):
    """(ROWS,): one column of a tile."""
    return tl.sum(tl.where((tl.arange(0, COLUMNS) == index)[None, :], tile, 0.0), axis=1)


@triton.jit
def _point(positions, offsets, query, place, h, w, inside):
    """Column and row of the pixel above and to the left of each query's point, its distance from it, and whether any
    pixel is near."""
    x = tl.load(positions + 2 * query, mask=inside, other=0.0) * w - 0.5
    y = tl.load(positions + 2 * query + 1, mask=inside, other=0.0) * h - 0.5
    x += tl.load(offsets + 2 * place, mask=inside, other=0.0)
    y += tl.load(offsets + 2 * place + 1, mask=inside, other=0.0)
    near = inside & (x > -1) & (y > -1) & (x < w) & (y < h)
    x, y = tl.where(near, x, 0.0), tl.where(near, y, 0.0)
    left, top = tl.floor(x), tl.floor(y)
    return left.to(tl.int32), top.to(tl.int32), x - left, y - top, near


@triton.jit
def _corner(column, row, x, y, near, h, w, RIGHT: tl.constexpr, DOWN: tl.constexpr):
    """Of the four pixels around a point: its place in the level, whether it lies in it, and its share by columns and
    by rows."""
    column, row = column + RIGHT, row + DOWN
    known = near & (column >= 0) & (column < w) & (row >= 0) & (row < h)
    return row * w + column, known, (x if RIGHT else 1 - x), (y if DOWN else 1 - y)


@triton.jit
def _forward(
    value, sizes, positions, offsets, logits, output, S, N, K, D,
    L: tl.constexpr, P: tl.constexpr, POINTS_2: tl.constexpr, D_2: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    inside = query < N
    row = (image * N + query) * K + head
    weights = _softmax(logits, row * (L * P), inside, L * P, POINTS_2)
    channel = tl.arange(0, D_2)
    value += (image * S * K + head) * D
    first = 0
    total = tl.zeros((ROWS, D_2), tl.float32)
    for level_number in range(L):
        h, w = tl.load(sizes + 2 * level_number), tl.load(sizes + 2 * level_number + 1)
        for p in range(P):
            place = row * (L * P) + (level_number * P + p)
            column, line, x, y, near = _point(positions, offsets, query, place, h, w, inside)
            weight = _column(weights, level_number * P + p, POINTS_2)
            for corner in tl.static_range(4):
                at, known, share_x, share_y = _corner(column, line, x, y, near, h, w, corner % 2, corner // 2)
                pixel = ((first + at) * (K * D))[:, None] + channel[None, :]
                seen = known[:, None] & (channel < D)[None, :]
                sample = tl.load(value + pixel, mask=seen, other=0.0).to(tl.float32)
                total += (weight * share_x * share_y)[:, None] * sample
        first += h * w
    to = output + row[:, None] * D + channel[None, :]
    tl.store(to, total.to(output.dtype.element_ty), mask=inside[:, None] & (channel < D)[None, :])


@triton.jit
def _backward(
    value, sizes, positions, offsets, logits, gradient, to_value, to_offsets, to_logits, targets, shares, S, N, K, D,
    L: tl.constexpr, P: tl.constexpr, POINTS_2: tl.constexpr, D_2: tl.constexpr, ROWS: tl.constexpr,
    GATHERED: tl.constexpr,
):  # fmt: skip
    """Gradients of offsets and logits, and either that of the values, added by atomics, or what `_gather` is to add:
    the row of every contribution among all images' pixels and heads, and its share of the output's gradient."""
    query = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    inside = query < N
    row = (image * N + query) * K + head
    weights = _softmax(logits, row * (L * P), inside, L * P, POINTS_2)
    channel = tl.arange(0, D_2)
    seen_all = inside[:, None] & (channel < D)[None, :]
    upstream = tl.load(gradient + row[:, None] * D + channel[None, :], mask=seen_all, other=0.0).to(tl.float32)
    points = tl.arange(0, POINTS_2)
    to_weights = tl.zeros((ROWS, POINTS_2), tl.float32)
    base = (image * S * K + head) * D
    value += base
    first = 0
    for level_number in range(L):
        h, w = tl.load(sizes + 2 * level_number), tl.load(sizes + 2 * level_number + 1)
        for p in range(P):
            place = row * (L * P) + (level_number * P + p)
            column, line, x, y, near = _point(positions, offsets, query, place, h, w, inside)
            weight = _column(weights, level_number * P + p, POINTS_2)
            to_weight = tl.zeros((ROWS,), tl.float32)
            to_x, to_y = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
            for corner in tl.static_range(4):
                at, known, share_x, share_y = _corner(column, line, x, y, near, h, w, corner % 2, corner // 2)
                pixel = ((first + at) * (K * D))[:, None] + channel[None, :]
                seen = known[:, None] & (channel < D)[None, :]
                sample = tl.load(value + pixel, mask=seen, other=0.0).to(tl.float32)
                agreement = tl.sum(sample * upstream, axis=1)
                to_weight += share_x * share_y * agreement
                to_x += (2 * (corner % 2) - 1) * share_y * agreement
                to_y += (2 * (corner // 2) - 1) * share_x * agreement
                share = weight * share_x * share_y
                if GATHERED:
                    target = (image * S + first + at) * K + head
                    tl.store(targets + place * 4 + corner, tl.where(known, target, -1), mask=inside)
                    tl.store(shares + place * 4 + corner, share, mask=inside)
                else:
                    tl.atomic_add(to_value + base + pixel, share[:, None] * upstream, mask=seen, sem="relaxed")
            this = (points == level_number * P + p)[None, :]
            to_weights += tl.where(this, to_weight[:, None], 0.0)
            tl.store(to_offsets + 2 * place, (weight * to_x).to(to_offsets.dtype.element_ty), mask=inside)
            tl.store(to_offsets + 2 * place + 1, (weight * to_y).to(to_offsets.dtype.element_ty), mask=inside)
        first += h * w
    mean = tl.sum(weights * to_weights, axis=1)
    to = to_logits + (row * (L * P))[:, None] + points[None, :]
    known_points = inside[:, None] & (points < L * P)[None, :]
    tl.store(to, (weights * (to_weights - mean[:, None])).to(to_logits.dtype.element_ty), mask=known_points)


@triton.jit
def _gather(
    gradient, order, starts, shares, to_value, count, D, CONTRIBUTIONS: tl.constexpr, D_2: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient of the values: each pixel adds its contributions in the order of their queries and points."""
    target = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = target < count
    begin = tl.load(starts + target, mask=inside, other=0)
    end = tl.load(starts + target + 1, mask=inside, other=0)
    channel = tl.arange(0, D_2)
    total = tl.zeros((ROWS, D_2), tl.float32)
    for step in range(tl.max(end - begin, axis=0)):
        has = begin + step < end
        contribution = tl.load(order + begin + step, mask=has, other=0)
        share = tl.load(shares + contribution, mask=has, other=0.0)
        row = contribution // CONTRIBUTIONS
        seen = has[:, None] & (channel < D)[None, :]
        upstream = tl.load(gradient + row[:, None] * D + channel[None, :], mask=seen, other=0.0).to(tl.float32)
        total += share[:, None] * upstream
    to = to_value + target[:, None] * D + channel[None, :]
    tl.store(to, total, mask=inside[:, None] & (channel < D)[None, :])


class Attention(torch.autograd.Function):
    """`m2f.deformable_attention.attend`, (B, N, C) of the values' type; the positions have no gradient."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, sizes: tuple[int, ...], positions: Tensor, offsets: Tensor, logits: Tensor
    ) -> Tensor:
        """`sizes`: height and width of every level."""
        value, positions, offsets, logits = (t.contiguous() for t in (value, positions, offsets, logits))
        ctx.save_for_backward(value, positions, offsets, logits)
        ctx.sizes = sizes
        return forward(value, sizes, positions, offsets, logits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        value, positions, offsets, logits = ctx.saved_tensors
        ordered = torch.are_deterministic_algorithms_enabled()
        to_value, to_offsets, to_logits = backward(
            gradient.contiguous(), value, ctx.sizes, positions, offsets, logits, ordered
        )
        return to_value, None, None, to_offsets, to_logits


@torch.library.custom_op("m2f::deformable_attention", mutates_args=())
def forward(value: Tensor, sizes: Sequence[int], positions: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    """As `Attention`, of tensors without gaps, as one operation: torch.compile and fake tensors do not look into it."""
    B, S, K, D = value.shape
    _, N, _, L, P, _ = offsets.shape
    output = value.new_empty(B, N, K * D)
    tensors = (value, constant(tuple(sizes), value, torch.int32), positions, offsets, logits, output)
    _forward[triton.cdiv(N, _ROWS), K, B](*tensors, S, N, K, D, **_shape(L, P, D))
    return output


@forward.register_fake
def _forward_shape(value: Tensor, sizes: Sequence[int], positions: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    return value.new_empty(value.shape[0], offsets.shape[1], value.shape[2] * value.shape[3])


@torch.library.custom_op("m2f::deformable_attention_backward", mutates_args=())
def backward(
    gradient: Tensor,
    value: Tensor,
    sizes: Sequence[int],
    positions: Tensor,
    offsets: Tensor,
    logits: Tensor,
    ordered: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, offsets and logits. `ordered`: the same bits in every run; it is slower, and for its time
    takes 28 bytes for each query, head, point and corner."""
    B, S, K, D = value.shape
    _, N, _, L, P, _ = offsets.shape
    to_offsets, to_logits = torch.empty_like(offsets), torch.empty_like(logits)
    to_value = torch.zeros(B, S, K, D, dtype=torch.float32, device=value.device)
    targets = shares = to_value  # unused
    if ordered:
        targets = torch.empty(logits.numel() * 4, dtype=torch.int64, device=value.device)
        shares = torch.empty(logits.numel() * 4, dtype=torch.float32, device=value.device)
    tensors = (value, constant(tuple(sizes), value, torch.int32), positions, offsets, logits, gradient)
    made = (to_value, to_offsets, to_logits, targets, shares)
    grid = (triton.cdiv(N, _ROWS), K, B)
    _backward[grid](*tensors, *made, S, N, K, D, **_shape(L, P, D), GATHERED=ordered)
    if ordered:
        count = B * S * K
        sorted_targets, order = targets.sort(stable=True)  # what lies outside comes first, as -1
        starts = torch.searchsorted(sorted_targets, torch.arange(count + 1, device=value.device))
        _gather[(triton.cdiv(count, _GATHERED_ROWS),)](
            gradient, order, starts, shares, to_value, count, D,
            CONTRIBUTIONS=L * P * 4, D_2=triton.next_power_of_2(D), ROWS=_GATHERED_ROWS,
        )  # fmt: skip
    return to_value.to(value.dtype), to_offsets, to_logits


@backward.register_fake
def _backward_shapes(
    gradient: Tensor,
    value: Tensor,
    sizes: Sequence[int],
    positions: Tensor,
    offsets: Tensor,
    logits: Tensor,
    ordered: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(value), torch.empty_like(offsets), torch.empty_like(logits)


def _shape(L: int, P: int, D: int) -> dict[str, int]:
    return {
        "L": L,
        "P": P,
        "POINTS_2": triton.next_power_of_2(L * P),
        "D_2": triton.next_power_of_2(D),
        "ROWS": _ROWS,
    }
