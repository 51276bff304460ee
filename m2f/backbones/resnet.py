"""ResNets with torchvision's blocks and parameter names, as backbones of four levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from m2f.config import BackboneConfig

if TYPE_CHECKING:
    from torchvision.models.resnet import BasicBlock, Bottleneck

_TINY_NORM_GROUPS = 8


class ResNet(nn.Module):
    """Feature maps at strides 4, 8, 16 and 32.

    `frozen_norm` keeps the affine parameters of the norms from learning; without `batch_statistics` batch
    norm uses its running statistics in training too.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        *,
        width: int = 64,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        frozen_norm: bool,
        batch_statistics: bool,
    ) -> None:
        super().__init__()
        self.batch_statistics = batch_statistics
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels_in, self.channels = width, tuple(width * 2**i * block.expansion for i in range(4))
        for i, (depth, channels) in enumerate(zip(depths, self.channels, strict=True)):
            blocks = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                shortcut = None
                if stride > 1 or channels_in != channels:
                    shortcut = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), norm(channels))
                blocks.append(block(channels_in, width * 2**i, stride, shortcut, norm_layer=norm))
                channels_in = channels
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
                module.requires_grad_(not frozen_norm)

    def train(self, mode: bool = True) -> ResNet:
        """As usual, but batch norm stays on its running statistics unless the row wants batch statistics."""
        super().train(mode)
        if not self.batch_statistics:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward(self, images: Tensor, seeds: Sequence[int] | None = None) -> tuple[Tensor, ...]:
        """Four maps; `seeds` decide nothing here, as there is no drop path."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        maps = []
        for i in range(1, 5):
            x = self.get_submodule(f"layer{i}")(x)
            maps.append(x)
        return tuple(maps)


def build_resnet(config: BackboneConfig) -> ResNet:
    """`r50`, `r101`: the usual bottlenecks with batch norm. `tiny`: a ResNet-10 of half width with group norm."""
    # Here, because it takes seconds, and every process that only looks something up imports this module.
    from torchvision.models.resnet import BasicBlock, Bottleneck

    build = partial(ResNet, frozen_norm=config.frozen_norm, batch_statistics=config.batch_statistics)
    if config.name == "tiny":
        return build(BasicBlock, (1, 1, 1, 1), width=32, norm=partial(nn.GroupNorm, _TINY_NORM_GROUPS))
    return build(Bottleneck, {"r50": (3, 4, 6, 3), "r101": (3, 4, 23, 3)}[config.name])
