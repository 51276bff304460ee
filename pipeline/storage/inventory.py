"""What lies under the storage root and which of it results/ names: list, verify, prune and copy it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.storage.disk import is_partial
from pipeline.storage.files import copy_file, delete, files_below, local_file, sha256
from pipeline.storage.progress import Progress
from pipeline.storage.results.folder import RESULTS, every_result, result_files
from pipeline.storage.root import storage_root
from pipeline.storage.stores import StoredPath


@dataclass(frozen=True)
class Item:
    """One thing under the storage root that is kept or pruned as a whole."""

    path: str
    """Relative to the root."""
    bytes: int
    named_in: Path | None = None
    """A file under results/ that names it by its path, or something in it, or a run by its key; None: none does."""

    @property
    def named(self) -> bool:
        """Whether a file under results/ names it."""
        return self.named_in is not None


def _digests(value: Any, run_dir: str = "") -> Iterator[tuple[str, str]]:
    """Path under the root and SHA-256 of every file that a result names with both; a training names its checkpoints
    by their paths in its run folder."""
    if isinstance(value, dict):
        run_dir = str(value.get("run_dir") or run_dir)
        path, digest = value.get("path"), value.get("sha256")
        if isinstance(path, str) and isinstance(digest, str) and path and digest:
            yield f"{run_dir}/{path}" if run_dir else path, digest
        value = list(value.values())
    if isinstance(value, list):
        for entry in value:
            yield from _digests(entry, run_dir)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _strings(entry)


def inventory(results: Path = RESULTS) -> list[Item]:
    """What lies under the storage root, by path: the entries of its folders, one level deep."""
    named: dict[str, Path] = {}
    for path, content in result_files(results):
        for text in _strings(content):
            named.setdefault(_item(text) if "/" in text else f"runs/{text}", path)
    sizes: Counter[str] = Counter()
    for name, size in files_below(storage_root()).items():
        if "/" in name:
            sizes[_item(name)] += size
    return [Item(item, sizes[item], named.get(item)) for item in sorted(sizes)]


def _item(name: str) -> str:
    """The item that a file belongs to, by its path under the root."""
    return "/".join(name.split("/")[:2])


def named_digests(results: Path = RESULTS) -> dict[str, str]:
    """SHA-256 of every file that results/ names with one, by its path under the root; folders in place are left out."""
    found = (pair for value in every_result(results) for pair in _digests(value))
    return {path: digest for path, digest in found if not path.endswith("/folder.json")}


def wrong_file(relative: str, digest: str) -> str:
    """What is wrong with a file under the storage root that should have this SHA-256; empty: nothing."""
    path = storage_root() / relative
    if not path.is_file():
        return f"{relative} is missing"
    found = sha256(path)
    return "" if found == digest else f"{relative} is altered: its sha256 is {found}, results/ says {digest}"


def prune(item: Item) -> None:
    """Delete an item."""
    delete(storage_root() / item.path)


def copy_named(target: StoredPath, results: Path = RESULTS) -> tuple[int, int]:
    """Copy every item that results/ names to another storage root: how many files there are, and how many were copied.

    A file that is there in its length is left as it is, for files come whole or not at all. ValueError when one that is
    to be copied has not the SHA-256 that results/ says.
    """
    root, digests = storage_root(), named_digests(results)
    items = {item.path for item in inventory(results) if item.named}
    files = {name: size for name, size in files_below(root).items() if _item(name) in items and not is_partial(name)}
    there = files_below(target)
    missing = {name: size for name, size in files.items() if there.get(name) != size}
    progress = Progress(f"copying to {target}", sum(missing.values()), unit="MiB", scale=2.0**-20)
    for name, size in missing.items():
        with local_file(root / name) as file:
            if name in digests and sha256(file) != digests[name]:
                raise ValueError(f"{root / name} has not the sha256 that results/ says; make it again, then copy")
            copy_file(file, target / name)
        progress.add(size)
    if missing:
        progress.done()
    return len(files), len(missing)
