"""The load of this machine, by the names under which MLflow's page shows it."""

from __future__ import annotations

import time
from contextlib import suppress

from pipeline.runs.curve_file import point_line


class SystemLoad:
    """The load of this machine, by the names under which MLflow's page shows it; GPUs where nvidia-ml-py finds any."""

    def __init__(self) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self._monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with suppress(ImportError, RuntimeError):  # no nvidia-ml-py, no GPU
            self._monitors.append(GPUMonitor())
        self._monitors[0].collect_metrics()  # processor time is counted from one call to the next: the first says 0
        self._monitors[0].clear_metrics()

    def sample(self) -> str:
        """A point, as `point_line` has it; its step is the second at which it was taken, which no restart repeats."""
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values |= {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        time_ms = int(time.time() * 1000)
        return point_line(time_ms // 1000, values, time_ms)
