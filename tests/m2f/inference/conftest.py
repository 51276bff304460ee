from __future__ import annotations

import pytest

from m2f.inference import bands


@pytest.fixture(params=[1, 20_000, 1 << 22], ids=["bands of 4 rows", "bands of some rows", "one band"])
def band_elements(request, monkeypatch):
    monkeypatch.setattr(bands, "_BAND_ELEMENTS", request.param)
