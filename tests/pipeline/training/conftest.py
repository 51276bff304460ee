"""A run for tests of its driver."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.params.schema import Row
from pipeline.runs.run import Run
from pipeline.storage.results.data import Manifest


@pytest.fixture
def small_run(two_steps: Row, small_data: tuple[Path, Manifest], tmp_path: Path) -> Run:
    """A run that has not begun."""
    run = Run(row=two_steps, seed=1, run_key="k", run_dir=tmp_path / "run", manifest=small_data[1])
    (run.run_dir / "checkpoints").mkdir(parents=True)
    return run
