from __future__ import annotations

import pytest
import torch

from m2f.deformable_attention import DeformableAttention, sample_and_sum


def test_a_sample_at_a_pixels_centre_is_that_pixel_and_weights_add_levels() -> None:
    # level 0 is 1 x 2 with values 1, 2; level 1 is 1 x 1 with value 10; one head of width 1, one point per level
    value = torch.tensor([1.0, 2.0, 10.0]).view(1, 3, 1, 1)
    locations = torch.tensor([[0.75, 0.5], [0.5, 0.5]]).view(1, 1, 1, 2, 1, 2)
    weights = torch.tensor([0.25, 0.75]).view(1, 1, 1, 2, 1)
    out = sample_and_sum(value, ((1, 2), (1, 1)), locations, weights)
    assert out.item() == pytest.approx(0.25 * 2 + 0.75 * 10)


def test_a_sample_between_two_pixels_is_their_mean_and_outside_counts_as_zero() -> None:
    value = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
    one = torch.ones(1, 1, 1, 1, 1)

    def at(x: float) -> float:
        return sample_and_sum(value, ((1, 2),), torch.tensor([x, 0.5]).view(1, 1, 1, 1, 1, 2), one).item()

    assert at(0.5) == pytest.approx(1.5)
    assert at(0.0) == pytest.approx(0.5)  # halfway between zero padding and pixel 0
    assert at(-1.0) == 0.0


def test_offsets_start_as_one_ray_per_head_and_count_in_pixels_of_the_level() -> None:
    attention = DeformableAttention(8, heads=4, levels=1, points=2)
    bias = attention.offsets.bias.view(4, 1, 2, 2)
    # heads look right, down, left, up; the second point is twice as far
    expected = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    torch.testing.assert_close(bias[:, 0, 0], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(bias[:, 0, 1], 2 * expected, atol=1e-6, rtol=0)


def test_gradients_agree_with_finite_differences() -> None:
    torch.manual_seed(0)
    value = torch.randn(1, 6, 2, 2, dtype=torch.float64, requires_grad=True)
    locations = torch.rand(1, 3, 2, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(1, 3, 2, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, p, w: sample_and_sum(v, ((2, 3),), p, w), (value, locations, weights))
