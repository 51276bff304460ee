"""Parts shared by the two decoders.

B pictures, N queries, M keys, C channels, K heads
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        self, query_BNC: Tensor, key_BMC: Tensor, value_BMC: Tensor, allowed_BNM: Tensor | None = None
    ) -> Tensor:
        """(B, N, C); `allowed_BNM` is True where query n may look at key m."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        query, key, value = (
            F.linear(x, w, b).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x, w, b in zip((query_BNC, key_BMC, value_BMC), weights, biases, strict=True)
        )
        mask = None if allowed_BNM is None else allowed_BNM[:, None]
        mixed_BKND = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out_proj(mixed_BKND.transpose(1, 2).flatten(2))


def feedforward(channels: int, hidden: int) -> nn.Sequential:
    """Linear, ReLU, linear."""
    return nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, channels))


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
