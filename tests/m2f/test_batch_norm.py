"""Batch norm over the parts of a step: as `nn.BatchNorm2d` on the whole, with one sum forward and one backward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from m2f.backbones import build_backbone
from m2f.batch_norm import StepBatchNorm2d, step_batch_norm, step_statistics
from m2f.config import BackboneConfig
from m2f.optim import NORM_LAYERS

CHANNELS = 5
PARTS = (slice(0, 2), slice(2, 3))
"""Of three pictures, on two workers."""
CASES = {"learned": (True, 0.0), "frozen": (False, 0.0), "far from 0": (True, 300.0)}
"""Whether weight and bias learn, and the mean of the input beside a standard deviation of about 1."""


def whole(mean: float) -> tuple[Tensor, Tensor]:
    """Three pictures and the gradient of what the norm makes of them."""
    draws = torch.Generator().manual_seed(3)
    scale = torch.arange(1, CHANNELS + 1)[:, None, None] / 3
    x, gradient = torch.randn(2, 3, CHANNELS, 6, 7, generator=draws)
    return x * scale + mean, gradient


def plain_norm(*, learned: bool) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(CHANNELS)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 2, CHANNELS))
        norm.bias.copy_(torch.linspace(3, -1, CHANNELS))
    return norm.requires_grad_(learned)


def stepped(norm: nn.BatchNorm2d, x: Tensor, gradient: Tensor) -> dict[str, Any]:
    """What two steps leave: the second's output, all gradients, and the state."""
    for _ in range(2):
        norm.zero_grad()
        x = x.detach().clone().requires_grad_()
        output = norm(x)
        output.backward(gradient)
    return {
        "output": output.detach(),
        "to_x": x.grad,
        "to_weight": norm.weight.grad,
        "to_bias": norm.bias.grad,
        **norm.state_dict(),
    }


