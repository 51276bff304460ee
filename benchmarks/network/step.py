"""A training step of this project's network, part by part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.network.forms import CLIP_NORM, LR, MASKS, WEIGHT_DECAY, Batch, our_network
from m2f.losses import set_losses
from m2f.matcher import match
from pipeline.compute.precision import in_precision

PARTS = ("backbone", "pixel decoder", "query decoder", "matching", "losses", "backward", "optimiser")
"""In this order; they are a step."""

Part = Callable[[str], Any]
"""A context for the name of a part."""


class Step:
    """This project's network with its optimiser and a batch, and a step whose parts can be watched."""

    def __init__(self, row: str, batch: int, device: torch.device, precision: str) -> None:
        torch.manual_seed(0)
        self.network = our_network(row).to(device).train()
        self.trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self.device, self.precision = device, precision
        self.batch, self.seeds = Batch.of(batch, device), range(batch)
        self.optimizer: torch.optim.Optimizer | None = None
        if device.type != "meta":  # fused AdamW needs memory
            self.optimizer = torch.optim.AdamW(self.trained, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)

    def run(self, part: Part) -> Tensor:
        """One step, its loss. The losses match once more: what "matching" costs counts into "losses" too."""
        network, images, targets, seeds = self.network, self.batch.images, self.batch.targets, self.seeds
        config = network.config.loss
        self.network.zero_grad()
        with in_precision(self.precision, self.device):
            with part("backbone"):
                maps = network.backbone(images, seeds)
            with part("pixel decoder"):
                features, levels = network.pixel_decoder(maps)
            with part("query decoder"):
                prediction = network.query_decoder(features, levels, auxiliary=True)
            with part("matching"):
                match((*prediction.auxiliary, prediction), targets, config=config, seeds=seeds)
            with part("losses"):
                losses = set_losses(
                    prediction, targets, num_masks=float(MASKS * len(images)), config=config, seeds=seeds
                )
                total = torch.stack(list(losses.values())).sum()
        with part("backward"):
            total.backward()
        if self.optimizer is not None:
            with part("optimiser"):
                nn.utils.clip_grad_norm_(self.trained, CLIP_NORM)
                self.optimizer.step()
        return total.detach()


def without_second_matching(values: dict[str, Any]) -> dict[str, Any]:
    """Figures by part: the losses match again, which is taken from theirs."""
    values["losses"] = type(values["losses"])(values["losses"] - values["matching"])
    return values
