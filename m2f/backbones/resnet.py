"""ResNets with torchvision's parameter names, as backbones of four levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2f.config import BackboneConfig
from m2f.recompute import cheap, checkpointed

Norm = Callable[[int], nn.Module]
"""Makes a norm of so many channels."""

_TINY_NORM_GROUPS = 8


def norm_relu(norm: nn.Module, x: Tensor) -> Tensor:
    """ReLU of a norm; made again for the backward pass."""
    if not _repeats(norm):
        return F.relu(norm(x), inplace=True)
    return cheap(
        lambda x: F.relu(norm(x), inplace=True), x, again=lambda x: F.relu(_normalised_again(norm, x), inplace=True)
    )


def join(norm: nn.Module, branch: Tensor, shortcut: nn.Sequential | None, x: Tensor) -> Tensor:
    """ReLU of the normed branch plus x, or x through the shortcut's convolution and norm; made again likewise."""
    beside = x if shortcut is None else shortcut[0](x)

    def make(normalise: Callable[[nn.Module, Tensor], Tensor], branch: Tensor, beside: Tensor) -> Tensor:
        result = normalise(norm, branch)
        result += beside if shortcut is None else normalise(shortcut[1], beside)
        return F.relu(result, inplace=True)

    if not _repeats(norm):  # the shortcut's is of the same sort
        return make(nn.Module.__call__, branch, beside)
    return cheap(partial(make, nn.Module.__call__), branch, beside, again=partial(make, _normalised_again))


def _repeats(norm: nn.Module) -> bool:
    """Whether a second call in the backward pass gives the same numbers without other workers."""
    return type(norm) in (nn.BatchNorm2d, nn.GroupNorm)


def _normalised_again(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x) without counting the step's statistics twice."""
    if isinstance(norm, nn.BatchNorm2d) and norm.training:
        return F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)
    result: Tensor = norm(x)
    return result


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut."""

    expansion = 1

    def __init__(self, channels_in: int, width: int, stride: int, shortcut: nn.Sequential | None, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = norm(width)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        branch = self.conv2(norm_relu(self.bn1, self.conv1(x)))
        return join(self.bn2, branch, self.downsample, x)


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions beside a shortcut; the second has the stride (ResNet V1.5)."""

    expansion = 4

    def __init__(self, channels_in: int, width: int, stride: int, shortcut: nn.Sequential | None, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, width, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = norm(width * self.expansion)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        branch = norm_relu(self.bn2, self.conv2(norm_relu(self.bn1, self.conv1(x))))
        return join(self.bn3, self.conv3(branch), self.downsample, x)


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
        norm: Norm = nn.BatchNorm2d,
        frozen_norm: bool,
        batch_statistics: bool,
    ) -> None:
        super().__init__()
        self.batch_statistics = batch_statistics
        self.checkpointing = False
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm(width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels_in, self.channels = width, tuple(width * 2**i * block.expansion for i in range(4))
        for i, (depth, channels) in enumerate(zip(depths, self.channels, strict=True)):
            blocks = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                shortcut = None
                if stride > 1 or channels_in != channels:
                    shortcut = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), norm(channels))
                blocks.append(block(channels_in, width * 2**i, stride, shortcut, norm))
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
        return self.maps(images, self.scales(seeds))

    def scales(self, seeds: Sequence[int] | None) -> Tensor | None:
        """None: nothing is dropped (Swin drops branches)."""
        return None

    def maps(self, images: Tensor, scales: Tensor | None) -> tuple[Tensor, ...]:
        """`forward` after `scales`."""
        x = self._pooled(norm_relu(self.bn1, self.conv1(images)))
        maps = []
        for i in range(1, 5):
            for block in self.get_submodule(f"layer{i}").children():
                x = checkpointed(block, x) if self._checkpoints else block(x)
            maps.append(x)
        return tuple(maps)

    @property
    def _checkpoints(self) -> bool:
        """Not with statistics of the step: making a norm again would move its running statistics a second time."""
        return self.checkpointing and self.training and not self.batch_statistics

    def _pooled(self, x: Tensor) -> Tensor:
        """Pooling, for which a CPU that only predicts takes the channels last: faster, copies included."""
        if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.maxpool(x)
        pooled: Tensor = self.maxpool(x.contiguous(memory_format=torch.channels_last))
        return pooled.contiguous()


def build_resnet(config: BackboneConfig) -> ResNet:
    """`r50`, `r101`: the usual bottlenecks with batch norm. `tiny`: a ResNet-10 of half width with group norm."""
    build = partial(ResNet, frozen_norm=config.frozen_norm, batch_statistics=config.batch_statistics)
    if config.name == "tiny":
        return build(BasicBlock, (1, 1, 1, 1), width=32, norm=partial(nn.GroupNorm, _TINY_NORM_GROUPS))
    return build(Bottleneck, {"r50": (3, 4, 6, 3), "r101": (3, 4, 23, 3)}[config.name])
