"""What every test gets: few threads, no calls to the outside, and the quick tests first."""

from __future__ import annotations

import os
import signal
import sys
import uuid

# Before torch, Ray, MLflow and albumentations are imported: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # `make test` has a process for each of two cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait stand still on a busy machine
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
for name in (
    "MLFLOW_TRACKING_URI",
    "M2F_STORAGE",
    "M2F_SHARD_CACHE",
    "M2F_WORKERS",
    "RAY_ADDRESS",
    "AWS_PROFILE",
    "DVC_ROOT",
):
    os.environ.pop(name, None)  # a test never touches the user's results, server or cluster

from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

from tests.helpers.s3_server import KEYS, s3_server  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick tests first, then those with Ray, slow ones, the longest, and a cluster; files keep their order.

    Of the longest, those of whole stages come first: one that began last would leave the other process idle.
    """

    def cost(item: pytest.Item) -> tuple[int, bool]:
        costs = {"cluster": 5, "full": 4, "long": 3, "ray": 1, "slow": 2}  # the longest start Ray: not last
        group = next((cost for mark, cost in costs.items() if item.get_closest_marker(mark)), 0)
        return group, group == 3 and "stages" not in item.path.parts

    items.sort(key=cost)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests that need a GPU are skipped where there is none."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU")


THREADS = int(os.environ["OMP_NUM_THREADS"])


@pytest.fixture(autouse=True)
def _every_test_begins_alike() -> Iterator[None]:
    """What a test sets for its process does not reach the next one. What no test has imported stays so."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(THREADS)
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = True, False  # torch's own choice
        torch.manual_seed(0)
    if cv2 := sys.modules.get("cv2"):
        cv2.setNumThreads(THREADS)
    if client := sys.modules.get("pipeline.tracking.client"):
        client._patience = client._Patience()  # no outage is remembered
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if (ray := sys.modules.get("ray")) and ray.is_initialized():
        ray.shutdown()
        pytest.fail("the test left its Ray running")


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty storage root of the test's own, which the pipeline uses."""
    root = tmp_path / "storage"
    root.mkdir()
    monkeypatch.setenv("M2F_STORAGE", str(root))
    return root


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of MLflow's with nothing in it, to be copied: making one takes a second."""
    from pipeline.tracking.database import opened_alone

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    with opened_alone(path):
        return path


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Address of an S3 server, which does not outlive the tests of a file."""
    with s3_server() as address:
        yield address


@pytest.fixture
def bucket(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty storage root of the test's own in a bucket, which the pipeline uses; its copies go to tmp_path/cache."""
    from s3fs import S3FileSystem

    from pipeline.storage.root import storage_root

    name = f"test-{uuid.uuid4().hex}"
    for variable, value in {**KEYS, "AWS_ENDPOINT_URL": s3, "M2F_STORAGE": f"s3://{name}/some/prefix"}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    S3FileSystem.clear_instance_cache()  # it keeps connections, with the address and keys that were set then
    S3FileSystem().mkdir(name)
    yield storage_root()
    S3FileSystem.clear_instance_cache()
