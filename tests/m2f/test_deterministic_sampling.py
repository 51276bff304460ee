from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m2f.deterministic_sampling import grid_sample, ordered_grid_sample


def gradients(sample: object, maps: Tensor, grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output of a way to sample, and the gradients of maps and grid for a gradient that tells all outputs apart."""
    maps, grid = maps.clone().requires_grad_(), grid.clone().requires_grad_()
    output = sample(maps, grid)  # type: ignore[operator]
    output.backward(torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output))
    return output.detach(), maps.grad, grid.grad  # type: ignore[return-value]


def plain(maps: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(maps, grid, align_corners=False)


@pytest.mark.parametrize("maps", [(2, 3, 4, 5), (3, 1, 6, 2), (1, 2, 1, 1)])
@pytest.mark.parametrize("reach", [1.0, 1.8])
def test_output_and_both_gradients_are_those_of_grid_sample_also_across_and_beyond_the_edge(
    maps: tuple[int, ...], reach: float
) -> None:
    draws = torch.Generator().manual_seed(1)
    values = torch.randn(maps, generator=draws, dtype=torch.float64)
    grid = (2 * torch.rand(maps[0], 7, 4, 2, generator=draws, dtype=torch.float64) - 1) * reach
    ordered, expected = (gradients(sample, values, grid) for sample in (ordered_grid_sample, plain))
    for one, other in zip(ordered, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_point_between_four_pixels_shares_its_gradient_by_their_weights() -> None:
    # In a map of 2 x 4, x = -0.5 is column (0.5 * 4 - 1) / 2 = 0.5, and y = 0 is row (1 * 2 - 1) / 2 = 0.5:
    # a quarter of each of the values 1, 2, 5 and 6, which is 3.5. A step of 1 in x is two columns, and each adds 1; one
    # in y is a row, which adds 4.
    values = torch.arange(1.0, 9.0).view(1, 1, 2, 4).requires_grad_()
    grid = torch.tensor([-0.5, 0.0]).view(1, 1, 1, 2).requires_grad_()
    output = ordered_grid_sample(values, grid)
    output.backward(torch.full_like(output, 8.0))
    assert output.item() == 3.5
    assert values.grad.tolist() == [[[[2.0, 2.0, 0.0, 0.0], [2.0, 2.0, 0.0, 0.0]]]]
    assert grid.grad.flatten().tolist() == [8 * 2.0, 8 * 4.0]


def test_maps_alone_get_a_gradient_where_the_points_are_drawn() -> None:
    maps, grid = torch.zeros(1, 1, 2, 2, requires_grad=True), torch.zeros(1, 1, 1, 2)
    ordered_grid_sample(maps, grid).sum().backward()
    assert maps.grad.tolist() == [[[[0.25, 0.25], [0.25, 0.25]]]] and grid.grad is None


def test_on_a_cpu_grid_sample_is_pytorchs_whatever_is_set() -> None:
    maps, grid = torch.randn(1, 2, 3, 3, requires_grad=True), torch.rand(1, 4, 1, 2)
    torch.use_deterministic_algorithms(True)
    try:
        output = grid_sample(maps, grid)
    finally:
        torch.use_deterministic_algorithms(False)
    assert type(output.grad_fn).__name__ == "GridSampler2DBackward0"
    assert torch.equal(output, plain(maps, grid))


@pytest.mark.gpu
def test_a_gpu_gives_the_same_bits_again_where_many_points_meet_in_a_pixel() -> None:
    draws = torch.Generator().manual_seed(1)
    maps = torch.randn(2, 8, 4, 4, generator=draws).cuda()
    grid = (2 * torch.rand(2, 4096, 4, 2, generator=draws) - 1).cuda()
    torch.use_deterministic_algorithms(True)
    try:
        once, again = (gradients(grid_sample, maps, grid) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))
    for found, expected in zip(once, gradients(plain, maps, grid), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
