"""Processes that the benchmark starts, and their end."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent.parent

GRACE_S = 30.0
"""How long a process that is asked to end may take."""


def end(process: subprocess.Popen[Any]) -> None:
    """End a process and all that it has started, asked first."""
    import psutil

    try:
        below = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        below = []
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    _, left = psutil.wait_procs(below, timeout=GRACE_S)
    for each in left:
        each.kill()
