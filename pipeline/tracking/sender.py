"""Points on their way to MLflow: files are the queue, a thread empties it, training never waits.

A point (pipeline.runs.curve_file) holds its time, so that one sent twice is the same one to MLflow's database, and one
sent days later still has its place on the time axis.
"""

from __future__ import annotations

import math
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pipeline.params.tasks import percent
from pipeline.runs.curve_file import point_line, read_points
from pipeline.storage.files import Lines
from pipeline.storage.stores import StoredPath
from pipeline.tracking.client import metric_name, mlflow_client, unusable, warn

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric


SEND_EVERY_S = 5.0
"""Points wait at most about this long before they are sent together."""
RETRY_AFTER_S = 60.0
"""After a failure the server is left alone for this long."""
CLOSE_S = 2.0
"""Longest time that closing waits for the last points; not at all when the server was down at the last attempt."""
SAMPLE_EVERY_S = 10.0
"""How often the machine's load is measured."""
METRICS_PER_BATCH = 1000
"""MLflow's limit for one log_batch request."""


class Backlog:
    """The points of a file that MLflow lacks, oldest first.

    What MLflow has is asked for before the first points are sent, and after every failure, whose outcome nobody knows:
    every point arrives once. Holds a place in the file, not the points.
    """

    def __init__(self, path: StoredPath) -> None:
        self._path = path
        self._place = 0
        self._known: dict[str, set[int]] = {}

    def send(self, client: MlflowClient, run_id: str) -> bool:
        """Send as many points as one request takes; False when there are none left."""
        try:
            return self._send(client, run_id)
        except Exception:
            self._known.clear()
            raise

    def _send(self, client: MlflowClient, run_id: str) -> bool:
        batch: list[Metric] = []
        sent: list[tuple[str, int]] = []
        place = self._place
        if not self._path.exists():
            return False
        with self._path.open("rb") as file:
            file.seek(place)
            for line in file:
                if not line.endswith(b"\n"):  # half written
                    break
                for point in read_points([line.decode("utf-8", errors="replace")]):
                    metrics = _metrics(point)
                    if not metrics:
                        continue
                    probe, step = min(metric.key for metric in metrics), point["step"]
                    if probe not in self._known:  # a request is stored whole or not at all: one metric tells for all
                        history = client.get_metric_history(run_id, probe)
                        self._known[probe] = {metric.step for metric in history}
                    if step not in self._known[probe]:
                        if batch and len(batch) + len(metrics) > METRICS_PER_BATCH:
                            client.log_batch(run_id, metrics=batch)
                            self._sent(sent, place)
                            return True
                        batch += metrics
                        sent.append((probe, step))
                place += len(line)
        if batch:
            client.log_batch(run_id, metrics=batch)
        self._sent(sent, place)
        return False

    def _sent(self, points: Sequence[tuple[str, int]], place: int) -> None:
        for probe, step in points:
            self._known[probe].add(step)
        self._place = place


def _metrics(point: Mapping[str, Any]) -> list[Metric]:
    from mlflow.entities import Metric

    time_ms = point.get("time_ms") or int(time.time() * 1000)
    values = {key: math.nan if value is None else float(value) for key, value in point.items()}
    return [
        Metric(*shown, time_ms, point["step"])
        for key, value in values.items()
        if key not in ("step", "time_ms") and (shown := shown_metric(key, value))
    ]


def shown_metric(name: str, value: float) -> tuple[str, float] | None:
    """A value of a run folder as MLflow shows it, which makes a section of charts of what stands before a slash.

    val_miou, 0.5 -> val/miou, 50.0 (percent); loss -> train/loss. None: of an auxiliary loss, of which there are 27 and
    which curve.jsonl keeps.
    """
    group, _, figure = name.partition("_")
    if group in ("val", "test"):
        return metric_name(f"{group}/{figure}"), round(percent(value), 6)  # 57, not 56.99999999999999
    if name.startswith("system/"):
        return name, value
    return None if re.match(r"aux\d+\.", name) else (metric_name(f"train/{name}"), value)


class Sender:
    """Sends a curve's points to MLflow, from a thread of its own, until `close`.

    `open_run` gives the run's id; it is called in the thread, and again after a failure. With `load`, the
    machine's load is sampled into it every SAMPLE_EVERY_S, and sent like the curve.
    """

    def __init__(self, curve: Lines, *, open_run: Callable[[], str], load: Lines | None = None) -> None:
        unusable()  # MLflow is imported here: not in a thread, while this process may fork its loaders
        self._open_run = open_run
        self._backlogs = [Backlog(path) for path in (curve.local, *([load.local] if load else []))]
        self._load = load
        self._system_load = SystemLoad() if load else None
        self._closing = threading.Event()
        self._left = threading.Event()
        self._down = False
        self._thread = threading.Thread(target=self._work, daemon=True, name="mlflow points")
        self._thread.start()

    def close(self) -> None:
        """Send what is left if MLflow answers, for CLOSE_S at most. What it lacks then stays in the files."""
        self._closing.set()
        self._thread.join(0.0 if self._down else CLOSE_S)
        self._left.set()

    def _work(self) -> None:
        run_id: str | None = None
        next_send = time.monotonic() + SEND_EVERY_S
        next_sample = time.monotonic() + SAMPLE_EVERY_S
        closing = False
        while not closing:
            due = min(next_send, next_sample) if self._system_load else next_send
            closing = self._closing.wait(max(0.0, due - time.monotonic()))
            if self._system_load and time.monotonic() >= next_sample:
                self._sample()
                next_sample = time.monotonic() + SAMPLE_EVERY_S
            if closing and self._down:
                return
            if not closing and time.monotonic() < next_send:
                continue
            try:
                run_id = run_id or self._open_run()
                for backlog in self._backlogs:
                    while not self._left.is_set() and backlog.send(mlflow_client(), run_id):
                        pass
            except Exception as error:  # whatever a client or server may throw: the run goes on
                if not self._down:
                    warn("points of the curve are kept on disk and sent when MLflow answers", error)
                self._down = True
                run_id = None  # it may be gone
                next_send = time.monotonic() + RETRY_AFTER_S
            else:
                if self._down:
                    print("MLflow answers again", file=sys.stderr, flush=True)
                self._down = False
                next_send = time.monotonic() + SEND_EVERY_S

    def _sample(self) -> None:
        assert self._system_load is not None and self._load is not None
        try:
            self._load.add(self._system_load.sample())
        except Exception as error:  # whatever a driver or a full disk may throw: the points still go out
            print(f"warning: the machine's load is not recorded any more ({error})", file=sys.stderr, flush=True)
            self._system_load = None


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
