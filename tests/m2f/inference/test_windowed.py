"""A picture in windows: where they lie, how their scores are blended, and what is remembered."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from m2f import Prediction
from m2f.inference import semantic_labels, windowed
from m2f.inference.windowed import Seen, Window, window_strips, windowed_labels

See = Callable[[Window], Seen]


def test_windows_cover_a_side_evenly_with_at_least_the_overlap() -> None:
    # (25 - 4) / (10 - 4) = 3.5: four windows, (25 - 10) / 3 = 5 apart
    strips = window_strips((10, 25), window=10, overlap=4)
    assert [strip[0].window[:4] for strip in strips] == [(0, left, 10, 10) for left in (0, 5, 10, 15)]
    # two neighbours share 5 pixels, of which the first 2 are the earlier one's
    assert [strip[0].window.own_left for strip in strips] == [0, 7, 12, 17]
    assert [(strip[0].left, strip[0].right) for strip in strips] == [(0, 5), (5, 10), (10, 15), (15, 25)]


def test_strips_run_across_the_shorter_side() -> None:
    assert [len(strip) for strip in window_strips((30, 10), window=10, overlap=0)] == [1, 1, 1]
    assert [len(strip) for strip in window_strips((10, 30), window=10, overlap=0)] == [1, 1, 1]
    assert [len(strip) for strip in window_strips((20, 30), window=10, overlap=0)] == [2, 2, 2]


def test_a_picture_smaller_than_a_window_is_one_window() -> None:
    (((window, *_),),) = window_strips((7, 9), window=10, overlap=5)
    assert window[:4] == (0, 0, 7, 9)


@pytest.mark.parametrize("overlap", [0, 3, 5])
@pytest.mark.parametrize("side", range(10, 64))
def test_no_pixel_lies_in_more_windows_than_are_looked_at(side: int, overlap: int) -> None:
    starts = [strip[0].window.left for strip in window_strips((10, side), window=10, overlap=overlap)]
    assert starts[0] == 0 and starts[-1] == max(0, side - 10)
    assert all(before < after <= before + 10 - overlap for before, after in pairwise(starts))
    for place, start in enumerate(starts):
        covering = [other for other in range(place + 1) if starts[other] + 10 > start]
        assert place - covering[0] <= windowed._REACH


@pytest.mark.parametrize(("window", "overlap"), [(10, 6), (10, -1), (0, 0)])
def test_windows_that_cannot_be_are_refused(window: int, overlap: int) -> None:
    with pytest.raises(ValueError, match=f"windows of {window} pixels cannot overlap by {overlap}"):
        window_strips((30, 30), window=window, overlap=overlap)


def seen(class_logits_QC1: Tensor, masks_Qhw: Tensor) -> Seen:
    size = (4 * masks_Qhw.shape[1], 4 * masks_Qhw.shape[2])
    return Seen(Prediction(class_logits_QC1[None], masks_Qhw[None]), size, size)


@pytest.mark.parametrize("resize", ["scores", "logits"])
def test_one_window_has_the_labels_of_the_whole_picture(resize: str) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = seen(torch.randn(5, 4, generator=generator), torch.randn(5, 8, 6, generator=generator))
    strips = window_strips((30, 21), window=64, overlap=8)
    expected = semantic_labels(whole.prediction, (30, 21), (32, 24), padded_size=(32, 24), resize=resize)[0]  # type: ignore[arg-type]
    found = windowed_labels(strips, (30, 21), lambda _: whole, overlap=8, resize=resize)  # type: ignore[arg-type]
    assert found is not None and torch.equal(found, expected)


def sides(left: float, right: float) -> See:
    """Windows of 8 x 8 from two: the first is all class 0 with a probability, the second all class 1."""

    def see(window: Window) -> Seen:
        share = right if window.left else left
        # a probability p among two classes: log(p) and log(1 - p), no object has next to none
        logits = torch.tensor([[share, 1 - share, 1e-9]]).log()
        return seen(logits if not window.left else logits[:, [1, 0, 2]], torch.full((1, 2, 2), 20.0))

    return see


def test_scores_are_blended_before_the_highest_is_taken() -> None:
    # 12 pixels, windows at 0 and 4, which share the pixels 4 to 7. There the first counts 4, 3, 2, 1 fifths and the
    # second 1, 2, 3, 4. Sure of their classes alike, the label changes in the middle:
    strips = window_strips((8, 12), window=8, overlap=4)
    labels = windowed_labels(strips, (8, 12), sides(0.9, 0.9), overlap=4)
    assert labels is not None and labels[0].tolist() == [0] * 6 + [1] * 6
    # The first has 0.9 for class 0 and the second 0.6 for class 1: class 0 has 0.9 a + 0.4 b, class 1 0.1 a + 0.6 b,
    # so class 0 wins while 0.8 a > 0.2 b, 4 a > b: at 4:1, 3:2 and 2:3, not at 1:4, where they are equal but for
    # rounding
    labels = windowed_labels(strips, (8, 12), sides(0.9, 0.59), overlap=4)
    assert labels is not None and labels[0].tolist() == [0] * 8 + [1] * 4
    labels = windowed_labels(strips, (8, 12), sides(0.9, 0.61), overlap=4)
    assert labels is not None and labels[0].tolist() == [0] * 7 + [1] * 5


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (47, 33)])
def test_bands_and_what_is_remembered_change_nothing(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Window] = []

    def see(window: Window) -> Seen:
        asked.append(window)
        generator = torch.Generator().manual_seed(1000 * window.top + window.left)
        return seen(torch.randn(4, 4, generator=generator), torch.randn(4, 4, 4, generator=generator))

    strips = window_strips(size, window=16, overlap=6)
    told: list[Window] = []
    expected = windowed_labels(strips, size, see, overlap=6, on_window=lambda window, _: told.append(window))
    windows = [cell.window for strip in strips for cell in strip]
    assert told == windows and asked == windows
    monkeypatch.setattr(windowed, "REMEMBERED_BYTES", 600)  # of two windows, 4 * 4 * 4 floats each
    monkeypatch.setattr(windowed, "_BAND_ELEMENTS", 1)  # four rows
    again = windowed_labels(strips, size, see, overlap=6)
    assert expected is not None and again is not None and torch.equal(again, expected)
    assert len(asked) > 2 * len(windows)
