"""The two folders of a rehearsal, which are deleted however it ends.

A process of its own, `python -m pipeline.rehearsal.folders`, waits for the end of its standard input: a rehearsal that
is killed closes it too. Where that process is killed as well, the next rehearsal deletes what is left.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.storage.stores import StoredPath

FOLDER = "preflight"
"""Below the storage root: the storage of rehearsals."""

_PREFIX = "m2f-preflight-"
"""Of the folders of rehearsals among the system's temporary ones."""


@contextmanager
def folders_of(row: str) -> Iterator[tuple[Path, StoredPath]]:
    """A temporary folder, and one below the storage root, for a rehearsal of this row; both are empty.

    At the end of the block, or of this process, whatever still works in them is ended, and they are deleted. OSError or
    ValueError where the storage root cannot be written.
    """
    from pipeline.storage.root import storage_root

    root = storage_root()
    keep_root = not isinstance(root, Path) or _is_somebodys(root)
    forget_ended()
    mine = f"{row}-{socket.gethostname()}-{os.getpid()}"
    storage = root / FOLDER / mine
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{mine}-"))
    command = [sys.executable, "-m", "pipeline.rehearsal.folders", str(folder), str(storage)]
    with subprocess.Popen(
        command if keep_root else [*command, str(root)],
        env={**os.environ, "PYTHONPATH": python_path()},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the rehearsal
    ) as keeper:
        try:
            if isinstance(storage, Path):
                storage.mkdir(parents=True)
            yield folder, storage
        finally:
            delete_folders(folder, storage, None if keep_root else root)
            keeper.kill()  # not where a second Ctrl-C comes before: then it deletes them


def python_path() -> str:
    """PYTHONPATH with which a process finds this package, wherever it works."""
    home = str(Path(__file__).parents[2])
    return os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])


def _is_somebodys(root: Path) -> bool:
    """Whether a storage root was there before rehearsals that run now."""
    return root.exists() and [path.name for path in root.iterdir()] != [FOLDER]


def forget_ended() -> None:
    """End and delete what rehearsals of this machine have left that were killed."""
    from pipeline.storage.root import storage_root

    root = storage_root() / FOLDER
    left: list[StoredPath] = list(root.iterdir()) if root.exists() else []
    for path in left:
        if _has_ended(path.name):
            _end_processes(str(path))
            _delete_storage(path)
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        if _has_ended(folder.name.removeprefix(_PREFIX).rpartition("-")[0]):
            shutil.rmtree(folder, ignore_errors=True)  # unless it is another user's


def _has_ended(name: str) -> bool:
    """Whether <row>-<host>-<process> was a process of this machine; row and host may have dashes."""
    import psutil

    rest, _, process = name.rpartition("-")
    here = rest.endswith(f"-{socket.gethostname()}")
    return here and process.isdecimal() and not psutil.pid_exists(int(process))


def delete_folders(folder: Path, storage: StoredPath, root: StoredPath | None) -> None:
    """End what works in a rehearsal's folders, and delete them; root: also the storage root, if it is empty then."""
    _end_processes(str(storage))
    shutil.rmtree(folder, ignore_errors=True)
    _delete_storage(storage)
    if isinstance(root, Path):
        with suppress(OSError):  # another process has put something there
            root.rmdir()


def _end_processes(storage: str) -> None:
    """End the stages with this storage root, and what they have started."""
    import psutil

    ended = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it has ended, or is another user's
            if process.environ().get("M2F_STORAGE") == storage:
                process.kill()
                ended.append(process)
    psutil.wait_procs(ended, timeout=10)


def _delete_storage(storage: StoredPath) -> None:
    if isinstance(storage, Path):
        shutil.rmtree(storage, ignore_errors=True)
        with suppress(OSError):  # other rehearsals are there, or it is gone
            storage.parent.rmdir()
    elif storage.exists():
        storage.fs.rm(storage.path, recursive=True)


def _main() -> None:
    """Wait for the end of standard input, then delete the folders that the command names."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # as of a machine that is shut down
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    from pipeline.storage.root import root_at

    folder, storage, *root = sys.argv[1:]
    delete_folders(Path(folder), root_at(storage), Path(root[0]) if root else None)


if __name__ == "__main__":
    _main()
