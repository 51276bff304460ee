"""Lines that Ray's workers write to stderr, printed by the process that waits for them: no file, whatever the host."""

from __future__ import annotations

import contextlib
import io
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.util.queue import Queue


@contextlib.contextmanager
def printing() -> Iterator[Queue]:
    """A queue for the workers; what is put into it is printed here on stderr while the block runs."""
    import ray
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    over = threading.Event()

    def follow() -> None:
        while not over.is_set():
            try:
                if (line := queue.get()) is None:
                    return
                print(line, file=sys.stderr, flush=True)
            except Exception:  # one call went wrong, the queue is lost, or Ray is shut down after an interruption
                over.wait(1)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield queue
        with contextlib.suppress(Exception):  # what was trained does not depend on it
            queue.put(None)
            thread.join(timeout=10)
    finally:
        over.set()
        with contextlib.suppress(Exception):
            queue.shutdown(force=True)


@contextlib.contextmanager
def relayed(queue: Queue, name: str) -> Iterator[None]:
    """Send what this process writes to stderr through the queue while the block runs, each line after `name`."""
    with contextlib.redirect_stderr(_Lines(queue, name)):
        yield


class _Lines(io.TextIOBase):
    """A text file whose lines go into a queue."""

    def __init__(self, queue: Queue, name: str) -> None:
        self.queue, self.start, self.rest = queue, f"{name}: ", ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            with contextlib.suppress(Exception):  # nobody listens any more: the training does not depend on it
                self.queue.put(line if line.startswith(self.start) else self.start + line)
        return len(text)
