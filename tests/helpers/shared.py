"""Files that stand beside the checkout, in ../shared: reference values and sample archives too large to copy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]


def shared(relative: str) -> Path:
    """Path of ../shared/<relative>. Without the file the test is skipped, saying why; under
    M2F_REQUIRE_SHARED=1, where ../shared exists, it fails instead, so that a run that has the files uses them."""
    folder = PROJECT.parent / "shared"
    path = folder / relative
    if path.exists():
        return path
    if folder.is_dir() and os.environ.get("M2F_REQUIRE_SHARED") == "1":
        pytest.fail(f"../shared/{relative} is missing, and M2F_REQUIRE_SHARED=1 says that it must be there")
    pytest.skip(f"needs ../shared/{relative}")
