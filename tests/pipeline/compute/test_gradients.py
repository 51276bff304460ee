from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from pipeline.compute.gradients import GradientSums, flat_gradients


def layers() -> nn.Sequential:
    """A convolution in each of two orders of memory, 27 + 3 and 54 + 2 elements, and a slope for each of 2 channels."""
    torch.manual_seed(0)
    plain, last = nn.Conv2d(3, 3, (1, 3)), nn.Conv2d(3, 2, 3)
    return nn.Sequential(plain, last.to(memory_format=torch.channels_last), nn.PReLU(2))  # type: ignore[call-overload]


def test_gradients_begin_at_multiples_of_16_elements_and_zeros_lie_between_them() -> None:
    model = layers()
    gradients = flat_gradients(list(model.parameters()))
    # 27, 3, 54, 2 and 2 elements, rounded up to multiples of 16
    starts = [parameter.grad.storage_offset() for parameter in model.parameters()]
    assert starts == [0, 32, 48, 112, 128] and gradients.shape == (144,)
    assert gradients.data_ptr() % 64 == 0
    for parameter in model.parameters():
        assert parameter.grad.shape == parameter.shape and parameter.grad.stride() == parameter.stride()
    model(torch.ones(1, 3, 3, 5)).sum().backward()
    parts = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert torch.count_nonzero(gradients) == torch.count_nonzero(parts) > 50
    torch.testing.assert_close(torch.linalg.vector_norm(gradients), torch.linalg.vector_norm(parts))


def test_the_fused_optimiser_steps_as_with_gradients_of_their_own_whatever_the_order_of_memory() -> None:
    flat, apart = layers(), layers()
    flat_gradients(list(flat.parameters()))
    for model in (flat, apart):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        for step in range(3):
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()
            model(torch.linspace(-1, 1 + step, 45).view(1, 3, 3, 5)).square().sum().backward()
            optimizer.step()
    for one, other in zip(flat.parameters(), apart.parameters(), strict=True):
        assert one.stride() == other.stride()
        assert torch.equal(one, other)


def test_a_parameter_with_gaps_in_its_memory_is_an_error() -> None:
    with pytest.raises(AssertionError, match=r"a parameter of \(2, 2\) has gaps: strides \(4, 1\)"):
        flat_gradients([nn.Parameter(torch.zeros(2, 4)[:, :2])])


# Sums over workers


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    return list(model.parameters())


class Branches(nn.Module):
    """Four layers of 16 x 16, of which an input that is negative leaves out the second."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        without_second = float(x.sum()) < 0
        for number, layer in enumerate(self.layers):
            x = x if number == 1 and without_second else layer(x)
        return x.square().mean()


def _summed(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found = {}
    inputs = {
        "equal graphs": [torch.ones(2, 16), torch.full((2, 16), 2.0 + rank)],
        "one worker leaves out a layer": [torch.ones(2, 16), torch.full((2, 16), 1.0 - 2 * rank)],
    }
    for name, (first, second) in inputs.items():
        whole, sliced = Branches(), Branches()
        gradients = flat_gradients(parameters_of(whole))
        for x in (first, second):
            whole(x).backward()
        dist.all_reduce(gradients)
        parts = flat_gradients(parameters_of(sliced))
        sums = GradientSums(parameters_of(sliced), parts, slice_elements=500)
        launched = []
        for step in range(2):
            parts.zero_()
            sliced(first).backward()
            launched.append(len(sums._running))
            sums.begin()
            sliced(second).backward()
            launched.append(len(sums._running))
            sums.wait()
            assert torch.equal(parts, gradients), f"step {step}"
        found[name] = {"slices": [len(part) for part in sums._slices], "launched": launched, "sum": parts}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, object]]]:
    folder = tmp_path_factory.mktemp("sums")
    mp.spawn(_summed, args=(folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
def test_slices_are_summed_during_the_last_backward_pass_and_give_the_bits_of_one_sum(
    two_workers: list[dict[str, dict[str, object]]],
) -> None:
    one, other = (found["equal graphs"] for found in two_workers)
    # 4 layers of 256 + 16 elements, from the last: two in each slice
    assert one["slices"] == [544, 544]
    assert one["launched"] == other["launched"] == [0, 2, 0, 2]  # none in the first pass, all before the wait
    assert torch.equal(one["sum"], other["sum"])  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_worker_that_leaves_out_a_layer_sums_the_same_slices_in_the_same_order(
    two_workers: list[dict[str, dict[str, object]]],
) -> None:
    one, other = (found["one worker leaves out a layer"] for found in two_workers)
    assert (one["launched"], other["launched"]) == ([0, 2, 0, 2], [0, 1, 0, 1])  # the second when it waits
    assert torch.equal(one["sum"], other["sum"])  # type: ignore[arg-type]
