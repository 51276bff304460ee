from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from m2f import ModelConfig, Target, build_model
from m2f.config import BackboneConfig, LossConfig, PixelDecoderConfig, QueryDecoderConfig
from m2f.deterministic_sampling import ordered_grid_sample
from m2f.kernels.build import use
from m2f.losses import set_losses
from pipeline.compute.determinism import any_algorithm, be_deterministic

GPU = torch.device("cuda")

NO_OTHER_FORM = {
    "grid_sampler_2d_backward": "m2f.deterministic_sampling",
    "upsample_bilinear2d_backward": "F.interpolate takes itself apart where it is not on a CPU",
}
"""Operations of a training for which PyTorch has no deterministic form on a GPU, and what stands in for them."""

FORWARD_IS_FINE = {"grid_sampler_2d", "upsample_bilinear2d"}

ERRORS = (
    "adaptive_avg_pool", "adaptive_max_pool", "avg_pool3d", "fractional_max_pool", "max_pool3d", "max_unpool",
    "reflection_pad", "upsample_linear", "upsample_bilinear", "upsample_bicubic", "upsample_trilinear", "grid_sampler",
    "nll_loss2d", "ctc_loss", "embedding_bag", "put_", "histc", "kthvalue", "median", "scatter_reduce", "roi_",
    "deform_conv2d",
)  # fmt: skip
"""Beginnings of the names of operations of which PyTorch's documentation says that they, or their backward, raise an
error on a GPU where use_deterministic_algorithms is set, and of torchvision's with atomic additions."""


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    yield
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_cudnn_sdp(before)


def test_on_a_gpu_every_switch_is_set_and_an_operation_without_a_form_raises() -> None:
    be_deterministic(True, GPU)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.backends.cudnn.benchmark and not torch.backends.cuda.cudnn_sdp_enabled()
    be_deterministic(False, GPU)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_cpu_is_left_as_it_is() -> None:
    be_deterministic(True, torch.device("cpu"))
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


@pytest.mark.parametrize("on", [True, False])
def test_validation_may_use_what_training_may_not(on: bool) -> None:
    def validate() -> None:
        with any_algorithm():
            assert torch.are_deterministic_algorithms_enabled() is on
            assert torch.is_deterministic_algorithms_warn_only_enabled()
            raise KeyError

    be_deterministic(on, GPU)
    with pytest.raises(KeyError):
        validate()
    assert torch.are_deterministic_algorithms_enabled() is on
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


class Operations(TorchDispatchMode):
    """The names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def network(backbone: str) -> nn.Module:
    torch.manual_seed(0)
    return build_model(
        ModelConfig(
            num_classes=3,
            backbone=BackboneConfig(name=backbone, frozen_norm=False),
            pixel_decoder=PixelDecoderConfig(channels=32, layers=1, heads=2, feedforward=32),
            query_decoder=QueryDecoderConfig(queries=5, layers=3, heads=2, feedforward=32),
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["r50", "swin-tiny"])
def test_a_training_has_no_operation_without_a_deterministic_form_but_those_that_are_replaced(backbone: str) -> None:
    # On a CPU, by names: what runs on a GPU is the same but for what NO_OTHER_FORM says.
    targets = [Target(torch.tensor([0, 2]), torch.rand(2, 64, 64) < 0.5) for _ in range(2)]
    use("plain")
    try:
        with Operations() as seen:
            prediction = network(backbone)(torch.randn(2, 3, 64, 64))
            losses = set_losses(prediction, targets, num_masks=2.0, config=LossConfig(points=64), seeds=(0, 1))
            sum(losses.values()).backward()  # type: ignore[union-attr]
    finally:
        use("auto")
    assert "convolution_backward" in seen.names  # it does see the backward pass
    assert {name for name in seen.names if name.startswith(ERRORS)} - FORWARD_IS_FINE == NO_OTHER_FORM.keys()


def test_the_form_that_stands_in_for_grid_sample_has_none_of_them() -> None:
    maps = torch.randn(2, 3, 4, 4, requires_grad=True)
    grid = (2 * torch.rand(2, 5, 1, 2) - 1).requires_grad_()
    output = ordered_grid_sample(maps, grid)
    with Operations() as seen:
        output.backward(torch.ones_like(output))
    assert "index_add_" in seen.names and not {name for name in seen.names if name.startswith(ERRORS)}


def summed(tensors: list[Tensor | None]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors if tensor is not None]


@pytest.mark.gpu
@pytest.mark.parametrize("backbone", ["r50", "swin-tiny"])
def test_a_gpu_gives_the_same_gradients_again_bit_for_bit(backbone: str) -> None:
    be_deterministic(True, GPU)
    model, images = network(backbone).cuda(), torch.randn(2, 3, 128, 160).cuda()
    runs = []
    for _ in range(3):
        model.zero_grad()
        prediction = model(images)
        sum(each.mask_logits.square().mean() for each in (prediction, *prediction.auxiliary)).backward()
        runs.append(summed([parameter.grad for parameter in model.parameters()]))
    assert all(torch.equal(one, other) for run in runs[1:] for one, other in zip(runs[0], run, strict=True))
