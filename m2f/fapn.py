"""Feature-aligned pyramid network as pixel decoder (FaPN, arXiv 2108.07058).

After the paper and its authors' public pixel decoder for MaskFormer (github.com/ShihuaHuang95/FaPN-full), whose choices
are taken where the paper is silent: group norm, bilinear upsampling, 8 groups of offsets, offsets from the lateral map
beside twice the upsampled one, and a 3 x 3 convolution for the mask features. Selection is the paper's; that decoder
defines it and leaves it out. Its alignment and output convolutions share one norm, here each has its own.

B images, C channels
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2f.config import PixelDecoderConfig
from m2f.recompute import checkpointed

_NORM_GROUPS = 32
_OFFSET_GROUPS = 8
_KERNEL = 3
_TAPS = _KERNEL * _KERNEL


class Selection(nn.Module):
    """Weighs channels by their importance in the whole map, adds them to the map, and projects (FSM, sec. 3.2)."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.importance = nn.Conv2d(channels_in, channels_in, 1, bias=False)
        self.projection = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.norm = nn.GroupNorm(_NORM_GROUPS, channels)
        for convolution in (self.importance, self.projection):
            nn.init.kaiming_uniform_(convolution.weight, a=1)

    def forward(self, x: Tensor) -> Tensor:
        importance = self.importance(x.mean((2, 3), keepdim=True)).sigmoid()
        selected: Tensor = self.norm(self.projection(x + x * importance))
        return selected


class Alignment(nn.Module):
    """Moves an upsampled map to where a finer one has its content, and adds that one (FAM, sec. 3.1).

    A modulated deformable convolution (arXiv 1811.11168), whose offsets and weights come from both maps; they begin at
    offset 0 and weight 0.5.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.difference = nn.Conv2d(2 * channels, channels, 1, bias=False)
        self.norm = nn.GroupNorm(_NORM_GROUPS, channels)
        self.offsets = nn.Conv2d(channels, _OFFSET_GROUPS * 3 * _TAPS, _KERNEL, padding=_KERNEL // 2)
        self.weight = nn.Parameter(torch.empty(channels, channels, _KERNEL, _KERNEL))
        self.bias = nn.Parameter(torch.zeros(channels))
        nn.init.kaiming_uniform_(self.difference.weight, a=1)
        bound = (channels * _TAPS) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.offsets.weight)
        nn.init.zeros_(self.offsets.bias)  # type: ignore[arg-type]

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Of `fine`'s size; both (B, C, h, w)."""
        from torchvision.ops import deform_conv2d  # here: it takes seconds to import

        upsampled = F.interpolate(coarse, size=fine.shape[2:], mode="bilinear", align_corners=False)
        where = self.offsets(self.norm(self.difference(torch.cat((fine, 2 * upsampled), dim=1))))
        offsets, weights = where.split((2 * _OFFSET_GROUPS * _TAPS, _OFFSET_GROUPS * _TAPS), dim=1)
        # in float32: bf16 would round positions; tensors without memory have no autocast
        with nullcontext() if fine.is_meta else torch.autocast(fine.device.type, enabled=False):
            aligned: Tensor = deform_conv2d(
                upsampled.float(),
                offsets.float(),
                self.weight,
                self.bias,
                padding=_KERNEL // 2,
                mask=weights.float().sigmoid(),
            )
        return fine + aligned.relu()


class Output(nn.Sequential):
    """3 x 3 convolution, group norm, ReLU."""

    def __init__(self, channels_in: int, channels: int) -> None:
        convolution = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        nn.init.kaiming_uniform_(convolution.weight, a=1)
        super().__init__(convolution, nn.GroupNorm(_NORM_GROUPS, channels), nn.ReLU())


class Step(nn.Module):
    """One level of the way down: select, align, convolve."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.selection = Selection(channels_in, channels)
        self.alignment = Alignment(channels)
        self.output = Output(channels, channels)

    def forward(self, x: Tensor, coarse: Tensor) -> Tensor:
        finer: Tensor = self.output(self.alignment(self.selection(x), coarse))
        return finer


class FeatureAlignedPyramid(nn.Module):
    """Backbone maps of strides 4, 8, 16, 32 -> mask features at stride 4 and three maps for the queries."""

    def __init__(self, config: PixelDecoderConfig, backbone_channels: Sequence[int]) -> None:
        super().__init__()
        C = config.channels
        if C % _NORM_GROUPS:
            raise ValueError(f"model.pixel_decoder.channels is {C}; it must be a multiple of {_NORM_GROUPS}")
        self.checkpointing = False
        *finer, coarsest = backbone_channels
        self.top = Output(coarsest, C)
        self.steps = nn.ModuleList(Step(channels, C) for channels in reversed(finer))
        self.mask_features = nn.Conv2d(C, C, 3, padding=1)
        nn.init.kaiming_uniform_(self.mask_features.weight, a=1)
        nn.init.zeros_(self.mask_features.bias)  # type: ignore[arg-type]

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Mask features (B, C, h, w) of stride 4 and the maps of strides 32, 16, 8, each (B, C, h, w)."""
        *finer, coarsest = features
        maps = [self.top(coarsest)]
        for step, x in zip(self.steps, reversed(finer), strict=True):
            given = x, maps[-1]
            maps.append(checkpointed(step, *given) if self.checkpointing and self.training else step(*given))
        *levels, finest = maps
        return self.mask_features(finest), tuple(levels)
