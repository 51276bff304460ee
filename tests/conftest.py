"""What every test gets: few threads, no calls to the outside, and the quick tests first."""

from __future__ import annotations

import os

# Before torch, Ray, MLflow and albumentations are imported: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
for name in ("MLFLOW_TRACKING_URI", "M2F_STORAGE", "M2F_WORKERS", "RAY_ADDRESS"):
    os.environ.pop(name, None)  # a test never touches the user's results, server or cluster

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick tests first, then those with Ray, slow ones, the longest, and a cluster; files keep their order."""

    def cost(item: pytest.Item) -> int:
        marks = ("ray", "slow", "full", "cluster")
        return max((i + 1 for i, mark in enumerate(marks) if item.get_closest_marker(mark)), default=0)

    items.sort(key=cost)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests that need a GPU are skipped where there is none."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU")


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty storage root of the test's own, which the pipeline uses."""
    root = tmp_path / "storage"
    root.mkdir()
    monkeypatch.setenv("M2F_STORAGE", str(root))
    return root
