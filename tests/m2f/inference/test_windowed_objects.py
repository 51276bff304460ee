"""Segments and instances of overlapping windows become those of the picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from m2f.inference import Instances, Segments
from m2f.inference.windowed import window_strips
from m2f.inference.windowed_objects import InstanceMerger, SegmentMerger, cropped_instances, dense_instances

SIZE = (2, 12)
STRIPS = window_strips(SIZE, window=8, overlap=4)  # pixels 0 to 7 and 4 to 11; from 6 on they are the second's


def segments(
    row: Sequence[int], labels: Sequence[int], scores: Sequence[float], things: Sequence[int] = (2,)
) -> Segments:
    return Segments(
        segments=torch.tensor([row, row], dtype=torch.int32),
        labels=torch.tensor(labels),
        is_thing=torch.tensor([label in things for label in labels]),
        scores=torch.tensor(scores),
    )


def merged(first: Segments, second: Segments) -> Segments:
    merger = SegmentMerger(SIZE)
    for strip, found in zip(STRIPS, (first, second), strict=True):
        merger.add(strip[0].window, found)
    return merger.result()


def test_a_thing_that_two_windows_show_in_one_place_is_one_segment() -> None:
    # a car at 5 to 9 on a road: both windows see 5, 6 and 7
    found = merged(
        segments([0, 0, 0, 0, 0, 1, 1, 1], [0, 2], [0.9, 0.6]), segments([0, 1, 1, 1, 1, 1, 0, 0], [0, 2], [0.8, 0.7])
    )
    assert found.segments[0].tolist() == [0] * 5 + [1] * 5 + [0] * 2
    assert found.labels.tolist() == [0, 2] and found.is_thing.tolist() == [False, True]
    assert found.scores.tolist() == pytest.approx([0.9, 0.7])


def test_things_that_share_less_than_half_stay_apart() -> None:
    # at 4 and 5 in the first window, 5 to 7 in the second: 1 of 4 pixels
    found = merged(
        segments([0, 0, 0, 0, 1, 1, 0, 0], [0, 2], [0.9, 0.6]), segments([0, 1, 1, 1, 0, 0, 0, 0], [0, 2], [0.8, 0.7])
    )
    assert found.segments[0].tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 0, 0, 0, 0]
    assert found.labels.tolist() == [0, 2, 2]


def test_things_of_two_classes_stay_apart_and_a_segment_without_pixels_is_none() -> None:
    first = segments([-1, -1, -1, -1, -1, -1, 0, 0], [2], [0.5], things=(2, 3))  # all of it is the second window's
    second = segments([-1, -1, 0, 0, -1, -1, -1, -1], [3], [0.6], things=(2, 3))
    found = merged(first, second)
    assert found.segments[0].tolist() == [-1] * 6 + [0] * 2 + [-1] * 4 and found.labels.tolist() == [3]


def test_an_object_over_three_windows_is_one() -> None:
    strips = window_strips((1, 16), window=8, overlap=4)
    merger = SegmentMerger((1, 16))
    for strip in strips:
        merger.add(strip[0].window, Segments(
            segments=torch.zeros(1, 8, dtype=torch.int32), labels=torch.tensor([2]),
            is_thing=torch.tensor([True]), scores=torch.tensor([0.5]),
        ))  # fmt: skip
    found = merger.result()
    assert found.segments.tolist() == [[0] * 16] and found.labels.tolist() == [2]


def instances(*found: tuple[int, float, str]) -> Instances:
    """Label, score and one row of the mask of each."""
    masks = torch.tensor([[[pixel == "#" for pixel in row]] * 2 for _, _, row in found]).reshape(len(found), 2, -1)
    labels, scores = torch.tensor([each[0] for each in found]), torch.tensor([each[1] for each in found])
    return Instances(scores=scores, labels=labels, masks=masks, boxes=torch.zeros(len(found), 4))


def test_instances_of_one_place_are_united_and_the_unsure_left_out() -> None:
    merger = InstanceMerger(SIZE)
    merger.add(STRIPS[0][0].window, instances((0, 0.9, ".....###"), (0, 0.5, "##......"), (0, 0.04, "########")))
    merger.add(STRIPS[1][0].window, instances((0, 0.8, ".#####.."), (1, 0.7, ".###....")))
    found = merger.result()
    assert [(each.label, round(each.score, 2)) for each in found] == [(0, 0.9), (1, 0.7), (0, 0.5)]
    rows = ["".join("#" if pixel else "." for pixel in each.within(0, 1, 0, 12)[0]) for each in found]
    assert rows == [".....#####..", ".....###....", "##.........."]
    dense = dense_instances(found, SIZE)
    assert dense.boxes.tolist() == [[5, 0, 10, 2], [5, 0, 8, 2], [0, 0, 2, 2]]
    assert np.array_equal(dense.masks[0, 1].numpy(), np.array(list(rows[0])) == "#")
    again = cropped_instances(dense)
    assert [np.array_equal(one.mask, other.mask) for one, other in zip(again, found, strict=True)] == [True] * 3


def test_an_instance_is_united_with_the_one_that_is_most_like_it() -> None:
    merger = InstanceMerger(SIZE)
    merger.add(STRIPS[0][0].window, instances((0, 0.9, "....####")))
    # three of four pixels, and all four: the second
    merger.add(STRIPS[1][0].window, instances((0, 0.8, "###....."), (0, 0.7, "#####...")))
    rows = [each.within(0, 1, 0, 12)[0].astype(int).tolist() for each in merger.result()]
    assert rows == [[0] * 4 + [1] * 5 + [0] * 3, [0] * 4 + [1] * 3 + [0] * 5]
