"""Parts shared by the two decoders.

B pictures, N queries, M keys, C channels, K heads, H hidden channels
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from m2f.kernels import gpu
from m2f.recompute import cheap


class Linear(nn.Linear):
    """`nn.Linear` that on a CPU adds its bias to the product in place.

    PyTorch's own first writes the bias to every row of the result, one more pass over memory.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None or not _plain_floats(x):
            return super().forward(x)
        return (x @ self.weight.T).add_(self.bias)


def _plain_floats(x: Tensor) -> bool:
    """Whether to take a form for a CPU; autocast and compiling know PyTorch's own operations better."""
    return x.device.type == "cpu" and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()


class Attention(nn.Module):
    """Multi-head attention with packed projections, initialised and named as `nn.MultiheadAttention`.

    Calls `scaled_dot_product_attention`; a boolean mask is broadcast over the heads, never repeated.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels cannot be split over {heads} attention heads")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query_BNC: Tensor,
        key_BMC: Tensor,
        value_BMC: Tensor,
        allowed: Tensor | gpu.MaskWords | None = None,
    ) -> Tensor:
        """(B, N, C). `allowed`: (B, N, M) bool, True where query n may look at key m, or the same as `MaskWords`."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        query, key, value = (
            F.linear(x, w, b) for x, w, b in zip((query_BNC, key_BMC, value_BMC), weights, biases, strict=True)
        )
        if isinstance(allowed, gpu.MaskWords):
            return self.out_proj(gpu.masked_attention(query, key, value, allowed, self.heads))
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, key, value))
        mask = None if allowed is None else allowed[:, None]
        mixed_BKND = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out_proj(mixed_BKND.transpose(1, 2).flatten(2))


class FeedForward(nn.Sequential):
    """Linear, ReLU or GELU, linear; on a CPU `_ROWS_AT_ONCE` rows at a time: what is between stays in its cache.

    What is between is the largest tensor of a layer; of more rows it is not kept: the backward pass makes it again.
    """

    def __init__(self, channels: int, hidden: int, *, gelu: bool = False) -> None:
        activation = nn.GELU() if gelu else nn.ReLU(inplace=True)
        super().__init__(Linear(channels, hidden), activation, Linear(hidden, channels))
        self._gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        widen, activation, narrow = self
        if _plain_floats(x) and x.shape[:-1].numel() > _ROWS_AT_ONCE:
            weights = widen.weight, widen.bias, narrow.weight, narrow.bias
            result: Tensor = _FeedForward.apply(x.flatten(0, -2), *weights, self._gelu)
            return result.view_as(x)
        hidden = widen(x)
        result = narrow(cheap(activation, hidden) if self._gelu else activation(hidden))
        return result


_ROWS_AT_ONCE = 2048
"""Their hidden channels fit into a processor's cache. Fewer rows are neither cut nor made again: that costs time,
and they take little memory."""


class _FeedForward(torch.autograd.Function):
    """Shapes: x (N, C), weights (H, C), (H,), (C, H), (C,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, gelu: bool) -> Tensor:
        result = torch.empty_like(x)
        for rows, into in zip(x.split(_ROWS_AT_ONCE), result.split(_ROWS_AT_ONCE), strict=True):
            widened = (rows @ w1.T).add_(b1)
            torch.mm(F.gelu(widened) if gelu else widened.relu_(), w2.T, out=into).add_(b2)
        ctx.save_for_backward(x, w1, b1, w2)
        ctx.gelu = gelu
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, b1, w2 = ctx.saved_tensors
        to_x, to_w1, to_b1, to_w2 = torch.empty_like(x), *(torch.zeros_like(t) for t in (w1, b1, w2))
        parts = (t.split(_ROWS_AT_ONCE) for t in (x, gradient, to_x))
        for rows, given, into in zip(*parts, strict=True):
            widened = (rows @ w1.T).add_(b1)
            activated = F.gelu(widened) if ctx.gelu else widened.relu_()
            to_w2.addmm_(given.T, activated)
            to_widened = given @ w2
            if ctx.gelu:
                to_widened = torch.ops.aten.gelu_backward(to_widened, widened)
            else:
                to_widened = torch.ops.aten.threshold_backward(to_widened, activated, 0)
            to_w1.addmm_(to_widened.T, rows)
            to_b1 += to_widened.sum(0)
            torch.mm(to_widened, w1, out=into)
        return to_x, to_w1, to_b1, to_w2, gradient.sum(0), None


def sine_positions(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """Sine position encoding of a map, (height * width, channels) float32, row by row.

    The first half of the channels encodes the row, the second the column: positions 1..n scaled to
    2 pi, temperature 10,000, sine and cosine interleaved (DETR's encoding, as the reference sets it).
    """
    frequencies = channels // 2
    exponent = torch.arange(frequencies, device=device, dtype=torch.float32) // 2 * 2 / frequencies

    def encode(count: int) -> Tensor:
        position = torch.arange(1, count + 1, device=device, dtype=torch.float32) / (count + 1e-6) * (2 * math.pi)
        angle = position[:, None] / 10_000**exponent
        return torch.stack((angle[:, 0::2].sin(), angle[:, 1::2].cos()), dim=2).flatten(1)

    rows, columns = encode(height), encode(width)
    grid = torch.cat((rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)), dim=2)
    return grid.flatten(0, 1)


def xavier_normal_matrices(module: nn.Module) -> None:
    """Xavier normal for every parameter with more than one axis: the reference's start of both decoders."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_normal_(parameter)
