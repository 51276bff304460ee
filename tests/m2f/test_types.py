from __future__ import annotations

import pytest
import torch

from m2f import Target


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
