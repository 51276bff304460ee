"""Backbones by name."""

from __future__ import annotations

from m2f.backbones.resnet import ResNet, build_resnet
from m2f.config import BACKBONE_NAMES, BackboneConfig


def build_backbone(config: BackboneConfig) -> ResNet:
    """A module with `channels` (four ints) that returns maps at strides 4, 8, 16 and 32."""
    if config.name not in BACKBONE_NAMES:
        raise ValueError(f"model.backbone.name is {config.name!r}; known: {', '.join(BACKBONE_NAMES)}")
    return build_resnet(config)
