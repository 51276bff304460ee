"""One form of the network, measured in this process or in one of its own.

A process of its own is what its user has: the memory that one form leaves behind does not slow down another, and the
peak of its memory is its own. Parent and child speak in lines of JSON.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from typing import Any

import torch

from benchmarks.network.forms import call_of, timed

_TIMEOUT_S = 60
"""For a process to end."""


class Here:
    """Rounds of a form in this process."""

    def __init__(self, what: str, form: str, row: str, device: torch.device, precision: str) -> None:
        self._form, self._device = form, device
        self._call = call_of(what, form, row, device, precision)

    def round(self) -> float:
        """Seconds. RuntimeError where the form cannot do it, such as a matrix product of two types."""
        return timed(self._form, self._call, self._device)

    def end(self) -> float:
        """The most memory that the process had, MiB: resident on a CPU, allocated on a GPU."""
        if self._device.type == "cuda":
            return round(torch.cuda.max_memory_allocated() / 2**20, 1)
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, 1)


class Apart:
    """The same in a process of its own."""

    def __init__(self, what: str, form: str, row: str, device: torch.device, precision: str) -> None:
        command = [sys.executable, "-m", "benchmarks.network", "--device", device.type]
        command += ["--threads", str(torch.get_num_threads()), "--form", what, form, row, precision]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def round(self) -> float:
        """Seconds. RuntimeError where the form cannot do it."""
        return float(self._ask("round"))

    def end(self) -> float:
        """MiB, as above; the process ends."""
        try:
            return float(self._ask("end"))
        finally:
            self.kill()

    def kill(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.communicate(timeout=_TIMEOUT_S)

    def _ask(self, word: str) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(word + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        said = self._process.stdout.readline()
        if not said:
            raise RuntimeError(f"its process ended with exit code {self._process.wait(timeout=_TIMEOUT_S)}")
        answer = json.loads(said)
        if "failed" in answer:
            raise RuntimeError(answer["failed"])
        return answer[word]


def serve(form: Here) -> None:
    """Answer a parent until it says "end" or is gone."""
    for line in sys.stdin:
        word = line.strip()
        answer: dict[str, object]
        try:
            answer = {word: form.end() if word == "end" else form.round()}
        except RuntimeError as error:
            answer = {"failed": str(error).splitlines()[0]}
        print(json.dumps(answer), flush=True)
