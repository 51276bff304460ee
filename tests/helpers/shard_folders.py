"""Building the shards of a small folder data set, and reading them without the project's reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.data.fetch import folder_digest
from pipeline.data.shards import build as shards
from pipeline.storage.results.data import FetchedSource, Manifest
from tests.helpers.images import config


def facts_of(folder: Path) -> list[FetchedSource]:
    """What fetching says of a folder."""
    digest, size = folder_digest(folder)
    return [FetchedSource(name=folder.name, path="archives/00/folder.json", bytes=size, sha256=digest)]


def build(folder: Path, processes: int = 0, **changes: Any) -> Manifest:
    return shards.build("mine", config(**changes), [folder], facts=facts_of(folder), processes=processes)


def rows(storage: Path, manifest: Manifest, split: str) -> list[dict[str, Any]]:
    files = [storage / shard.path for shard in manifest.splits[split].shards]
    return [row for file in files for row in pa.ipc.open_file(pa.memory_map(str(file))).read_all().to_pylist()]
