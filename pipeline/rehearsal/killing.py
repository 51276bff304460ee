"""Killing a worker of a training, wherever it runs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.storage.stores import StoredPath

_WORKER = "ray::RayTrainWorker"
"""How the processes of Ray Train's workers are called."""


def kill_worker(storage: StoredPath) -> str | None:
    """Kill (SIGKILL) a Ray Train worker of the training whose storage root this is; says which, or None: none is found.

    Of the Ray cluster at RAY_ADDRESS, on any of its nodes; without one, on this machine.
    """
    found = killed_here(_WORKER, str(storage))
    if found is None and os.environ.get("RAY_ADDRESS"):
        found = _killed_there(str(storage))
    return found


def killed_here(name: str, storage: str) -> str | None:
    """Kill a process of this name with this storage root on this machine."""
    import os
    import platform
    import signal

    import psutil

    def called(process: psutil.Process | None) -> bool:
        return process is not None and "".join(process.cmdline()[:1]).startswith(name)

    for process in psutil.process_iter():
        try:
            if not called(process) or process.environ().get("M2F_STORAGE") != storage:
                continue
            if called(process.parent()):  # its loader's, which has its name too
                continue
            os.kill(process.pid, signal.SIGKILL)
            return f"worker {process.pid} on {platform.node()}"
        except (psutil.Error, OSError):  # it has ended, or is another user's
            continue
    return None


def _killed_there(storage: str) -> str | None:
    """Ask one node of the cluster after the other."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init(log_to_driver=False, logging_level="WARNING")
    try:
        from ray import cloudpickle

        from pipeline.rehearsal import killing

        cloudpickle.register_pickle_by_value(killing)  # nodes need not have this package
        task: Any = ray.remote(num_cpus=0)(killed_here)
        for node in ray.nodes():
            if node["Alive"]:
                there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                found: str | None = ray.get(task.options(scheduling_strategy=there).remote(_WORKER, storage))
                if found:
                    return found
        return None
    finally:
        ray.shutdown()
