"""A process that runs one call after another. When it dies or hangs, the call that was running is the finding."""

from __future__ import annotations

import multiprocessing
import os
import resource
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

LIMIT_S = 120.0
"""For a call that hangs; all take less than a second on a machine that is not busy."""

MEMORY = 6 << 30
"""Bytes of address space: an input of some kilobytes needs no more."""

CALLS = 300
"""Of one process: archives stay open in it."""


class Sentence(str):
    """What a refusal says."""

    __slots__ = ()


class Child:
    """A process with little memory, started again after what ends it."""

    def __init__(self) -> None:
        self.calls = 0
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function of a module returns, or the Sentence of its ValueError. AssertionError: it raised another
        exception, a signal ended it, or it takes too long."""
        self.calls += 1
        if self.calls % CALLS == 0:
            self.stop()
            self._start()
        self.pipe.send((function, arguments))
        try:
            answered = self.pipe.poll(LIMIT_S)
            end, value = self.pipe.recv() if answered else ("hang", f"no answer after {LIMIT_S:g} s")
        except (EOFError, ConnectionError):
            self.process.join()
            answered, (end, value) = False, ("death", f"the process ended with exit code {self.process.exitcode}")
        if not answered:
            self.stop()
            self._start()
        assert end in ("value", "sentence"), f"{end}: {value}"
        return value if end == "value" else Sentence(value)

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Connection) -> None:
    """Answer calls until the other end is closed: the kind of end, and the value or text that it gave."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)  # progress
    os.dup2(quiet, 2)  # what decoders in C write
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("value", function(*arguments)))
        except ValueError as error:
            own = type(error) is ValueError  # a library's own is a kind of it
            pipe.send(("sentence", str(error)) if own else ("traceback", traceback.format_exc()))
        except BaseException:
            pipe.send(("traceback", traceback.format_exc()))
