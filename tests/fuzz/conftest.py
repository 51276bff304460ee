"""The process that reads the inputs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fuzz.child import Child


@pytest.fixture(scope="session")
def child() -> Iterator[Child]:
    """One process for all inputs; what ends it does not end the tests."""
    process = Child()
    yield process
    process.stop()
