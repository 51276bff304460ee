from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from m2f.config import LossConfig
from m2f.losses import GroupTotals, group_totals, set_losses
from m2f.matcher import Divergence
from m2f.types import Prediction, Target

REFERENCE = Path(__file__).parents[1] / "reference"
CONFIG = LossConfig(points=64)


def image(seed: int, masks: int, *, dense: bool = False) -> Target:
    """Random blobs, 16 x 24 pixels; some pixels belong to no mask."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(-1, max(masks, 1), (4, 6), generator=generator) if masks else torch.full((4, 6), -1)
    segments = coarse.repeat_interleave(4, 0).repeat_interleave(4, 1)
    labels = torch.randint(0, 5, (masks,), generator=generator)
    target = Target.from_segments(labels, segments)
    return Target(labels, target.masks) if dense else target


def answers(images: int, *, layers: int = 3, queries: int = 7, seed: int = 0) -> Prediction:
    generator = torch.Generator().manual_seed(seed)
    made = [
        Prediction(
            torch.randn(images, queries, 6, generator=generator).requires_grad_(),
            (3 * torch.randn(images, queries, 4, 6, generator=generator)).requires_grad_(),
        )
        for _ in range(layers)
    ]
    return Prediction(made[-1].class_logits, made[-1].mask_logits, tuple(made[:-1]))


def part(prediction: Prediction, images: slice) -> Prediction:
    return Prediction(
        prediction.class_logits[images],
        prediction.mask_logits[images],
        tuple(part(p, images) for p in prediction.auxiliary),
    )


def assert_sums_to(whole: dict[str, torch.Tensor], *parts: dict[str, torch.Tensor]) -> None:
    for key, value in whole.items():
        assert value.item() == pytest.approx(sum(p[key].item() for p in parts), rel=1e-5), key


def test_losses_of_one_query_and_one_mask_are_those_worked_out_by_hand():
    # all pixels alike, and a mask without pixels, so that the points do not matter
    # class: 2 queries, probability 1/2 of the true class (weight 1) and of no object (weight 0.1): -ln 0.5 for both,
    # weighted mean ln 2, times 2. mask: sigmoid(0) = 0.5 against 0: ln 2, times 5 / 2 masks.
    # dice: 1 - 1 / (0.5 * 64 + 0 + 1), times 5 / 2
    target = Target(torch.tensor([0]), torch.zeros(1, 8, 8, dtype=torch.bool))
    prediction = Prediction(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2, 2))
    losses = set_losses(prediction, [target], num_masks=2.0, config=CONFIG, seeds=[1])
    assert {k: pytest.approx(v.item(), rel=1e-6) for k, v in losses.items()} == {
        "loss_class": 2 * math.log(2),
        "loss_mask": 2.5 * math.log(2),
        "loss_dice": 2.5 * (1 - 1 / 33),
    }


def test_losses_equal_the_reference_implementations():
    arrays = np.load(REFERENCE / "losses.npz")
    expected = json.loads((REFERENCE / "losses.json").read_text())
    width = int(arrays["mask_shape"][1])
    targets = [
        Target(
            torch.from_numpy(arrays[f"labels_image{b}"]),
            torch.from_numpy(np.unpackbits(arrays[f"masks_image{b}"], axis=-1)[..., :width]).bool(),
        )
        for b in range(2)
    ]
    first, last = (
        Prediction(
            torch.from_numpy(arrays[f"class_logits_layer{layer}"]),
            torch.from_numpy(arrays[f"mask_logits_layer{layer}"]).float(),
        )
        for layer in range(2)
    )
    prediction = Prediction(last.class_logits, last.mask_logits, (first,))
    draws = [
        set_losses(
            prediction, targets, num_masks=sum(map(len, targets)), config=LossConfig(), seeds=[2 * seed, 2 * seed + 1]
        )
        for seed in range(20)
    ]
    for ours, theirs in (("", ""), ("aux0.", "d0.")):
        for name, reference_name in (
            ("loss_class", "loss_cls"),
            ("loss_mask", "loss_mask"),
            ("loss_dice", "loss_dice"),
        ):
            mean = sum(draw[ours + name].item() for draw in draws) / len(draws)
            reference = expected[theirs + reference_name]
            standard_error = reference["std"] * math.sqrt(1 / len(draws) + 1 / reference["n"])
            assert abs(mean - reference["mean"]) <= 0.002 * reference["mean"] + 2 * standard_error, ours + name


def test_segment_maps_and_dense_masks_give_the_same_losses():
    prediction = answers(2)
    segments, dense = (
        set_losses(prediction, [image(1, 3, dense=d), image(2, 5, dense=d)], num_masks=8.0, config=CONFIG, seeds=[1, 2])
        for d in (False, True)
    )
    assert segments.keys() == dense.keys()
    assert_sums_to(segments, dense)


def test_segment_maps_never_become_masks(monkeypatch):
    def refuse(self):
        raise AssertionError("dense masks were made of a segment map")

    targets = [image(1, 3), image(2, 5)]
    monkeypatch.setattr(Target, "masks", property(refuse))
    set_losses(answers(2), targets, num_masks=8.0, config=CONFIG, seeds=[1, 2])


def test_device_and_host_meet_once_for_all_pictures_and_layers(monkeypatch):
    calls = []
    for name in ("cpu", "item", "__bool__", "__int__", "__float__"):
        plain = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, plain=plain, name=name: (calls.append(name), plain(self, *a))[1]
        )
    set_losses(answers(3), [image(1, 3), image(2, 0), image(3, 5)], num_masks=8.0, config=CONFIG, seeds=[1, 2, 3])
    assert calls == ["cpu"]


def test_two_groups_in_one_call_equal_two_calls():
    prediction, seeds = answers(4), [5, 6, 7, 8]
    targets = [image(1, 3), image(2, 5), image(3, 1), image(4, 9)]
    # 7 queries: the group of 1 and 9 masks has 1 + 7 matched
    totals = [group_totals([len(t) for t in targets[s]], queries=7, config=CONFIG) for s in (slice(0, 2), slice(2, 4))]
    assert totals == [GroupTotals(8 + 0.1 * 6, 8), GroupTotals(8 + 0.1 * 6, 8)]
    separate = [
        set_losses(part(prediction, s), targets[s], num_masks=8.0, config=CONFIG, seeds=seeds[s])
        for s in (slice(0, 2), slice(2, 4))
    ]
    weights = [total.class_weight for total in totals for _ in range(2)]
    together = set_losses(prediction, targets, num_masks=8.0, config=CONFIG, seeds=seeds, class_weight_totals=weights)
    assert_sums_to(together, *separate)


@pytest.mark.parametrize("cuts", [[0, 1, 2, 3], [0, 2, 3], [0, 3]])
def test_pictures_of_a_group_may_be_computed_apart_given_the_groups_totals(cuts):
    prediction, seeds = answers(3), [5, 6, 7]
    targets = [image(1, 3), image(2, 0), image(3, 4)]
    whole = set_losses(prediction, targets, num_masks=7.0, config=CONFIG, seeds=seeds)
    totals = group_totals([3, 0, 4], queries=7, config=CONFIG)
    assert totals == GroupTotals(7 + 0.1 * 14, 8)  # the picture without masks counts as one
    parts = [
        set_losses(
            part(prediction, slice(a, b)),
            targets[a:b],
            num_masks=7.0,
            config=CONFIG,
            seeds=seeds[a:b],
            class_weight_totals=[totals.class_weight] * (b - a),
        )
        for a, b in itertools.pairwise(cuts)
    ]
    assert_sums_to(whole, *parts)


def test_a_pictures_draws_do_not_depend_on_its_place_in_the_batch():
    prediction, seeds = answers(3), [5, 6, 7]
    targets = [image(1, 3), image(2, 6), image(3, 4)]
    order = [2, 0, 1]
    reordered = Prediction(
        prediction.class_logits[order],
        prediction.mask_logits[order],
        tuple(Prediction(p.class_logits[order], p.mask_logits[order]) for p in prediction.auxiliary),
    )
    settings = {"num_masks": 13.0, "config": CONFIG}
    first = set_losses(prediction, targets, seeds=seeds, **settings)
    again = set_losses(reordered, [targets[i] for i in order], seeds=[seeds[i] for i in order], **settings)
    other = set_losses(prediction, targets, seeds=[8, 9, 10], **settings)
    assert_sums_to(first, again)
    assert abs(first["loss_mask"].item() - other["loss_mask"].item()) > 1e-4


def test_a_seed_repeats_its_losses_bit_for_bit():
    prediction, targets = answers(2), [image(1, 3), image(2, 6)]
    first, again = (set_losses(prediction, targets, num_masks=9.0, config=CONFIG, seeds=[1, 2]) for _ in range(2))
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_pictures_without_masks_teach_no_object_and_leave_masks_alone():
    prediction = answers(2, layers=2)
    losses = set_losses(prediction, [image(1, 0), image(2, 0)], num_masks=1.0, config=CONFIG, seeds=[1, 2])
    no_object = -prediction.class_logits.log_softmax(-1)[..., -1].mean()
    assert losses["loss_class"].item() == pytest.approx(2 * no_object.item(), rel=1e-5)
    assert losses["loss_mask"].item() == losses["aux0.loss_dice"].item() == 0
    sum(losses.values()).backward()
    assert prediction.class_logits.grad.abs().sum() > 0
    assert prediction.mask_logits.grad.abs().sum() == 0


def test_gradients_reach_every_class_logit_and_the_matched_masks_of_every_layer():
    prediction, targets = answers(2), [image(1, 3), image(2, 9)]
    sum(set_losses(prediction, targets, num_masks=6.0, config=CONFIG, seeds=[1, 2]).values()).backward()
    for layer in (*prediction.auxiliary, prediction):
        assert (layer.class_logits.grad != 0).all()
        touched = layer.mask_logits.grad.flatten(2).abs().sum(2) > 0
        assert touched.sum(1).tolist() == [3, 7]  # min(masks, queries)


def test_the_gradient_is_the_losses_slope():
    prediction, targets = answers(1, layers=1), [image(1, 3)]
    config = LossConfig(points=64, oversample=1.0, importance=0.0)  # fixed points

    def total(mask_logits: torch.Tensor) -> torch.Tensor:
        losses = set_losses(
            Prediction(prediction.class_logits, mask_logits), targets, num_masks=3.0, config=config, seeds=[1]
        )
        return losses["loss_mask"] + losses["loss_dice"]

    logits = prediction.mask_logits
    gradient = torch.autograd.grad(total(logits), logits)[0]
    step = 1e-2 * gradient / gradient.norm()
    slope = (total(logits + step) - total(logits - step)).item() / 2e-2
    assert slope == pytest.approx(gradient.norm().item(), rel=1e-2)


def test_losses_are_float32_under_autocast():
    prediction, targets = answers(2), [image(1, 3), image(2, 4)]
    plain = set_losses(prediction, targets, num_masks=7.0, config=CONFIG, seeds=[1, 2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = set_losses(prediction, targets, num_masks=7.0, config=CONFIG, seeds=[1, 2])
    assert all(autocast[key].dtype == torch.float32 and torch.equal(autocast[key], plain[key]) for key in plain)


def test_keys_are_the_last_prediction_then_the_auxiliary_ones():
    losses = set_losses(answers(1), [image(1, 2)], num_masks=2.0, config=CONFIG, seeds=[1])
    names = ["loss_class", "loss_mask", "loss_dice"]
    assert list(losses) == [prefix + name for prefix in ("", "aux0.", "aux1.") for name in names]
    assert all(loss.shape == () for loss in losses.values())


def test_numbers_that_are_not_finite_stop_the_run():
    prediction = answers(1)
    with torch.no_grad():
        prediction.mask_logits[0, 0, 0, 0] = math.nan
    with pytest.raises(Divergence, match=r"mask logits \(1 of 168\) of the last prediction, image 0"):
        set_losses(prediction, [image(1, 2)], num_masks=2.0, config=LossConfig(points=1024), seeds=[1])


def test_wrong_counts_are_refused():
    with pytest.raises(ValueError, match="2 images need as many targets and seeds, got 1 and 2"):
        set_losses(answers(2), [image(1, 2)], num_masks=2.0, config=CONFIG, seeds=[1, 2])
    with pytest.raises(ValueError, match="1 images need as many class_weight_totals, got 2"):
        set_losses(answers(1), [image(1, 2)], num_masks=2.0, config=CONFIG, seeds=[1], class_weight_totals=[1.0, 1.0])


def test_the_class_loss_is_a_mean_weighted_by_the_true_classes():
    # one image, 3 queries, masks of class 0 (weight 3) and 1 (weight 0.5), no object 0.1; every class is equally
    # probable but for query logits that put nothing else at stake, so that each query costs ln 3 times its weight:
    # ln 3 * (3 + 0.5 + 0.1) / (3 + 0.5 + 0.1) = ln 3, times 2
    config = LossConfig(points=64, class_weights=(3.0, 0.5))
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    target = Target(torch.tensor([0, 1]), masks)
    even = Prediction(torch.zeros(1, 3, 3), torch.zeros(1, 3, 2, 2))
    losses = set_losses(even, [target], num_masks=2.0, config=config, seeds=[1])
    assert losses["loss_class"].item() == pytest.approx(2 * math.log(3), rel=1e-6)
    # all queries sure of class 0, with odds of e^4: it costs a = ln(1 + 2 e^-4), each of the others a + 4
    sure = Prediction(torch.tensor([[[4.0, 0.0, 0.0]] * 3]), torch.zeros(1, 3, 2, 2))
    losses = set_losses(sure, [target], num_masks=2.0, config=config, seeds=[1])
    a = math.log(1 + 2 * math.exp(-4))
    assert losses["loss_class"].item() == pytest.approx(2 * (3 * a + (0.5 + 0.1) * (a + 4)) / 3.6, rel=1e-6)
    by_torch = torch.nn.functional.cross_entropy(
        sure.class_logits[0], torch.tensor([0, 1, 2]), weight=torch.tensor([3.0, 0.5, 0.1])
    )
    assert losses["loss_class"].item() == pytest.approx(2 * by_torch.item(), rel=1e-6)


def test_totals_of_weighted_classes_are_known_before_matching():
    config = LossConfig(class_weights=(3.0, 0.5))
    labels = [torch.tensor([0, 1]), torch.tensor([], dtype=torch.int64)]
    # 3 + 0.5, and 2 + 4 queries of no object
    assert group_totals([2, 0], queries=4, config=config, labels=labels) == GroupTotals(3.5 + 0.1 * 6, 3)
    # more masks than queries: 2 of the mean of 3, 0.5 and 0.5
    totals = group_totals([3], queries=2, config=config, labels=[torch.tensor([0, 1, 1])])
    assert totals.class_weight == pytest.approx(2 * 4 / 3)


def test_class_weights_of_one_change_nothing():
    prediction, seeds, targets = answers(2), [5, 6], [image(1, 3), image(2, 5)]
    plain = set_losses(prediction, targets, num_masks=8.0, config=CONFIG, seeds=seeds)
    ones = LossConfig(points=64, class_weights=(1.0,) * 5)
    assert plain == set_losses(prediction, targets, num_masks=8.0, config=ones, seeds=seeds)
