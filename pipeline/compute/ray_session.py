"""Joining a Ray cluster, or starting one on this machine, without putting secrets where Ray shows them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.storage.stores import StoredPath, store_of


def connect() -> None:
    """Join the Ray cluster this process belongs to, or start one on this machine.

    Ray's own log lines stay in its log files: what a person should read comes through
    `pipeline.compute.worker_output`. ValueError when the tracking server's password would be among what Ray shows of a
    job, and when Ray does not start here.
    """
    import logging
    import secrets
    import signal
    import threading

    import ray

    from pipeline.storage.root import storage_root
    from pipeline.tracking.client import SAID, tracking_uri

    if ray.is_initialized():
        return
    refuse_password(tracking_uri())
    # workers run in folders of their own, where "storage/" and "mlflow.db" would be others
    variables = {"M2F_STORAGE": str(storage_root()), "MLFLOW_TRACKING_URI": tracking_uri()}
    known = ("M2F_SHARD_CACHE", "M2F_SHARD_CACHE_GIB", "M2F_GIT_COMMIT", SAID)
    variables |= {name: os.environ[name] for name in known if name in os.environ}
    variables |= store_of(storage_root()).settings_of_workers()
    places = {"env_vars": variables}
    on_sigterm = signal.getsignal(signal.SIGTERM)  # Ray puts its own there
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.WARNING, runtime_env=places)
    else:  # a cluster of this machine's own: no dashboard, a token that is in no file, little shared memory
        # Ray listens on every address of the machine and wants a token, unless RAY_AUTH_MODE is set; with none here it
        # would write one into the home folder.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        try:
            ray.init(
                address="local",
                num_cpus=cores_here(),  # as many as the workers share: Ray counts in another way
                include_dashboard=False,
                object_store_memory=100 * 2**20,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env=places,
            )
        except Exception as error:  # Ray has no class for it
            raise ValueError(
                f"Ray does not start on this machine ({error}); if the machine is busy, run the same command again "
                "later; M2F_WORKERS=0 trains and evaluates without Ray, in one process"
            ) from error
    if callable(on_sigterm) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)


CGROUPS = Path("/sys/fs/cgroup")
"""Where Linux tells a container what it may use."""


def cores_here() -> int:
    """Cores of this machine that this process may use: no more than its container's share (`docker run --cpus`, a limit
    of Kubernetes), rounded down."""
    cores = len(os.sched_getaffinity(0))
    # version 2 of cgroups, then version 1; "max" or -1: no limit
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        with suppress(OSError, ValueError):
            quota, period = map(int, " ".join((CGROUPS / file).read_text() for file in files).split())
            if quota > 0:
                cores = min(cores, max(1, quota // period))
    return cores


def refuse_password(uri: str) -> None:
    """ValueError for a tracking URI with a password: workers get it as a setting of the job, which Ray's dashboard and
    log files show."""
    from pipeline.tracking.client import LOGIN

    if (login := LOGIN.search(uri)) and login[2]:
        raise ValueError(
            "MLFLOW_TRACKING_URI holds a password, which Ray would show on its dashboard; take it out, and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on every machine, or write ~/.mlflow/credentials"
        )


def ray_storage(folder: StoredPath) -> dict[str, Any]:
    """Where Ray Train and Ray Tune keep their own notes, as their RunConfig wants it."""
    path, file_system = store_of(folder).for_arrow()
    return {"storage_path": path, "storage_filesystem": file_system}


@contextmanager
def tasks_said(what: str) -> Iterator[None]:
    """A block that waits for Ray tasks. An error that the user can mend leaves it as the task raised it: Ray's own is a
    traceback. ValueError: Ray no longer replaces lost workers. `what` in words: seed 0 of shapes_tiny."""
    from ray.exceptions import RayError, RayTaskError

    try:
        yield
    except RayTaskError as error:
        import torch

        if isinstance(error.cause, (ValueError, OSError, torch.OutOfMemoryError)):
            raise error.cause from None
        raise
    except RayError as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
        raise ValueError(
            f"{what}: a worker was lost and could not be replaced ({reason}); run the same command again, which goes "
            "on with what is finished by now"
        ) from error
