"""Swin Transformers (arXiv 2103.14030) as backbones of four levels, each with a norm of its own.

B pictures, H x W pixels of a level, C channels, K heads, D = C / K, W windows, N = window * window pixels of one,
R residual branches (two per block)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from m2f.config import BackboneConfig
from m2f.draws import mix, uniform_of, words_of
from m2f.layers import FeedForward, Linear
from m2f.recompute import cheap, checkpointed

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


def drop_path_scales(rate_R: Tensor, seeds: Sequence[int]) -> Tensor:
    """What R residual branches of every picture are multiplied by, (R, B) float32: 0, or 1 / (1 - rate).

    Which pictures lose branch r is a function of their seeds and r alone, not of the batch or the worker.
    """
    branches = range(len(rate_R))
    words = words_of([mix(mix(seed, _STREAM), branch) for branch in branches for seed in seeds], rate_R.device)
    rate_R1 = rate_R.unsqueeze(1)
    kept_RB = uniform_of(words, 1).view(len(rate_R), len(seeds)) >= rate_R1
    return kept_RB.float() / (1 - rate_R1)


def scaled(branch: Tensor, scale_B: Tensor | None) -> Tensor:
    """A residual branch, (B, ...), times its pictures' scales; None: 1."""
    if scale_B is None:
        return branch
    return branch * scale_B.to(branch.dtype).view(-1, *[1] * (branch.dim() - 1))


def relative_position_bias(table: Tensor, window: int) -> Tensor:
    """The bias between any two pixels of a window, (K, N, N), from that of every offset, ((2 * window - 1)^2, K).

    The offset (dy, dx), from -(window - 1) on, has row (dy + window - 1) * (2 * window - 1) + dx + window - 1. The
    windows that slide over the table hold all offsets in reverse; indexing it gives the same, with a slower gradient
    that sorts on a GPU.
    """
    side = 2 * window - 1
    slid_Kyxvu = table.T.reshape(-1, side, side).unfold(1, window, 1).unfold(2, window, 1)
    return slid_Kyxvu.flip(3, 4).reshape(-1, window * window, window * window)


def _attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """`F.scaled_dot_product_attention` with a bias that learns: PyTorch has no kernel for that on a CPU, and its
    general form keeps each product and copies query and key."""
    result: Tensor = _BiasedAttention.apply(query, key, value, bias)
    return result


