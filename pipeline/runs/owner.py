"""One process at a time trains in a run folder.

On a file system a lock decides, which ends with its process; owner.json says whose it is. In a bucket there are no
locks: there only processes of the same node know of each other.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

from pipeline.runs.outcome import Owner, forget_note, note_of, write_note
from pipeline.storage.stores import StoredPath, store_of

LEFT_S = 30.0
"""How long what a killed owner has started may go on: it ends by itself soon after."""


@contextmanager
def owned(run_dirs: Sequence[StoredPath]) -> Iterator[None]:
    """These run folders belong to this process alone while the block runs; a dead owner's are taken over.

    ValueError, which names the owner, when one of them is another process's.
    """
    with ExitStack() as stack:
        for run_dir in run_dirs:
            _hold(stack, run_dir)
            if (owner := owner_of(run_dir)) is not None and lives_here(owner):  # where there are no locks
                raise ValueError(_refusal(run_dir, owner))
            stack.callback(forget_note, run_dir, Owner)
            write_note(run_dir, this_process())
        yield


def _hold(stack: ExitStack, run_dir: StoredPath) -> None:
    until_s = time.monotonic() + LEFT_S
    while True:
        owner = owner_of(run_dir)
        try:
            stack.enter_context(store_of(run_dir).held_alone(_refusal(run_dir, owner)))
            return
        except ValueError:
            if owner is None or not gone(owner) or time.monotonic() > until_s:
                raise
        time.sleep(0.2)


def owner_of(run_dir: StoredPath) -> Owner | None:
    """The process that trains in the folder, or did when it was killed; None: there is none."""
    with suppress(ValueError):  # of another layout: the lock decides
        return note_of(run_dir, Owner)
    return None


def this_process() -> Owner:
    """As the owner of a run folder."""
    import psutil

    return Owner(process=os.getpid(), node=socket.gethostname(), started_s=psutil.Process().create_time())


def lives_here(owner: Owner) -> bool:
    """Whether it is another process of this node, and still there."""
    return owner.node == socket.gethostname() and owner.process != os.getpid() and not gone(owner)


def gone(owner: Owner) -> bool:
    """Whether it is known to have ended; of another node's nobody knows."""
    import psutil

    if owner.node != socket.gethostname():
        return False
    try:
        process = psutil.Process(owner.process)
        # The clock, by which the beginning is found, may be set meanwhile.
        return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - owner.started_s) >= 5
    except psutil.NoSuchProcess:
        return True


def _refusal(run_dir: StoredPath, owner: Owner | None) -> str:
    who = f"process {owner.process} on host {owner.node}" if owner else "another process"
    return f"run {run_dir.name} is being trained by {who}; wait for it to end, or end it, and run this again"
