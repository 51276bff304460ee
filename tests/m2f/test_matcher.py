from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from m2f import matcher
from m2f.config import LossConfig
from m2f.draws import mix, uniform
from m2f.matcher import Divergence, _mask_costs, _sampled_mask_costs, match, pair_cost
from m2f.points import uniform_points
from m2f.types import Prediction, Target

CONFIG = LossConfig(points=64)


def stripes(*labels: int, width: int = 8) -> Target:
    """Vertical stripes of equal width, one per label."""
    segments = (torch.arange(width) * len(labels) // width).expand(8, width)
    return Target.from_segments(torch.tensor(labels), segments)


def answer(target: Target, queries: int, order: list[int], *, classes: int = 5, noise: float = 0.0) -> Prediction:
    """Query order[t] answers for mask t; the other queries say "no object" and nothing."""
    generator = torch.Generator().manual_seed(1)
    class_logits = torch.zeros(1, queries, classes + 1)
    class_logits[..., -1] = 3
    mask_logits = torch.full((1, queries, 8, 8), -4.0)
    for t, query in enumerate(order):
        class_logits[0, query, target.labels[t]] = 6
        mask_logits[0, query] = target.masks[t].float() * 8 - 4
    return Prediction(class_logits, mask_logits + noise * torch.randn(mask_logits.shape, generator=generator))


def pairs(prediction: Prediction, target: Target) -> list[list[int]]:
    return match([prediction], [target], config=CONFIG, seeds=[3])[0, :, 1:].tolist()


def test_the_cost_of_one_pair_is_the_one_worked_out_by_hand():
    # class: probability of class 1 is 0.5; two points with logits ln 3 (sigmoid 0.75) and 0 (0.5), mask 1 and 0:
    # cross entropy (-ln 0.75 - ln 0.5) / 2; dice 1 - (2 * 0.75 + 1) / (1.25 + 1 + 1)
    cost = pair_cost(
        torch.tensor([[[0.0, math.log(2), 0.0]]]),
        torch.tensor([[[math.log(3), 0.0]]]),
        torch.tensor([[1]]),
        torch.tensor([[[1.0, 0.0]]]),
        config=LossConfig(class_weight=2.0, mask_weight=5.0, dice_weight=5.0),
    )
    entropy = (-math.log(0.75) - math.log(0.5)) / 2
    expected = 2 * -0.5 + 5 * entropy + 5 * (1 - 2.5 / 3.25)
    assert cost.shape == (1, 1, 1)
    assert cost.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("order", [[0, 1, 2], [5, 0, 3]])
def test_every_mask_gets_the_query_that_answers_for_it(order):
    target = stripes(1, 0, 2)
    assert pairs(answer(target, 6, order), target) == [[query, t] for t, query in enumerate(order)]


def test_more_masks_than_queries_leave_masks_over():
    target = stripes(1, 0, 2, 3)
    assert pairs(answer(target, 2, [1, 0]), target) == [[1, 0], [0, 1]]


def test_pictures_without_masks_have_no_pairs():
    empty = Target(torch.zeros(0, dtype=torch.long), torch.zeros(0, 8, 8, dtype=torch.bool))
    target = stripes(1, 0)
    prediction = answer(target, 3, [2, 0])
    both = Prediction(*(torch.cat((x, x)) for x in prediction[:2]))
    assert match([prediction], [empty], config=CONFIG, seeds=[1]).shape == (1, 0, 3)
    for targets, image in (([empty, target], 1), ([target, empty], 0)):
        found = match([both, both], targets, config=CONFIG, seeds=[1, 2])
        assert found.tolist() == [[[image, 2, 0], [image, 0, 1]]] * 2


def test_a_batch_is_matched_as_each_of_its_pictures_alone():
    targets = [stripes(1, 0, 2), stripes(3), stripes(0, 1, 2, 3)]
    generator = torch.Generator().manual_seed(0)
    layers = [
        Prediction(torch.randn(3, 6, 6, generator=generator), torch.randn(3, 6, 8, 8, generator=generator))
        for _ in range(2)
    ]
    config, seeds = LossConfig(points=8), [11, 12, 13]
    together = match(layers, targets, config=config, seeds=seeds)
    for b, target in enumerate(targets):
        alone = match(
            [Prediction(p.class_logits[b : b + 1], p.mask_logits[b : b + 1]) for p in layers],
            [target],
            config=config,
            seeds=seeds[b : b + 1],
        )
        assert together[together[..., 0] == b].view(2, -1, 3)[..., 1:].tolist() == alone[..., 1:].tolist()


def test_all_predictions_and_pictures_share_one_draw_of_points(monkeypatch):
    calls = []

    def noted(seeds, **settings):
        calls.append((seeds, uniform_points(seeds, **settings)))
        return calls[-1][1]

    monkeypatch.setattr(matcher, "uniform_points", noted)
    targets = [stripes(1, 0), stripes(3)]
    layers = [Prediction(torch.zeros(2, 6, 6), torch.zeros(2, 6, 8, 8))] * 3
    match(layers, targets, config=CONFIG, seeds=[11, 12])
    ((seeds, points),) = calls
    assert len(seeds) == 3 * 2
    for layer in range(3):  # the numbers that each had when it was drawn alone
        for image, seed in enumerate((11, 12)):
            alone = uniform([mix(seed, 101, layer)], 0, 128).view(64, 2)
            assert torch.equal(points[2 * layer + image], alone)


def test_mask_costs_of_all_predictions_at_once_are_those_of_each():
    generator = torch.Generator().manual_seed(0)
    logits, masks = torch.randn(3, 2, 4, 9, generator=generator), torch.rand(3, 2, 5, 9, generator=generator)
    together = _mask_costs(logits, masks)
    for layer in range(3):
        for all_, one in zip(together, _mask_costs(logits[layer], masks[layer]), strict=True):
            torch.testing.assert_close(all_[layer], one, rtol=1e-6, atol=1e-6)


def test_a_device_other_than_the_cpu_takes_few_operations_for_all_predictions():
    # 10 predictions of 2 images: reading and converting them are some operations each, all else is done once
    def operations(layers):
        made = [Prediction(torch.zeros(2, 6, 6), torch.zeros(2, 6, 8, 8, device="meta")) for _ in range(layers)]
        points, masks = torch.zeros(layers, 2, 64, 2, device="meta"), torch.zeros(layers, 2, 3, 64, device="meta")
        with Counted() as counted:
            entropy, dice = _sampled_mask_costs(made, points, masks)
        assert entropy.shape == dice.shape == (layers, 2, 6, 3)
        return counted.count

    assert operations(10) - operations(1) <= 9 * 10


class Counted(TorchDispatchMode):
    """Counts operations."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_matching_is_float32_under_autocast():
    target = stripes(1, 0, 2)
    prediction = answer(target, 6, [4, 1, 2], noise=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, masks = torch.randn(1, 6, 64), torch.rand(1, 3, 64)
        assert pairs(prediction, target) == [[4, 0], [1, 1], [2, 2]]
        half = Prediction(*(x.bfloat16() for x in prediction[:2]))
        assert pairs(half, target) == [[4, 0], [1, 1], [2, 2]]
    cost = pair_cost(prediction.class_logits.bfloat16(), logits, target.labels[None], masks, config=CONFIG)
    assert cost.dtype == torch.float32


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        (0, math.nan, r"diverged: class logits \(1 of 24\) of auxiliary prediction 0, image 0 of the batch, are not"),
        (
            1,
            math.inf,
            r"diverged: mask logits \(64 of 256\) of auxiliary prediction 0, image 0 of the batch, are not",
        ),
        (1, 3e38, "diverged: mask logits, too large to add up, of auxiliary prediction 0, image 0 of the batch"),
    ],
)
def test_a_cost_that_is_not_finite_is_divergence_and_says_where(part, value, message):
    target = stripes(1, 0)
    good = answer(target, 4, [0, 1])
    parts = [good.class_logits.clone(), good.mask_logits.clone()]
    parts[part][0, 2] = torch.tensor([value] + [0.0] * 5) if part == 0 else value
    with pytest.raises(Divergence, match=message) as caught:
        match([Prediction(*parts), good], [target], config=CONFIG, seeds=[0])
    assert isinstance(caught.value, FloatingPointError)
