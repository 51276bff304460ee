"""Predictions to make label maps, segments and instances of, and their plain definitions."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from m2f.inference import Size
from m2f.types import Prediction
from tests.helpers.pretend_gpu import PretendGpu


def answers(images: int = 2, queries: int = 9, classes: int = 5, height: int = 16, width: int = 24) -> Prediction:
    generator = torch.Generator().manual_seed(0)
    return Prediction(
        2 * torch.randn(images, queries, classes + 1, generator=generator),
        4 * torch.randn(images, queries, height, width, generator=generator),
    )


def cut(maps: torch.Tensor, valid_size: Size, size: Size) -> torch.Tensor:
    """Cropped and resized."""
    return F.interpolate(maps[..., : valid_size[0], : valid_size[1]], size=size, mode="bilinear", align_corners=False)


def upsampled(prediction: Prediction, padded_size: Size) -> torch.Tensor:
    return F.interpolate(prediction.mask_logits, size=padded_size, mode="bilinear", align_corners=False)


def on_gpu(gpu: PretendGpu, prediction: Prediction) -> Prediction:
    return Prediction(gpu.put(prediction.class_logits), gpu.put(prediction.mask_logits))
