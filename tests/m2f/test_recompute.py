"""What autograd keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from m2f import build_model
from m2f.config import BackboneConfig, ModelConfig, QueryDecoderConfig
from m2f.recompute import cheap, recomputing


def test_an_activation_is_made_again_and_its_gradient_is_the_same() -> None:
    """x of 6 numbers; y = gelu(x); loss = sum(w y), which would keep y."""
    calls = []

    def gelu(x: Tensor) -> Tensor:
        calls.append(1)
        return nn.functional.gelu(x)

    x, w = torch.arange(-3.0, 3.0, requires_grad=True), torch.arange(6.0, requires_grad=True)
    (gelu(x) * w).sum().backward()
    wanted = x.grad, w.grad
    x.grad = w.grad = None
    calls.clear()
    with recomputing(True):
        loss = (cheap(gelu, x) * w).sum()
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 2
    assert x.grad is not None and w.grad is not None
    assert x.grad.equal(wanted[0]) and w.grad.equal(wanted[1])


def test_a_result_that_several_operations_need_is_made_again_once() -> None:
    calls = []

    def square(x: Tensor) -> Tensor:
        calls.append(1)
        return x * x

    x = torch.arange(3.0, requires_grad=True)
    with recomputing(True):
        y = cheap(square, x)
        z = cheap(torch.exp, y)  # of a result that is itself made again
        loss = (y * y * z).sum()
    del y, z
    loss.backward()
    assert len(calls) == 2
    # d/dx x^4 exp(x^2) = (4 x^3 + 2 x^5) exp(x^2)
    value = x.detach()
    torch.testing.assert_close(x.grad, (4 * value**3 + 2 * value**5) * (value**2).exp())


def test_an_activation_that_keeps_its_own_result_does_not_keep_it() -> None:
    """relu_ notes its result before `cheap` has it; the sum keeps nothing."""
    calls = []

    def relu(x: Tensor) -> Tensor:
        calls.append(1)
        return torch.relu_(x + 1)

    x = torch.tensor([-3.0, 1.0], requires_grad=True)
    with recomputing(True):
        loss = cheap(relu, x).sum()
    loss.backward()
    assert len(calls) == 2
    assert x.grad is not None and x.grad.tolist() == [0, 1]


def test_without_the_context_or_without_gradient_nothing_is_noted() -> None:
    x = torch.ones(3, requires_grad=True)
    assert cheap(torch.exp, x).equal(x.exp())
    with recomputing(False):
        assert cheap(torch.exp, x).equal(x.exp())
    with torch.no_grad(), recomputing(True):
        assert cheap(torch.exp, x).equal(x.exp())


@pytest.mark.parametrize("backbone", ["tiny", "swin-tiny", "r50"])
def test_a_network_has_the_same_gradient_and_statistics_with_and_without(
    backbone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    found = []
    for enabled in (True, False):
        monkeypatch.setattr("m2f.model.recomputing", lambda _, enabled=enabled: recomputing(enabled))
        torch.manual_seed(0)
        model = build_model(ModelConfig(num_classes=3, backbone=BackboneConfig(name=backbone))).train()
        prediction = model(images, seeds=[1, 2])
        sum(p.mask_logits.square().mean() for p in (prediction, *prediction.auxiliary)).backward()  # type: ignore[union-attr]
        found.append(
            {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | dict(model.named_buffers())
        )
    assert len(found[0]) == len(found[1]) > 50
    for name, tensor in found[0].items():
        assert tensor.equal(found[1][name]), name


@pytest.mark.parametrize(
    "backbone",
    [BackboneConfig(name="swin-tiny", drop_path_rate=0.3), BackboneConfig(name="tiny", batch_statistics=False)],
    ids=["Swin", "ResNet"],
)
@pytest.mark.parametrize("as_on_a_cpu", [True, False], ids=["on a CPU", "as on a GPU"])
def test_checkpointed_blocks_give_the_same_bits_and_keep_less(
    backbone: BackboneConfig, as_on_a_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("m2f.model.recomputing", lambda _: recomputing(as_on_a_cpu))
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    found, kept = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        small = QueryDecoderConfig(queries=4, layers=1)
        model = build_model(ModelConfig(num_classes=3, backbone=backbone, query_decoder=small)).train()
        if checkpointing:
            model.checkpoint_activations()
        weights = {parameter.data_ptr() for parameter in model.parameters()}
        sizes = dict[int, int]()

        def keep(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            masks = model(images, seeds=[1, 2]).mask_logits
        masks.square().mean().backward()
        kept.append(sum(size for address, size in sizes.items() if address not in weights))
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True)) and len(found[0]) > 50
    if not as_on_a_cpu:  # there other hooks are between
        assert kept[1] < 0.5 * kept[0]


def test_blocks_with_the_statistics_of_the_step_are_not_made_again() -> None:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    statistics = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = build_model(ModelConfig(num_classes=3, backbone=BackboneConfig(name="r50"))).train()
        if checkpointing:
            model.checkpoint_activations()
        model(images, seeds=[1, 2]).mask_logits.square().mean().backward()
        statistics.append(dict(model.backbone.named_buffers()))
    assert all(torch.equal(tensor, statistics[1][name]) for name, tensor in statistics[0].items())
