"""Pixel decoder (paper, sec. 3.2.2 and 4.1): deformable attention over strides 32, 16, 8, then stride 4.

B pictures, C channels, S = sum of the three levels' pixels
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2f.config import PixelDecoderConfig
from m2f.deformable_attention import DeformableAttention, Shapes
from m2f.layers import FeedForward, sine_positions, xavier_normal_matrices
from m2f.recompute import cheap, checkpointed

LEVELS = 3
"""Levels with attention: strides 32, 16 and 8, in this order everywhere."""

_NORM_GROUPS = 32


class Projection(nn.Module):
    """Convolution, group norm, and a ReLU if wanted."""

    def __init__(self, channels_in: int, channels: int, *, kernel: int = 1, bias: bool, relu: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, kernel, padding=kernel // 2, bias=bias)
        self.norm = nn.GroupNorm(_NORM_GROUPS, channels)
        self.relu = relu
        if bias:  # the reference's two ways to start
            nn.init.xavier_uniform_(self.conv.weight)
            nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]
        else:
            nn.init.kaiming_uniform_(self.conv.weight, a=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return cheap(lambda x: F.relu(self.norm(x), inplace=True), x) if self.relu else self.norm(x)


class EncoderLayer(nn.Module):
    """Deformable self-attention over all levels and a feed-forward part, each normalised after its residual."""

    def __init__(self, config: PixelDecoderConfig) -> None:
        super().__init__()
        self.attention = DeformableAttention(config.channels, heads=config.heads, levels=LEVELS, points=config.points)
        self.norm1 = nn.LayerNorm(config.channels)
        self.feedforward = FeedForward(config.channels, config.feedforward)
        self.norm2 = nn.LayerNorm(config.channels)

    def forward(self, x_BSC: Tensor, encoding_SC: Tensor, positions_S2: Tensor, shapes: Shapes) -> Tensor:
        query_BSC = cheap(torch.add, x_BSC, encoding_SC)
        x_BSC = cheap(self.norm1, x_BSC + self.attention(query_BSC, x_BSC, positions_S2, shapes))
        return cheap(self.norm2, x_BSC + self.feedforward(x_BSC))


class PixelDecoder(nn.Module):
    """Backbone maps of strides 4, 8, 16, 32 -> mask features at stride 4 and three maps for the queries."""

    def __init__(self, config: PixelDecoderConfig, backbone_channels: Sequence[int]) -> None:
        super().__init__()
        self.checkpointing = False
        C = config.channels
        if C % _NORM_GROUPS:
            raise ValueError(f"model.pixel_decoder.channels is {C}; it must be a multiple of {_NORM_GROUPS}")
        stride4, *deeper = backbone_channels
        self.input_projections = nn.ModuleList(Projection(c, C, bias=True) for c in reversed(deeper))
        self.level_encoding = nn.Embedding(LEVELS, C)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))
        self.lateral = Projection(stride4, C, bias=False)
        self.output = Projection(C, C, kernel=3, bias=False, relu=True)
        self.mask_features = nn.Conv2d(C, C, 1)
        nn.init.kaiming_uniform_(self.mask_features.weight, a=1)
        nn.init.zeros_(self.mask_features.bias)  # type: ignore[arg-type]
        xavier_normal_matrices(self.layers)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.reset_parameters()

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Mask features (B, C, h, w) of stride 4 and the maps of strides 32, 16, 8, each (B, C, h, w)."""
        stride4, *deeper = features
        maps = [project(x) for project, x in zip(self.input_projections, reversed(deeper), strict=True)]
        shapes: Shapes = tuple((x.shape[2], x.shape[3]) for x in maps)
        device, C = maps[0].device, maps[0].shape[1]
        encoding_SC = torch.cat(
            [
                sine_positions(h, w, C, device) + level
                for (h, w), level in zip(shapes, self.level_encoding.weight, strict=True)
            ]
        )
        positions_S2 = torch.cat([_pixel_centres(h, w, device) for h, w in shapes])
        x_BSC = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)
        for layer in self.layers:
            given = x_BSC, encoding_SC, positions_S2, shapes
            x_BSC = checkpointed(layer, *given) if self.checkpointing and self.training else layer(*given)
        parts = x_BSC.split([h * w for h, w in shapes], dim=1)
        levels = tuple(part.transpose(1, 2).unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True))
        # contiguous, or all maps from here on have their channels last, and each resizing copies them
        finest = F.interpolate(levels[-1].contiguous(), size=stride4.shape[2:], mode="bilinear", align_corners=False)
        return self.mask_features(self.output(self.lateral(stride4) + finest)), levels


def _pixel_centres(height: int, width: int, device: torch.device) -> Tensor:
    """Normalised (x, y) of every pixel's centre, row by row, (height * width, 2)."""
    y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
    x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
    return torch.stack((x.expand(height, width), y[:, None].expand(height, width)), dim=2).flatten(0, 1)
