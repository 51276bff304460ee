"""What every test gets: few threads, no calls to the outside, and the quick tests first."""

from __future__ import annotations

import os
import uuid

# Before torch, Ray, MLflow and albumentations are imported: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
for name in ("MLFLOW_TRACKING_URI", "M2F_STORAGE", "M2F_SHARD_CACHE", "M2F_WORKERS", "RAY_ADDRESS", "AWS_PROFILE"):
    os.environ.pop(name, None)  # a test never touches the user's results, server or cluster

from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

from tests.s3_server import KEYS, s3_server  # noqa: E402


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


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Address of an S3 server, which does not outlive the tests of a file."""
    with s3_server() as address:
        yield address


@pytest.fixture
def bucket(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty storage root of the test's own in a bucket, which the pipeline uses; its copies go to tmp_path/cache."""
    from s3fs import S3FileSystem

    from pipeline.storage import storage_root

    name = f"test-{uuid.uuid4().hex}"
    for variable, value in {**KEYS, "AWS_ENDPOINT_URL": s3, "M2F_STORAGE": f"s3://{name}/some/prefix"}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    S3FileSystem.clear_instance_cache()  # it keeps connections, with the address and keys that were set then
    S3FileSystem().mkdir(name)
    yield storage_root()
    S3FileSystem.clear_instance_cache()
