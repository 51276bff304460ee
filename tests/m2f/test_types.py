from __future__ import annotations

import pytest
import torch

from m2f import Prediction, Target
from m2f.config import LossConfig
from m2f.losses import set_losses


def test_a_label_map_gives_one_mask_per_class_present_by_rising_id() -> None:
    target = Target.from_label_map(torch.tensor([[3, 0], [255, 3]], dtype=torch.uint8))
    assert target.labels.tolist() == [0, 3]
    assert target.masks.tolist() == [[[False, True], [False, False]], [[True, False], [False, True]]]


def test_another_ignore_label_is_honoured() -> None:
    target = Target.from_label_map(torch.tensor([[11, 2]]), ignore_label=11)
    assert target.labels.tolist() == [2]


def test_a_map_of_nothing_but_ignored_pixels_has_no_masks() -> None:
    target = Target.from_label_map(torch.full((2, 2), 255, dtype=torch.uint8))
    assert len(target) == 0 and target.masks.shape == (0, 2, 2)


def test_masks_given_as_masks_stay_as_they_are() -> None:
    masks = torch.tensor([[[True, True]], [[False, True]]])  # they overlap
    target = Target(torch.tensor([4, 4]), masks)
    assert torch.equal(target.masks, masks)


def test_labels_and_masks_must_agree_in_number() -> None:
    with pytest.raises(ValueError, match="2 labels for 1 masks"):
        Target(torch.tensor([1, 2]), torch.zeros(1, 2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="either masks or segments"):
        Target(torch.tensor([1]))


def test_a_picture_without_dense_masks_changes_nothing_for_the_others():
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(3, 16, 16, generator=generator) > 0.5
    empty = Target(torch.zeros(0, dtype=torch.long), torch.zeros(0, 16, 16, dtype=torch.bool))
    full = Target(torch.tensor([0, 1, 1]), masks)
    logits = torch.randn(2, 5, 3, generator=generator), torch.randn(2, 5, 4, 4, generator=generator)
    settings = {"num_masks": 3.0, "config": LossConfig(points=64)}

    def losses(images, targets):
        prediction = Prediction(*(part[images] for part in logits))
        totals = [4.0] * len(targets)
        return set_losses(prediction, targets, seeds=images, class_weight_totals=totals, **settings)

    together, first, second = losses([0, 1], [empty, full]), losses([0], [empty]), losses([1], [full])
    for name, value in together.items():
        torch.testing.assert_close(value, first[name] + second[name])
    assert first["loss_mask"] == first["loss_dice"] == 0 < first["loss_class"]
    for name, value in losses([0, 0], [empty, empty]).items():  # none at all
        torch.testing.assert_close(value, 2 * first[name])
