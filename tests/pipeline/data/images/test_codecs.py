from __future__ import annotations

import numpy as np
import pytest

from pipeline.data.images.codecs import decode_segments, encode_segments


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_segments_come_back_from_their_png(dtype: type) -> None:
    ids = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (30, 40), dtype, endpoint=True)
    decoded = decode_segments(encode_segments(ids), "")
    assert decoded.dtype == dtype
    np.testing.assert_array_equal(decoded, ids)
