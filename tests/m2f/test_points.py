from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from m2f.draws import mix, uniform
from m2f.points import TrueMasks, sample_logits, sample_masks, uncertain_points, uniform_points
from m2f.types import Target

SEGMENTS = torch.tensor([[0, 0, 1], [2, 255, 1]], dtype=torch.uint8)
"""Two rows, three columns; mask 3 has no pixel, one pixel has no mask."""
LABELS = torch.tensor([4, 5, 6, 7])


def both_forms(segments: torch.Tensor = SEGMENTS, labels: torch.Tensor = LABELS) -> tuple[Target, Target]:
    target = Target.from_segments(labels, segments)
    return target, Target(labels, target.masks)


@pytest.mark.parametrize("form", [0, 1], ids=["segments", "dense"])
def test_masks_are_read_bilinearly_and_are_zero_outside_the_picture(form):
    # pixel (row 0, column 0) has its centre at x = 0.5 / 3, y = 0.5 / 2
    points = torch.tensor([[0.5 / 3, 0.25], [1.0 / 3, 0.5], [2.0 / 3, 0.25], [0.0, 0.0], [0.5 / 3, 1.0], [-0.4, 0.5]])
    values = sample_masks(both_forms()[form], points)
    expected = torch.tensor(
        # centre; four corners 0 0 2 -; half 0, half 1; a quarter inside; half inside; outside
        [
            [1.0, 0.5, 0.5, 0.25, 0.0, 0.0],
            [0.0, 0.0, 0.5, 0.0, 0.0, 0.0],
            [0.0, 0.25, 0.0, 0.0, 0.5, 0.0],
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        ]
    )
    torch.testing.assert_close(values, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("form", [0, 1], ids=["segments", "dense"])
def test_masks_agree_with_grid_sample_of_the_dense_masks(form):
    generator = torch.Generator().manual_seed(0)
    segments = torch.randint(-1, 4, (9, 13), generator=generator)
    target = both_forms(segments)[form]
    shared = torch.rand(50, 2, generator=generator) * 1.2 - 0.1
    own = torch.rand(4, 50, 2, generator=generator)
    dense = target.masks.float()
    expected_shared = F.grid_sample(dense[None], 2 * shared[None, None] - 1, align_corners=False)[0, :, 0]
    expected_own = F.grid_sample(dense[:, None], 2 * own[:, None] - 1, align_corners=False)[:, 0, 0]
    torch.testing.assert_close(sample_masks(target, shared), expected_shared, atol=1e-5, rtol=0)
    torch.testing.assert_close(sample_masks(target, own), expected_own, atol=1e-5, rtol=0)


def test_overlapping_masks_are_read_independently():
    masks = torch.tensor([[[1, 1]], [[0, 1]]]).bool()
    values = sample_masks(Target(torch.tensor([0, 1]), masks), torch.tensor([[0.25, 0.5], [0.75, 0.5]]))
    assert values.tolist() == [[1, 1], [0, 1]]


def test_a_batch_that_mixes_forms_and_counts_reads_what_each_picture_alone_reads():
    segments, dense = both_forms()
    empty = Target(torch.zeros(0, dtype=torch.long), torch.zeros(0, 2, 3, dtype=torch.bool))
    one = Target(torch.tensor([3]), SEGMENTS[None] == 2)
    targets = [one, empty, segments, dense]
    points = uniform_points([1, 2, 3, 4], points=20, device="cpu")
    batch = TrueMasks.of(targets).at_shared_points(points)
    for b, target in enumerate(targets):
        assert torch.equal(batch[b, : len(target)], sample_masks(target, points[b]))


def test_targets_of_different_sizes_are_refused_in_one_sentence():
    small = Target.from_label_map(torch.zeros(2, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"one \(height, width\), got \[\(2, 2\), \(2, 3\)\]; pad them alike"):
        TrueMasks.of([small, both_forms()[0]])


def test_logits_are_read_like_grid_sample():
    logits = torch.arange(6.0).view(1, 1, 2, 3)
    # centre of pixel (1, 2); between pixels 0, 1, 3, 4
    points = torch.tensor([[[2.5 / 3, 0.75], [1 / 3, 0.5]]])
    torch.testing.assert_close(sample_logits(logits, points), torch.tensor([[[5.0, 2.0]]]))


def test_three_quarters_of_the_points_are_the_least_certain_candidates():
    logits = torch.linspace(-8, 8, 64).expand(1, 8, 64)  # certain left and right, doubtful in the middle
    points = uncertain_points(logits, [5], points=40, oversample=3.0, importance=0.75)
    drawn = uniform([5], 0, 2 * (120 + 10)).view(130, 2)
    doubt = (drawn[:120, 0] - 0.5).abs().sort().values
    assert points.shape == (1, 40, 2)
    torch.testing.assert_close((points[0, :30, 0] - 0.5).abs().sort().values, doubt[:30])
    assert torch.equal(points[0, 30:], drawn[120:])


def test_points_depend_on_the_masks_seed_alone():
    logits = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    seeds = [mix(1, 2), 7, 123456789012]
    settings = {"points": 16, "oversample": 3.0, "importance": 0.75}
    together = uncertain_points(logits, seeds, **settings)
    for order in ([2, 0, 1], [1]):
        again = uncertain_points(logits[order], [seeds[i] for i in order], **settings)
        assert torch.equal(again, together[order])
    assert not torch.equal(together[0, 12:], together[1, 12:])
