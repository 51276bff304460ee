from __future__ import annotations

import numpy as np
import pytest

from pipeline.data.images.codecs import decode_segments, encode_cropped_mask, encode_masks, encode_segments


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_segments_come_back_from_their_png(dtype: type) -> None:
    ids = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (30, 40), dtype, endpoint=True)
    decoded = decode_segments(encode_segments(ids), "")
    assert decoded.dtype == dtype
    np.testing.assert_array_equal(decoded, ids)


@pytest.mark.parametrize("corner", [(0, 0), (2, 3), (5, 7)])
def test_a_cropped_mask_has_the_run_lengths_of_the_whole(corner: tuple[int, int]) -> None:
    generator = np.random.default_rng(sum(corner))
    for inside in (generator.random((4, 5)) > 0.5, np.zeros((4, 5), bool), np.ones((4, 5), bool)):
        whole = np.zeros((9, 12), bool)
        whole[corner[0] : corner[0] + 4, corner[1] : corner[1] + 5] = inside
        (expected,) = encode_masks(whole[None])
        assert encode_cropped_mask(inside, top=corner[0], left=corner[1], size=(9, 12)) == expected
