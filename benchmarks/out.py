"""The file that a benchmark writes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pipeline.storage.disk import locked
from pipeline.storage.files import write_json


@contextmanager
def sole_writer(out: Path, begun: dict[str, Any]) -> Iterator[None]:
    """Writes what has begun; no other benchmark writes the file while the block lasts.

    Exits with one sentence where another one does already.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(out.with_name(f".{out.name}.lock")))
        except BlockingIOError:
            sys.exit(f"error: another benchmark is writing {out}; take another --out, or wait for it")
        write_json(out, begun)
        yield


def refuse_unwritable(out: Path) -> None:
    """Exit with one sentence where `out` is a folder, or its own folder cannot be made or written to."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(out.parent, os.W_OK):
            raise PermissionError(f"this user may not write into {out.parent}")
    except OSError as error:
        sys.exit(f"error: --out {out} cannot be written ({error}); take a file in a folder of yours")
    if out.is_dir():
        sys.exit(f"error: --out {out} is a folder; name a file, such as {out / 'found.json'}")