class _BiasedAttention(torch.autograd.Function):
    """Keeps its inputs and its output; the backward pass makes the probabilities again.

    Shapes: query, key and value (B, K, N, D); bias (1, K, N, N).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(query, key, value, bias)
        ctx.save_for_backward(query, key, value, bias, mixed)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        query, key, value, bias, mixed = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        share = (query @ key.mT).mul_(scale).add_(bias).softmax(-1)
        to_value = share.mT @ gradient
        to_score = (gradient @ value.mT).sub_((gradient * mixed).sum(-1, keepdim=True)).mul_(share)
        to_bias = to_score.sum(0, keepdim=True)
        to_score.mul_(scale)
        return to_score @ key, to_score.mT @ query, to_value, to_bias


def windows(side: int, window: int) -> int:
    """How many windows cover a side."""
    return (side + window - 1) // window


class WindowAttention(nn.Module):
    """Multi-head attention inside windows, with a learned bias for every relative position."""

    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv = Linear(channels, 3 * channels)
        self.proj = Linear(channels, channels)
        self.relative_bias = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_bias, std=0.02)

    def forward(self, x_BWNC: Tensor, mask_WNN: Tensor | None) -> Tensor:
        """(B, W, N, C); `mask_WNN` is 0 where two pixels of a window may see each other, very negative elsewhere."""
        B, W, N, C = x_BWNC.shape
        K = self.heads
        bias_1KNN = relative_position_bias(self.relative_bias, self.window)[None]
        qkv = self.qkv(x_BWNC).view(B, W, N, 3, K, C // K).permute(3, 0, 1, 4, 2, 5)
        if mask_WNN is None:  # one bias for all windows
            bias = bias_1KNN
            query, key, value = qkv.flatten(1, 2)
        else:  # windows and heads share an axis, so that one bias serves all pictures of the batch
            bias = (bias_1KNN + mask_WNN[:, None]).reshape(1, W * K, N, N)
            query, key, value = qkv.flatten(2, 3)
        attend = _attention if query.device.type == "cpu" else F.scaled_dot_product_attention
        mixed = attend(query, key, value, bias.to(query.dtype))
        return self.proj(mixed.view(B, W, K, N, C // K).transpose(2, 3).reshape(B, W, N, C))


class SwinBlock(nn.Module):
    """Window attention, shifted by half a window in every second block, and a feed-forward part."""

    def __init__(self, channels: int, heads: int, window: int, *, shifted: bool) -> None:
        super().__init__()
        self.window, self.shift = window, window // 2 if shifted else 0
        self.norm1 = nn.LayerNorm(channels)
        self.attention = WindowAttention(channels, heads, window)
        self.norm2 = nn.LayerNorm(channels)
        self.feedforward = FeedForward(channels, 4 * channels, gelu=True)

    def forward(self, x_BHWC: Tensor, shift_mask_WNN: Tensor, scales_2B: Sequence[Tensor | None]) -> Tensor:
        """`scales_2B`: of the two residual branches, see `scaled`."""
        x_BWNC = self.attention(cheap(self._windows, x_BHWC), shift_mask_WNN if self.shift else None)
        x_BHWC = x_BHWC + scaled(self._map(x_BWNC, x_BHWC.shape), scales_2B[0])
        return x_BHWC + scaled(self.feedforward(cheap(self.norm2, x_BHWC)), scales_2B[1])

    def _windows(self, x_BHWC: Tensor) -> Tensor:
        """The normalised map, padded, shifted and cut into windows, (B, W, N, C)."""
        (B, H, W, C), w, s = x_BHWC.shape, self.window, self.shift
        rows, columns = windows(H, w), windows(W, w)
        x = F.pad(self.norm1(x_BHWC), (0, 0, 0, columns * w - W, 0, rows * w - H))
        if s:
            x = x.roll((-s, -s), dims=(1, 2))
        return x.view(B, rows, w, columns, w, C).transpose(2, 3).reshape(B, rows * columns, w * w, C)

    def _map(self, x_BWNC: Tensor, shape: torch.Size) -> Tensor:
        """The way back: windows to a map of the shape (B, H, W, C)."""
        (B, H, W, C), w, s = shape, self.window, self.shift
        rows, columns = windows(H, w), windows(W, w)
        x = x_BWNC.view(B, rows, columns, w, w, C).transpose(2, 3).reshape(B, rows * w, columns * w, C)
        if s:
            x = x.roll((s, s), dims=(1, 2))
        return x.narrow(1, 0, H).narrow(2, 0, W)  # sizes that torch.export knows, unlike a slice's


class PatchMerging(nn.Module):
    """2 x 2 neighbours to one pixel of twice the channels; the neighbours come channel first, as in the reference.

    An odd map gets a row or column of zeros.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return self.reduction(cheap(self.norm, cheap(self._neighbours, x_BHWC)))

    @staticmethod
    def _neighbours(x_BHWC: Tensor) -> Tensor:
        B, H, W, C = x_BHWC.shape
        x = F.pad(x_BHWC, (0, 0, 0, W % 2, 0, H % 2))
        x = x.view(B, (H + 1) // 2, 2, (W + 1) // 2, 2, C).permute(0, 1, 3, 5, 2, 4)
        return x.flatten(3)


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

    drop_rate_R: Tensor

    def __init__(self, size: SwinSize, *, drop_path_rate: float) -> None:
        super().__init__()
        self.window = size.window
        self.channels = tuple(size.channels * 2**i for i in range(4))
        self.patch_embedding = PatchEmbedding(size.channels)
        self.blocks = blocks = sum(size.depths)
        self.drop_path_rate = drop_path_rate
        self.checkpointing = False
        drop_rate_R = torch.tensor([drop_path_rate * i / (blocks - 1) for i in range(blocks) for _ in range(2)])
        self.register_buffer("drop_rate_R", drop_rate_R, persistent=False)
        self.stages = nn.ModuleList()
        self.merges = nn.ModuleList(PatchMerging(channels) for channels in self.channels[:-1])
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in self.channels)
        for depth, channels, heads in zip(size.depths, self.channels, size.heads, strict=True):
            self.stages.append(
                nn.ModuleList(SwinBlock(channels, heads, size.window, shifted=i % 2 == 1) for i in range(depth))
            )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor, seeds: Sequence[int] | None = None) -> tuple[Tensor, ...]:
        return self.maps(images, self.scales(seeds))

    def scales(self, seeds: Sequence[int] | None) -> Tensor | None:
        """Drop path's scales of all residual branches, (R, B); None where nothing is dropped."""
        if not self.training or self.drop_path_rate == 0.0:
            return None
        if seeds is None:
            raise ValueError("training with drop path needs one seed per image: model(images, seeds=...)")
        return drop_path_scales(self.drop_rate_R, seeds)

    def maps(self, images: Tensor, scales_RB: Tensor | None) -> tuple[Tensor, ...]:
        """`forward` with the seeds as a tensor: compiled code does not depend on their values."""
        x_BHWC = self.patch_embedding(images)
        # the first block drops nothing
        scales: list[Tensor | None] = [None] * (2 * self.blocks)
        if scales_RB is not None:
            scales[2:] = scales_RB.unbind()[2:]
        maps = []
        first = 0
        for i, (blocks, norm) in enumerate(zip(self.stages, self.norms, strict=True)):
            mask_WNN = shift_mask(x_BHWC.shape[1], x_BHWC.shape[2], self.window, x_BHWC.device)
            for block in blocks:  # type: ignore[attr-defined]
                given = x_BHWC, mask_WNN, scales[first : first + 2]
                x_BHWC = checkpointed(block, *given) if self.checkpointing and self.training else block(*given)
                first += 2
            maps.append(norm(x_BHWC).permute(0, 3, 1, 2).contiguous())
            if i < len(self.merges):
                x_BHWC = self.merges[i](x_BHWC)
        return tuple(maps)


def shift_mask(height: int, width: int, window: int, device: torch.device) -> Tensor:
    """What shifted windows add to the attention, (W, N, N): -100 between pixels that only the wrap brought together."""
    shift = window // 2
    rows, columns = windows(height, window), windows(width, window)

    def regions(last: int) -> Tensor:  # 0: before the last window, 1: its unshifted part, 2: what wrapped around
        position = torch.arange(last, device=device)
        return (position >= last - window).int() + (position >= last - shift).int()

    region = regions(rows * window)[:, None] * 3 + regions(columns * window)[None]
    region_WN = region.view(rows, window, columns, window).transpose(1, 2).reshape(rows * columns, -1)
    return (region_WN[:, :, None] != region_WN[:, None]).float() * -100.0


def build_swin(config: BackboneConfig) -> Swin:
    """One of SWINS."""
    return Swin(SWINS[config.name], drop_path_rate=config.drop_path_rate)