def _worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    sizes: list[int] = []

    def total(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        dist.all_reduce(tensor)
        return tensor

    found: dict[str, Any] = {}
    for name, (learned, mean) in CASES.items():
        for again in ("", " again"):
            x, gradient = (each[PARTS[rank]] for each in whole(mean))
            sizes.clear()
            norm = StepBatchNorm2d.of(plain_norm(learned=learned), total)
            found[name + again] = {**stepped(norm, x, gradient), "sums": list(sizes)}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def on_two_workers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("workers")
    mp.spawn(_worker, args=(folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_unequal_parts_on_two_workers_give_what_the_whole_gives_on_one(
    on_two_workers: list[dict[str, Any]], case: str
) -> None:
    learned, mean = CASES[case]
    alone = stepped(plain_norm(learned=learned), *whole(mean))
    parts = [found[case] for found in on_two_workers]
    # float32 holds x to 3e-5 beside a mean of 300, and so no result can be nearer
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if mean == 0 else {"rtol": 1e-4, "atol": 2e-4}
    for name in ("output", "to_x"):
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), alone[name], **tolerance)
    for name in ("to_weight", "to_bias"):
        if learned:
            torch.testing.assert_close(parts[0][name] + parts[1][name], alone[name], **tolerance)
        else:
            assert [part[name] for part in (*parts, alone)] == [None] * 3
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(parts[0][name], parts[1][name])
        torch.testing.assert_close(parts[0][name], alone[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_step_takes_one_sum_forward_and_one_backward(on_two_workers: list[dict[str, Any]], case: str) -> None:
    # two steps, each with 5 sums, 5 sums of squares and the count, and then two sums of gradients for each channel
    for found in on_two_workers:
        assert found[case]["sums"] == [11, 10] * 2


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_same_step_again_gives_the_same_bits(on_two_workers: list[dict[str, Any]], case: str) -> None:
    for found in on_two_workers:
        one, other = found[case], found[f"{case} again"]
        assert all(torch.equal(one[name], other[name]) for name in one if isinstance(one[name], Tensor))


def alone(tensor: Tensor) -> Tensor:
    """The sum over one part."""
    return tensor


@pytest.mark.parametrize("training", [True, False])
def test_a_part_that_is_the_whole_gives_what_nn_batch_norm_gives(training: bool) -> None:
    plain = plain_norm(learned=True).train(training)
    ours = StepBatchNorm2d.of(plain_norm(learned=True), alone).train(training)
    expected, found = (stepped(norm, *whole(2.0)) for norm in (plain, ours))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


def test_statistics_of_two_numbers_far_from_0_are_exact() -> None:
    # 10,000 and 10,002: mean 10,001, variance 1. Squares of float32 near 1e8 are 8 apart.
    mean, variance, count = step_statistics(torch.tensor([10_000.0, 10_002.0]).view(2, 1, 1, 1), alone)
    assert (mean.item(), variance.item(), count.item()) == (10_001.0, 1.0, 2.0)


def test_under_autocast_statistics_and_gradients_are_those_of_the_rounded_input() -> None:
    x, gradient = (each.bfloat16() for each in whole(2.0))
    norm = StepBatchNorm2d.of(plain_norm(learned=True), alone)
    with torch.autocast("cpu", torch.bfloat16):
        output = norm(x.requires_grad_())
    output.backward(gradient)
    assert output.dtype == torch.bfloat16 and norm.running_mean.dtype == norm.weight.grad.dtype == torch.float32
    exact = plain_norm(learned=True)
    same = x.detach().float().requires_grad_()
    exact(same).backward(gradient.float())
    torch.testing.assert_close(norm.running_var, exact.running_var, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.weight.grad, exact.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad, same.grad.bfloat16(), rtol=2**-7, atol=1e-6)  # one rounding apart


def test_a_backbone_keeps_its_parameters_their_order_and_its_state() -> None:
    backbone = build_backbone(BackboneConfig(name="r50", frozen_norm=True))
    before = dict(backbone.named_parameters(remove_duplicate=False))
    frozen = {name: parameter.requires_grad for name, parameter in before.items()}
    state = list(backbone.state_dict())
    step_batch_norm(backbone, alone)
    after = dict(backbone.named_parameters(remove_duplicate=False))
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert frozen == {name: parameter.requires_grad for name, parameter in after.items()}
    assert list(backbone.state_dict()) == state
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 53 and all(type(norm) is StepBatchNorm2d for norm in norms)
    assert issubclass(StepBatchNorm2d, NORM_LAYERS)  # no weight decay


def test_a_network_with_sums_over_workers_is_one_compiled_graph(tmp_path: Path) -> None:
    def total(tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    def network() -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        return step_batch_norm(layers, total)

    eager, compiled = network(), network()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        compiled.compile(fullgraph=True, backend="aot_eager")
        images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        for model in (eager, compiled):
            model(images).square().sum().backward()
    finally:
        dist.destroy_process_group()
        torch._dynamo.reset()
    for one, other in zip(eager.parameters(), compiled.parameters(), strict=True):
        assert one.grad is not None and torch.equal(one.grad, other.grad)
    assert all(torch.equal(*pair) for pair in zip(eager.buffers(), compiled.buffers(), strict=True))


def test_neither_direction_reads_a_number_on_the_host() -> None:
    # Tensors without memory stand for a GPU's: reading a number of theirs is an error, and so is one on another device.
    with torch.device("meta"):
        norm = StepBatchNorm2d(CHANNELS, total=alone)
        x = torch.empty(3, CHANNELS, 6, 7, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad.shape == x.shape and norm.weight.grad.shape == (CHANNELS,)
    with pytest.raises((RuntimeError, NotImplementedError)):
        norm.running_mean.sum().item()


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_gpu_gives_what_nn_batch_norm_gives_there(memory_format: torch.memory_format) -> None:
    x, gradient = (each.cuda().contiguous(memory_format=memory_format) for each in whole(2.0))
    expected = stepped(plain_norm(learned=True).cuda(), x, gradient)
    found = stepped(StepBatchNorm2d.of(plain_norm(learned=True), alone).cuda(), x, gradient)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)
