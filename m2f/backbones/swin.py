"""Swin Transformers (arXiv 2103.14030) as backbones of four levels, each with a norm of its own.

B pictures, H x W pixels of a level, C channels, K heads, D = C / K, W windows, N = window * window pixels of one
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2f.config import BackboneConfig
from m2f.draws import mix, uniform

_STREAM = 201
"""Tells drop path's draws from other uses of a picture's seed."""


@dataclass(frozen=True)
class SwinSize:
    """What tells the published Swins apart."""

    channels: int
    depths: tuple[int, int, int, int]
    heads: tuple[int, int, int, int]
    window: int


SWINS = {
    "swin-t": SwinSize(96, (2, 2, 6, 2), (3, 6, 12, 24), 7),
    "swin-s": SwinSize(96, (2, 2, 18, 2), (3, 6, 12, 24), 7),
    "swin-b": SwinSize(128, (2, 2, 18, 2), (4, 8, 16, 32), 12),
    "swin-l": SwinSize(192, (2, 2, 18, 2), (6, 12, 24, 48), 12),
    "swin-tiny": SwinSize(32, (2, 2, 2, 2), (1, 2, 4, 8), 4),  # ours: laptop size
}


def drop_path(branch: Tensor, rate: float, seeds: Sequence[int] | None, stream: int) -> Tensor:
    """A residual branch, (B, ...), left out for some pictures and scaled up by 1 / (1 - rate) for the others.

    Which pictures is a function of their seeds alone, not of the batch or the worker.
    """
    if rate == 0.0:
        return branch
    if seeds is None:
        raise ValueError("training with drop path needs one seed per picture: model(images, seeds=...)")
    kept = uniform([mix(seed, _STREAM) for seed in seeds], stream, 1, branch.device) >= rate
    scale = kept.to(branch.dtype) / (1 - rate)
    return branch * scale.view(-1, *[1] * (branch.dim() - 1))


class WindowAttention(nn.Module):
    """Multi-head attention inside windows, with a learned bias for every relative position."""

    relative_index: Tensor

    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.relative_bias = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_bias, std=0.02)
        y, x = torch.arange(window).repeat_interleave(window), torch.arange(window).repeat(window)
        dy, dx = (p[:, None] - p[None] + window - 1 for p in (y, x))
        self.register_buffer("relative_index", dy * (2 * window - 1) + dx, persistent=False)

    def forward(self, x_BWNC: Tensor, mask_WNN: Tensor | None) -> Tensor:
        """(B, W, N, C); `mask_WNN` is 0 where two pixels of a window may see each other, very negative elsewhere."""
        B, W, N, C = x_BWNC.shape
        K = self.heads
        bias_1KNN = self.relative_bias[self.relative_index].permute(2, 0, 1)[None]
        qkv = self.qkv(x_BWNC).view(B, W, N, 3, K, C // K).permute(3, 0, 1, 4, 2, 5)
        if mask_WNN is None:  # one bias for all windows
            bias = bias_1KNN
            query, key, value = qkv.flatten(1, 2)
        else:  # windows and heads share an axis, so that one bias serves all pictures of the batch
            bias = (bias_1KNN + mask_WNN[:, None]).reshape(1, W * K, N, N)
            query, key, value = qkv.flatten(2, 3)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
        return self.proj(mixed.view(B, W, K, N, C // K).transpose(2, 3).reshape(B, W, N, C))


class SwinBlock(nn.Module):
    """Window attention, shifted by half a window in every second block, and a feed-forward part."""

    def __init__(self, channels: int, heads: int, window: int, *, shifted: bool, drop_rate: float, stream: int) -> None:
        super().__init__()
        self.window, self.shift = window, window // 2 if shifted else 0
        self.drop_rate, self.stream = drop_rate, stream
        self.norm1 = nn.LayerNorm(channels)
        self.attention = WindowAttention(channels, heads, window)
        self.norm2 = nn.LayerNorm(channels)
        self.feedforward = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )

    def forward(self, x_BHWC: Tensor, shift_mask_WNN: Tensor, seeds: Sequence[int] | None) -> Tensor:
        rate = self.drop_rate if self.training else 0.0
        x_BHWC = x_BHWC + drop_path(self._attend(self.norm1(x_BHWC), shift_mask_WNN), rate, seeds, self.stream)
        return x_BHWC + drop_path(self.feedforward(self.norm2(x_BHWC)), rate, seeds, self.stream + 1)

    def _attend(self, x_BHWC: Tensor, shift_mask_WNN: Tensor) -> Tensor:
        B, H, W, C = x_BHWC.shape
        w, s = self.window, self.shift
        x = F.pad(x_BHWC, (0, 0, 0, -W % w, 0, -H % w))
        rows, columns = x.shape[1] // w, x.shape[2] // w
        if s:
            x = x.roll((-s, -s), dims=(1, 2))
        x = x.view(B, rows, w, columns, w, C).transpose(2, 3).reshape(B, rows * columns, w * w, C)
        x = self.attention(x, shift_mask_WNN if s else None)
        x = x.view(B, rows, columns, w, w, C).transpose(2, 3).reshape(B, rows * w, columns * w, C)
        if s:
            x = x.roll((s, s), dims=(1, 2))
        return x[:, :H, :W]


class PatchMerging(nn.Module):
    """2 x 2 neighbours to one pixel of twice the channels; the neighbours come channel first, as in the reference.

    An odd map gets a row or column of zeros.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        B, H, W, C = x_BHWC.shape
        x = F.pad(x_BHWC, (0, 0, 0, W % 2, 0, H % 2))
        x = x.view(B, (H + 1) // 2, 2, (W + 1) // 2, 2, C).permute(0, 1, 3, 5, 2, 4)
        return self.reduction(self.norm(x.flatten(3)))


class PatchEmbedding(nn.Module):
    """4 x 4 pixels to one vector, normalised."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, channels, 4, stride=4)
        self.norm = nn.LayerNorm(channels)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, ceil(H / 4), ceil(W / 4), C); zeros right and below fill the last patches."""
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % 4, 0, -height % 4))
        return self.norm(self.projection(images).permute(0, 2, 3, 1))


