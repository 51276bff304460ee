"""Names are legible wherever they stand, and cover no other name."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.data.images.draw import class_colours
from pipeline.prediction.annotations import Objects
from pipeline.prediction.drawing import MOST_SIDE, overlay


def halves(height: int, width: int) -> Objects:
    """The left half is of the class 0, the right one of the class 1."""
    ids = np.zeros((height, width), np.int32)
    ids[:, width // 2 :] = 1
    return Objects(ids=ids, labels=[0, 1])


@pytest.mark.parametrize("brightness", [0, 255])
def test_names_are_white_on_a_dark_box_on_dark_and_on_light_pictures(brightness: int) -> None:
    image = np.full((120, 240, 3), brightness, np.uint8)
    drawn = overlay(image, halves(120, 240), ["sky", "road"], borders=False)
    left = drawn[40:80, 20:100].reshape(-1, 3)
    assert (left.min(1) > 225).any()  # letters
    assert (left.max(1) < 110).sum() > 100  # the box below them


def test_every_object_has_its_class_s_colour_and_the_rest_stays_as_it_is() -> None:
    image = np.full((120, 240, 3), 100, np.uint8)
    objects = Objects(ids=np.full((120, 240), -1, np.int32), labels=[1])
    objects.ids[:60] = 0
    drawn = overlay(image, objects, ["sky", "road"], borders=False)
    assert (drawn[70:] == 100).all()
    assert drawn[2, 2].tolist() == (50 + class_colours(2)[1] / 2).astype(np.uint8).tolist()


def test_colours_of_classes_are_distinct() -> None:
    colours = class_colours(171)
    assert len({tuple(colour) for colour in colours.tolist()}) == 171


def test_a_name_that_finds_no_room_is_left_out() -> None:
    image = np.full((8, 12, 3), 200, np.uint8)
    drawn = overlay(image, halves(8, 12), ["a name longer than the picture", "b"], borders=False)
    tints = (100 + class_colours(2) / 2).astype(np.uint8)
    assert (drawn[:, :6] == tints[0]).all() and (drawn[:, 6:] == tints[1]).all()


def test_an_overlay_of_a_huge_picture_is_smaller() -> None:
    image = np.zeros((20, 2 * MOST_SIDE, 3), np.uint8)
    assert overlay(image, halves(20, 2 * MOST_SIDE), ["a", "b"], borders=True).shape == (10, MOST_SIDE, 3)
