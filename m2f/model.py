"""The network: backbone, pixel decoder, query decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from m2f.backbones import build_backbone
from m2f.config import ModelConfig
from m2f.constants import constant
from m2f.fapn import FeatureAlignedPyramid
from m2f.pixel_decoder import LEVELS, PixelDecoder
from m2f.query_decoder import QueryDecoder
from m2f.recompute import recomputing
from m2f.types import Prediction

MEAN_RGB = (123.675, 116.28, 103.53)
"""ImageNet mean, 0-255 (the reference's data preprocessor)."""
STD_RGB = (58.395, 57.12, 57.375)
"""ImageNet standard deviation, 0-255."""


class Mask2Former(nn.Module):
    """Pictures to classes and masks of Q queries."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self._compiled: Callable[[Tensor, Tensor | None], tuple[Tensor, tuple[Tensor, ...]]] | None = None
        self.backbone = build_backbone(config.backbone)
        build_pixel_decoder = FeatureAlignedPyramid if config.pixel_decoder.name == "fapn" else PixelDecoder
        self.pixel_decoder = build_pixel_decoder(config.pixel_decoder, self.backbone.channels)
        self.query_decoder = QueryDecoder(
            config.query_decoder, channels=config.pixel_decoder.channels, num_classes=config.num_classes, levels=LEVELS
        )

    def forward(self, images: Tensor, seeds: Sequence[int] | None = None, *, auxiliary: bool = True) -> Prediction:
        """Predict for normalised RGB pictures, (B, 3, H, W) float, H and W at least 32.

        Sides need not be multiples of 32: the levels are ceil(H / 4) x ceil(W / 4), ceil(H / 8) x ceil(W / 8)
        and so on, as in the reference. `seeds`: one int per picture; decides which branches drop path
        drops, needed to train with it. Without `auxiliary` the earlier layers' predictions are left out,
        which is faster.
        """
        height, width = images.shape[-2:]
        if min(height, width) < 32:
            raise ValueError(
                f"an image is {height} x {width} pixels where the network needs 32 x 32 or more; pad it, with "
                "test.pad_multiple: 32 in a row"
            )
        if seeds is not None and len(seeds) != len(images):
            raise ValueError(f"{len(seeds)} seeds for {len(images)} images")
        features = self.features if self._compiled is None or not self.training else self._compiled
        with recomputing(images.device.type == "cpu"):
            mask_features, maps = features(images, self.backbone.scales(seeds))
        return self.query_decoder(mask_features, maps, auxiliary=auxiliary)

    def features(self, images: Tensor, scales: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Backbone and pixel decoder, which `compile_training` compiles. `scales`: of the backbone's `scales`."""
        maps = self.backbone.maps(images, scales)
        result: tuple[Tensor, tuple[Tensor, ...]]
        if not self.config.pixel_decoder.float32:
            result = self.pixel_decoder(maps)
            return result
        with torch.autocast(images.device.type, enabled=False):
            result = self.pixel_decoder([x.float() for x in maps])
        return result

    def compile_training(self, *, backend: str = "inductor") -> None:
        """From now on make `features`, in training, by code of torch.compile, made for each size when it comes first.

        The whole is one graph, which depends on no seed. Evaluation, whose images have many sizes, is left as it is.
        """
        self._compiled = torch.compile(self.features, fullgraph=True, dynamic=False, backend=backend)

    def checkpoint_activations(self) -> None:
        """In training, keep of each block of the backbone and layer of the pixel decoder only its input, and make the
        rest again in the backward pass: the same bits for less memory and more time. Blocks whose batch norm takes the
        statistics of the step are left as they are."""
        self.backbone.checkpointing = self.pixel_decoder.checkpointing = True

    def uncompile(self) -> None:
        """Undo `compile_training`."""
        self._compiled = None


def build_model(config: ModelConfig, drop_path_rate: float | None = None) -> Mask2Former:
    """The network of a row with fresh weights, from torch's global generator; in training mode.

    `drop_path_rate` replaces the row's. Parameters that the recipe freezes have `requires_grad` False.
    """
    if drop_path_rate is not None:
        backbone = dataclasses.replace(config.backbone, drop_path_rate=drop_path_rate)
        config = dataclasses.replace(config, backbone=backbone)
    return Mask2Former(config)


def normalise(images: Tensor, sizes: Tensor | None = None) -> Tensor:
    """uint8 RGB pictures, (B, 3, H, W), to the network's float32 input.

    `sizes`: (B, 2) valid (height, width); what lies right of or below it becomes 0, as in the reference,
    which pads after normalising.
    """
    mean, std = (constant(rgb, images).view(1, 3, 1, 1) for rgb in (MEAN_RGB, STD_RGB))
    normalised = (images.float() - mean) / std
    if sizes is None:
        return normalised
    height, width = images.shape[-2:]
    sizes = sizes.to(images.device)
    rows = torch.arange(height, device=images.device) < sizes[:, :1]
    columns = torch.arange(width, device=images.device) < sizes[:, 1:]
    return normalised * (rows[:, None, :, None] & columns[:, None, None, :])


def pad(images: Tensor, multiple: int = 32) -> Tensor:
    """Zeros right and below, up to the next multiple of `multiple`."""
    height, width = images.shape[-2:]
    return nn.functional.pad(images, (0, -width % multiple, 0, -height % multiple))
