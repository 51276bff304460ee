"""Backbones by name."""

from __future__ import annotations

from m2f.backbones.resnet import ResNet, build_resnet
from m2f.backbones.swin import SWINS, Swin, build_swin
from m2f.config import BACKBONE_NAMES, BackboneConfig


def build_backbone(config: BackboneConfig) -> ResNet | Swin:
    """A module with `channels` (four ints) that takes (images, seeds) and returns maps at strides 4, 8, 16 and 32.

    A map has ceil(H / stride) x ceil(W / stride) pixels.
    """
    if config.name not in BACKBONE_NAMES:
        raise ValueError(f"model.backbone.name is {config.name!r}; known: {', '.join(BACKBONE_NAMES)}")
    if config.name in SWINS:
        return build_swin(config)
    if config.drop_path_rate:
        raise ValueError(
            f"model.backbone.drop_path_rate is {config.drop_path_rate}, but {config.name} is a ResNet, "
            f"which has no drop path"
        )
    return build_resnet(config)
