from __future__ import annotations

import pytest
import torch

from m2f.config import Kernels
from m2f.draws import keys_of, mix, uniform, uniform_of
from m2f.kernels.build import loops, use


def test_a_draw_depends_on_seed_and_stream_alone() -> None:
    both = uniform([3, 8], 1, 100)
    assert torch.equal(both[1], uniform([8], 1, 100)[0])
    assert torch.equal(both[1, :40], uniform([8], 1, 40)[0])  # a longer draw begins with the shorter one
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(both[1], uniform([8], 2, 100)[0])


@pytest.mark.parametrize("kernels", ["compiled", "plain"])
def test_one_draw_for_several_streams_gives_each_streams_own_numbers(kernels: Kernels) -> None:
    if kernels == "compiled" and loops() is None:
        pytest.skip("needs a C compiler")
    use(kernels)
    try:
        together = uniform_of(torch.cat((keys_of([3, 8], 1), keys_of([3, 8], 2)), dim=1), 50)
        assert torch.equal(together, torch.cat((uniform([3, 8], 1, 50), uniform([3, 8], 2, 50))))
    finally:
        use("auto")


def test_draws_are_uniform_in_0_1() -> None:
    draws = uniform(range(20), 5, 50_000).flatten()
    assert draws.min() >= 0 and draws.max() < 1
    # a million draws: the mean's standard error is 0.29 / 1000, a tenth's share has 0.3 / 1000
    assert draws.mean().item() == pytest.approx(0.5, abs=0.0015)
    shares = torch.histc(draws, bins=10, min=0, max=1) / len(draws)
    assert (shares - 0.1).abs().max() < 0.0015


def test_neighbouring_seeds_streams_and_counters_are_not_correlated() -> None:
    n = 100_000
    base = uniform([7], 3, n + 1)[0]
    others = (base[1:], uniform([8], 3, n)[0], uniform([7], 4, n)[0])
    for other in others:
        correlation = torch.corrcoef(torch.stack((base[:n], other)))[0, 1]
        assert abs(correlation.item()) < 0.015  # standard error 1 / sqrt(n) = 0.003


def test_these_draws_never_change() -> None:
    # Values of the first release: another number here means that no earlier run can be repeated.
    assert mix(1, 2, 3) == 7510213797696614745
    assert uniform([12345], 6, 4)[0].tolist() == [
        0.8166580200195312,
        0.7999846339225769,
        0.3308159112930298,
        0.3156149983406067,
    ]


def test_mixing_tells_orders_and_lengths_apart() -> None:
    values = [mix(1, 2), mix(2, 1), mix(1), mix(1, 2, 0), mix(-1), mix(2**63)]
    assert len(set(values)) == len(values)
    assert all(0 <= value < 2**63 for value in values)


@pytest.mark.gpu
def test_the_gpu_draws_the_same_numbers() -> None:
    assert torch.equal(uniform([1, 2], 3, 10_000), uniform([1, 2], 3, 10_000, device="cuda").cpu())
