"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, eq. 3).

B pictures, N queries, S = sum of all levels' pixels, C channels, K heads, D = C / K, L levels, P points
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from m2f.constants import constant
from m2f.deterministic_sampling import grid_sample
from m2f.kernels import cpu, gpu
from m2f.layers import Linear

Shapes = tuple[tuple[int, int], ...]
"""(height, width) of every level."""


def attend(
    value_BSKD: Tensor, shapes: Shapes, positions_N2: Tensor, offsets_BNKLP2: Tensor, logits_BNKLP: Tensor
) -> Tensor:
    """What every query gets from all levels, (B, N, C): `sample_and_sum` at its normalised (x, y) plus the offsets.

    Offsets are in pixels of their level; the logits' softmax over levels and points are the weights.
    """
    if gpu.takes(value_BSKD):
        positions, offsets, logits = (t.float() for t in (positions_N2, offsets_BNKLP2, logits_BNKLP))
        return gpu.deformable_attention(value_BSKD, shapes, positions, offsets, logits)
    # never in less than the positions' float32: bf16 would move a location by up to a quarter of a pixel
    dtype = torch.promote_types(value_BSKD.dtype, positions_N2.dtype)
    value, positions, offsets, logits = (t.to(dtype) for t in (value_BSKD, positions_N2, offsets_BNKLP2, logits_BNKLP))
    fits = value.shape[3] <= cpu.MOST_CHANNELS and logits.shape[3:].numel() <= cpu.MOST_POINTS
    form = cpu.deformable_attention if fits and cpu.takes(value, positions, offsets, logits) else plain_attend
    return form(value, shapes, positions, offsets, logits)


def plain_attend(
    value_BSKD: Tensor, shapes: Shapes, positions_N2: Tensor, offsets_BNKLP2: Tensor, logits_BNKLP: Tensor
) -> Tensor:
    """`attend` by PyTorch's own operations: the definition that faster ones are compared with."""
    sizes_L2 = constant(tuple((w, h) for h, w in shapes), positions_N2, positions_N2.dtype)
    locations_BNKLP2 = positions_N2[None, :, None, None, None] + offsets_BNKLP2 / sizes_L2[:, None]
    weights_BNKLP = logits_BNKLP.flatten(3).softmax(-1).view_as(logits_BNKLP)
    return sample_and_sum(value_BSKD, shapes, locations_BNKLP2, weights_BNKLP)


def sample_and_sum(value_BSKD: Tensor, shapes: Shapes, locations_BNKLP2: Tensor, weights_BNKLP: Tensor) -> Tensor:
    """Weighted sum of bilinear samples of all levels, (B, N, C).

    Locations are normalised (x, y), 0 and 1 at the outer edges of the map; outside is zero.
    """
    B, _, K, D = value_BSKD.shape
    N = locations_BNKLP2.shape[1]
    grids = (2 * locations_BNKLP2 - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (L, B*K, N, P, 2)
    levels = value_BSKD.split([h * w for h, w in shapes], dim=1)
    sampled = [
        grid_sample(level.permute(0, 2, 3, 1).reshape(B * K, D, h, w), grid)
        for level, (h, w), grid in zip(levels, shapes, grids.unbind(0), strict=True)
    ]
    weights = weights_BNKLP.transpose(1, 2).reshape(B * K, 1, N, -1)  # levels and points, level first
    mixed = (torch.cat(sampled, dim=3) * weights).sum(dim=3)  # (B*K, D, N)
    return mixed.view(B, K * D, N).transpose(1, 2)


class DeformableAttention(nn.Module):
    """Every query looks at `points` learned offsets from its own position, on every level and head."""

    def __init__(self, channels: int, *, heads: int, levels: int, points: int) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels cannot be split over {heads} attention heads")
        self.heads, self.levels, self.points = heads, levels, points
        self.offsets = Linear(channels, heads * levels * points * 2)
        self.weights = Linear(channels, heads * levels * points)
        self.value = Linear(channels, channels)
        self.output = Linear(channels, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Offsets start as one ray per head, `points` steps long; attention starts uniform."""
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        ray = torch.stack((angle.cos(), angle.sin()), dim=1)
        ray = ray / ray.abs().amax(dim=1, keepdim=True)
        steps = torch.arange(1, self.points + 1)
        bias = ray[:, None, None] * steps[None, None, :, None]  # (K, 1, P, 2)
        with torch.no_grad():
            self.offsets.bias.copy_(bias.expand(-1, self.levels, -1, -1).reshape(-1))
        for zero in (self.offsets.weight, self.weights.weight, self.weights.bias, self.value.bias, self.output.bias):
            nn.init.zeros_(zero)
        nn.init.xavier_uniform_(self.value.weight)
        nn.init.xavier_uniform_(self.output.weight)

    def forward(self, query_BNC: Tensor, source_BSC: Tensor, positions_N2: Tensor, shapes: Shapes) -> Tensor:
        """(B, N, C). `positions_N2`: the queries' normalised (x, y); `source_BSC`: all levels, concatenated."""
        B, N, _ = query_BNC.shape
        K, L, P = self.heads, self.levels, self.points
        value = self.value(source_BSC).unflatten(-1, (K, -1))
        offsets = self.offsets(query_BNC).view(B, N, K, L, P, 2)
        logits = self.weights(query_BNC).view(B, N, K, L, P)
        return self.output(attend(value, shapes, positions_N2, offsets, logits))