class Swin(nn.Module):
    """Feature maps at strides 4, 8, 16 and 32.

    Drop path rises linearly over the blocks from 0 to `drop_path_rate`, and is off in evaluation mode.
    """

    def __init__(self, size: SwinSize, *, drop_path_rate: float) -> None:
        super().__init__()
        self.window = size.window
        self.channels = tuple(size.channels * 2**i for i in range(4))
        self.patch_embedding = PatchEmbedding(size.channels)
        blocks = sum(size.depths)
        rates = [drop_path_rate * i / (blocks - 1) for i in range(blocks)]
        self.stages = nn.ModuleList()
        self.merges = nn.ModuleList(PatchMerging(channels) for channels in self.channels[:-1])
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in self.channels)
        first = 0
        for depth, channels, heads in zip(size.depths, self.channels, size.heads, strict=True):
            self.stages.append(
                nn.ModuleList(
                    SwinBlock(
                        channels,
                        heads,
                        size.window,
                        shifted=i % 2 == 1,
                        drop_rate=rates[first + i],
                        stream=2 * (first + i),
                    )
                    for i in range(depth)
                )
            )
            first += depth
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor, seeds: Sequence[int] | None = None) -> tuple[Tensor, ...]:
        x_BHWC = self.patch_embedding(images)
        maps = []
        for i, (blocks, norm) in enumerate(zip(self.stages, self.norms, strict=True)):
            mask_WNN = shift_mask(x_BHWC.shape[1], x_BHWC.shape[2], self.window, x_BHWC.device)
            for block in blocks:  # type: ignore[attr-defined]
                x_BHWC = block(x_BHWC, mask_WNN, seeds)
            maps.append(norm(x_BHWC).permute(0, 3, 1, 2).contiguous())
            if i < len(self.merges):
                x_BHWC = self.merges[i](x_BHWC)
        return tuple(maps)


def shift_mask(height: int, width: int, window: int, device: torch.device) -> Tensor:
    """What shifted windows add to the attention, (W, N, N): -100 between pixels that only the wrap brought together."""
    shift = window // 2

    def regions(length: int) -> Tensor:  # 0: before the last window, 1: its unshifted part, 2: what wrapped around
        position = torch.arange(length + -length % window, device=device)
        last = len(position)
        return (position >= last - window).int() + (position >= last - shift).int()

    region = regions(height)[:, None] * 3 + regions(width)[None]
    rows, columns = region.shape[0] // window, region.shape[1] // window
    region_WN = region.view(rows, window, columns, window).transpose(1, 2).reshape(rows * columns, -1)
    return (region_WN[:, :, None] != region_WN[:, None]).float() * -100.0


def build_swin(config: BackboneConfig) -> Swin:
    """One of SWINS."""
    return Swin(SWINS[config.name], drop_path_rate=config.drop_path_rate)
