"""Shards to be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.storage.results.data import Manifest
from tests.helpers.images import image, labels, stored, write_shards
from tests.helpers.loading import LAYOUTS


@pytest.fixture(params=LAYOUTS)
def manifest(storage: Path, request: pytest.FixtureRequest) -> Manifest:
    """Seven training and five validation pictures of 12 x 16, in shards of up to four."""
    known = np.where(labels() == 9, 255, labels()).astype(np.uint8)
    records = [stored(f"p{index}", image(seed=index), known) for index in range(7)]
    return write_shards(storage, {"train": records, "val": records[:5]}, per_shard=4, layout=request.param)
