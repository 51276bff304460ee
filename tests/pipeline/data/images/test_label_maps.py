from __future__ import annotations

import numpy as np

from pipeline.data.images.label_maps import label_counts


def test_pixels_of_nothing_are_not_counted() -> None:
    assert label_counts(np.array([[0, 2, 2], [255, 255, 2]], np.uint8))[:4].tolist() == [1, 0, 3, 0]
    wide = label_counts(np.array([[0, 2, 300], [65535, 65535, 2]], np.uint16))
    assert (wide[[0, 2, 300]].tolist(), wide.sum()) == ([1, 2, 1], 4)
    assert label_counts(np.full((2, 2), 65535, np.uint16)).sum() == 0
