"""The network as a graph of any batch, height and width, with the normalisation inside.

B images, H x W pixels (multiples of 32), Q queries, C classes
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from m2f.kernels.build import use
from m2f.model import normalise

if TYPE_CHECKING:
    from torch.export import ExportedProgram

Pixels = Literal["uint8", "float32"]
"""Type of the images that go in; both hold 0 to 255."""

INPUTS = ("images", "sizes")
OUTPUTS = ("class_logits", "mask_logits")

STRIDE = 32
"""Height and width of what goes in are multiples of it: that of the network's coarsest map."""

TRACED = (2, 13 * STRIDE, 17 * STRIDE)
"""Batch, height and width of the example. torch.export takes 1 for a constant, so that there is more than one of all:
images, pixels and Swin's windows (up to 12 pixels of the coarsest map)."""

_MOST_BATCH, _MOST_STRIDES = 1024, 512
"""Bounds of the graph: images of a batch, and a side's multiple of 32 (16,384 pixels)."""


class ExportedNetwork(nn.Module):
    """RGB images to the last layer's class and mask logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of classes, (B, Q, C + 1) with "no object" last, and of masks, (B, Q, H / 4, W / 4), both float32.

        `images`: (B, 3, H, W) RGB of 0 to 255, padded right and below. `sizes`: (B, 2) int64, the height and width of
        each image without its padding, whatever pixels that holds.
        """
        prediction = self.network(normalise(images, sizes), auxiliary=False)
        return prediction.class_logits, prediction.mask_logits


def example(batch: int, height: int, width: int, pixels: Pixels, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images of noise, the same for a seed, and their sizes, which leave some padding."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (batch, 3, height, width), generator=generator, dtype=torch.uint8)
    sizes = torch.tensor([[height - 5 * place % STRIDE, width - 11 * place % STRIDE] for place in range(batch)])
    return images.to(torch.uint8 if pixels == "uint8" else torch.float32), sizes


def traced(network: nn.Module, pixels: Pixels) -> ExportedProgram:
    """The graph, made of PyTorch's own operations; the network is in evaluation mode, on the CPU."""
    use("plain")
    network.requires_grad_(False)  # an attention whose bias learns is made, and laid out, in another way
    batch = torch.export.Dim("batch", min=1, max=_MOST_BATCH)
    height, width = (torch.export.Dim(name, min=1, max=_MOST_STRIDES) for name in ("height_32", "width_32"))
    shapes = ({0: batch, 2: STRIDE * height, 3: STRIDE * width}, {0: batch})
    with torch.no_grad():
        return torch.export.export(
            ExportedNetwork(network).eval(), example(*TRACED, pixels), dynamic_shapes=shapes, strict=False
        )
