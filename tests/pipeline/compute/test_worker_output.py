from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import pytest

from tests.helpers.shared import PROJECT

SCRIPT = """
import sys
import threading

import ray

from pipeline.compute.worker_output import printing, relayed


class Noted:
    '''stderr, which tells when the second line has come.'''

    def __init__(self, stream):
        self.stream, self.whole = stream, threading.Event()

    def write(self, text):
        written = self.stream.write(text)
        if "another" in text:
            self.whole.set()
        return written

    def flush(self):
        self.stream.flush()


ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=80_000_000, log_to_driver=False)


@ray.remote
def work(lines):
    import sys

    with relayed(lines, "a run"):
        print("half a ", end="", file=sys.stderr)
        print("line\\na run: another", file=sys.stderr)


sys.stderr = noted = Noted(sys.stderr)
with printing() as lines:
    ray.get(work.remote(lines))
    noted.whole.wait()
    ray.kill(lines.actor)
    ray.get(work.remote(lines))  # nobody listens any more
print("the training went on")
"""


@pytest.mark.ray
def test_lines_of_workers_are_printed_by_name_and_a_lost_queue_costs_only_the_lines_after_it() -> None:
    with tempfile.TemporaryDirectory(prefix="m2f-ray-", dir="/tmp") as folder:  # Ray's socket paths must be short
        environment = {**os.environ, "RAY_TMPDIR": folder, "PYTHONPATH": str(PROJECT)}
        answer = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout == "the training went on\n"
    lines = [line for line in answer.stderr.splitlines() if line.startswith("a run")]
    assert lines == ["a run: half a line", "a run: another"]
