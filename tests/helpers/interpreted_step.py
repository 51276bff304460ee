"""A training step and a label map of a small network, in a process where Triton's interpreter stands for a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from m2f import Target, build_model
from m2f.config import BackboneConfig, LossConfig, ModelConfig, PixelDecoderConfig, QueryDecoderConfig
from m2f.inference import semantic_labels
from m2f.kernels import build, gpu
from m2f.losses import set_losses
from m2f.types import Prediction

CONFIG = ModelConfig(
    num_classes=3,
    backbone=BackboneConfig(name="tiny", frozen_norm=False),
    pixel_decoder=PixelDecoderConfig(channels=32, layers=1, heads=2, points=2, feedforward=32),
    query_decoder=QueryDecoderConfig(queries=5, layers=3, heads=2, feedforward=32),
    loss=LossConfig(points=64),
)


def step(kernels: bool) -> tuple[dict[str, Tensor], list[str]]:
    """Losses, gradients and a label map, and the kinds of attention that have a gradient."""
    build.use("plain")
    gpu._DEVICES = ("cpu",)
    used = list[str]()
    with gpu.as_if(kernels):
        torch.manual_seed(0)
        network = build_model(CONFIG)
        for layer in network.pixel_decoder.layers:  # fresh ones look at pixels' middles, where rounding picks a slope
            layer.attention.offsets.bias.data.uniform_(-2, 2)
        images = torch.randn(2, 3, 64, 96)
        targets = [Target(torch.tensor([0, 2]), torch.rand(2, 64, 96) > 0.5) for _ in images]
        prediction = network(images)
        losses = set_losses(prediction, targets, num_masks=4.0, config=CONFIG.loss, seeds=[1, 2])
        torch.stack([*losses.values()]).sum().backward()
        found = {name: loss.detach() for name, loss in losses.items()}
        found |= {name: each.grad for name, each in network.named_parameters() if each.grad is not None}
        # fresh weights have one opinion of all pixels: classes by query instead
        classes = 9 * torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(3))
        seen_masks = Prediction(classes, 20 * prediction.mask_logits.detach(), ())
        found["labels"] = semantic_labels(seen_masks, (50, 70), (60, 90), padded_size=(64, 96)).float()
        graph = [prediction.mask_logits.grad_fn]
        seen = set()
        while graph:
            node = graph.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            used.append(type(node).__name__)
            graph += [following for following, _ in node.next_functions]
    return found, sorted({name for name in used if "Attention" in name})
