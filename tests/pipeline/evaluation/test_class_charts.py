"""Charts: what they count is worked out by hand; what they look like is seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.data.images.codecs import decode_image
from pipeline.evaluation.class_charts import commonest_confusions, draw_confusion, draw_per_class

CONFUSION = np.array([[6, 2, 0], [0, 8, 0], [3, 1, 0]])
"""Of 8 pixels of a, 2 are called b; of 4 pixels of c, 3 are called a and 1 b; 20 in all."""


def test_the_commonest_confusions_come_with_their_shares() -> None:
    expected = [("c", "a", 3 / 4, 3 / 20), ("a", "b", 2 / 8, 2 / 20), ("c", "b", 1 / 4, 1 / 20)]
    assert commonest_confusions(CONFUSION, "abc") == expected
    assert commonest_confusions(CONFUSION, "abc", 1) == expected[:1]


def test_a_perfect_answer_has_no_confusions() -> None:
    assert commonest_confusions(np.diag([5, 0, 1]), "abc") == []


@pytest.mark.parametrize("classes", [1, 9, 40, 150])
def test_charts_of_few_and_many_classes_are_pictures_of_bounded_size(tmp_path: Path, classes: int) -> None:
    names = [f"class {n}, with a name that is long" for n in range(classes)]
    confusion = np.random.default_rng(0).integers(0, 9, (classes, classes)) + np.diag([50] * classes)
    confusion[-1] = 0  # a class that no picture shows
    draw_confusion(tmp_path / "confusion.png", confusion, names, "row seed 0")
    scores = {name: n / classes for n, name in enumerate(names)}
    draw_per_class(tmp_path / "per_class.png", {"iou": {**scores, names[-1]: None}}, "row seed 0")
    for chart in ("confusion", "per_class"):
        height, width, channels = decode_image((tmp_path / f"{chart}.png").read_bytes(), chart).shape
        assert 100 < height < 2500 and 400 < width < 2500 and channels == 3
