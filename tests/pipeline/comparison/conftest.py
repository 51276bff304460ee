"""A few rows to report."""

from __future__ import annotations

import pytest

from pipeline.params.schema import Params
from tests.helpers.report_rows import PARAMS


@pytest.fixture
def params() -> Params:
    """Made up: tests/helpers/report_rows.py has results of these."""
    return PARAMS
