"""The storage root: where archives, shards, weights and runs lie. Facts about them are in results/."""

from __future__ import annotations

import os
from pathlib import Path


def storage_root() -> Path:
    """`M2F_STORAGE`, or `storage/` in the working directory; absolute."""
    return Path(os.environ.get("M2F_STORAGE") or "storage").expanduser().absolute()


def stored(relative: str, *, made_by: str) -> Path:
    """Absolute path of something under the storage root; ValueError with the command that makes it if it is gone."""
    path = storage_root() / relative
    if not path.exists():
        raise ValueError(f"{relative} is missing from the storage root {storage_root()}; make it again with: {made_by}")
    return path
