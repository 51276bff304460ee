"""The storage root: where archives, shards, weights and runs lie. Facts about them are in results/."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.files import read_json, sha256


def storage_root() -> Path:
    """`M2F_STORAGE`, or `storage/` in the working directory; absolute."""
    return Path(os.environ.get("M2F_STORAGE") or "storage").expanduser().absolute()


def stored(relative: str, *, made_by: str) -> Path:
    """Absolute path of something under the storage root; ValueError with the command that makes it if it is gone."""
    path = storage_root() / relative
    if not path.exists():
        raise ValueError(f"{relative} is missing from the storage root {storage_root()}; make it again with: {made_by}")
    return path


@dataclass(frozen=True)
class Item:
    """One thing under the storage root that is kept or pruned as a whole."""

    path: str
    """Relative to the root."""
    bytes: int
    named: bool
    """Whether a file under results/ names it or something in it."""


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for entry in value:
            yield from _objects(entry)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _strings(entry)


def _results(folder: Path) -> Iterator[Any]:
    for path in sorted(folder.rglob("*.json")):
        yield read_json(path, made_by="the stage that its folder is named after")


def inventory(results: Path = Path("results")) -> list[Item]:
    """What lies under the storage root, by path: the entries of its folders, one level deep."""
    root = storage_root()
    named = {text for value in _results(results) for text in _strings(value)}
    items = []
    for path in sorted(root.glob("*/*")):
        relative = path.relative_to(root).as_posix()
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        is_named = any(text == relative or text.startswith(f"{relative}/") for text in named)
        items.append(Item(relative, sum(file.stat().st_size for file in files), is_named))
    return items


def named_digests(results: Path = Path("results")) -> dict[str, str]:
    """SHA-256 of every file that results/ names with one, by its path under the root; folders in place are left out."""
    entries = (entry for value in _results(results) for entry in _objects(value))
    return {
        entry["path"]: entry["sha256"]
        for entry in entries
        if entry.get("path") and entry.get("sha256") and not entry["path"].endswith("/folder.json")
    }


def wrong_file(relative: str, digest: str) -> str:
    """What is wrong with a file under the storage root that should have this SHA-256; empty: nothing."""
    path = storage_root() / relative
    if not path.is_file():
        return f"{relative} is missing"
    found = sha256(path)
    return "" if found == digest else f"{relative} is altered: its sha256 is {found}, results/ says {digest}"
