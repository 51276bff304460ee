"""Networks with random weights, sure of what they predict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pipeline.params.schema import Row
from pipeline.prediction.network import TrainedNetwork
from tests.helpers.registered import CLASSES, decided_network, row_of
from tests.helpers.trained import trained


@pytest.fixture
def network_of(small_row: Row) -> Callable[..., TrainedNetwork]:
    """A network of sky, road and car for a task; keywords are its test settings."""

    def make(task: str, **test: Any) -> TrainedNetwork:
        row = row_of(task, small_row, **test)
        names = ("car",) if task == "instance" else CLASSES
        return trained(decided_network(row), row, names, description=f"a random network for the task {task}")

    return make
