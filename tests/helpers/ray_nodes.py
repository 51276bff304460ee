"""Ray nodes that stand for nodes, all on this machine: each has a raylet of its own, and dies alone."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from tests.helpers.waiting import LIMIT_S


class RayNodes:
    """A head, and the nodes that are added to it; `settings` are the variables that a driver needs to join them."""

    def __init__(self, *, head_cpus: int = 0) -> None:
        self.folder = tempfile.mkdtemp(prefix="m2f-ray-", dir="/tmp")  # Ray's socket paths must be short
        self.processes: list[subprocess.Popen[str]] = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.settings = {
            "RAY_ADDRESS": self.address,
            "RAY_TMPDIR": self.folder,
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",
        }
        try:
            head = ["--head", f"--port={self.address.partition(':')[2]}", "--include-dashboard=false"]
            self._start([*head, f"--num-cpus={head_cpus}", f"--temp-dir={self.folder}"])
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def add(self, *, cpus: int = 0, gpus: int = 0, resources: str = "{}") -> subprocess.Popen[str]:
        """Start a node, which has joined when this returns. One after the other: their ports are chosen so."""
        own = [f"--num-cpus={cpus}", f"--num-gpus={gpus}", f"--resources={resources}"]
        return self._start([f"--address={self.address}", *own])

    def _start(self, words: Sequence[str]) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [
                *(Path(sys.executable).parent / "ray", "start", "--block", "--node-ip-address=127.0.0.1"),
                *("--object-store-memory=100000000", *words),
            ],
            env={**os.environ, **self.settings, "RAY_worker_niceness": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.processes.append(process)
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if "Ray runtime started" in line:
                return process
        raise AssertionError(said)

    def lose(self, node: subprocess.Popen[str]) -> None:
        """Kill everything that runs on a node at once."""
        if node.poll() is not None:
            return
        processes = [psutil.Process(node.pid)]
        processes += processes[0].children(recursive=True)
        for process in processes:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        node.wait(LIMIT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in reversed(self.processes):
            self.lose(node)
        shutil.rmtree(self.folder, ignore_errors=True)


def times_ray_gave_up(folder: str) -> int:
    """How often Ray Train has ended its wait for a worker group, as its own logs say; folder: the head's RAY_TMPDIR."""
    logs = Path(folder).glob("session_latest/logs/train/ray-train-app-controller-*.log")
    return sum(log.read_text().count("control loop iteration: The worker group startup timed out") for log in logs)
