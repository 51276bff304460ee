"""Digests of large files: right, and read once per host as long as nothing has changed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from pipeline.storage.digests import file_digest, known_digest
from pipeline.storage.stores import StoredPath


@pytest.fixture
def reads(storage: Path) -> list[StoredPath]:
    """What was read, in turn."""
    return []


def looked_up(path: Path, reads: list[StoredPath], state: str = "") -> str:
    return known_digest(path, lambda each: reads.append(each) or file_digest(each), state=state)  # type: ignore[func-returns-value]


def sha256(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def test_a_file_is_read_once_until_it_changes(tmp_path: Path, reads: list[StoredPath]) -> None:
    path = tmp_path / "archive.zip"
    path.write_bytes(b"one")
    assert looked_up(path, reads) == looked_up(path, reads) == sha256(b"one")
    assert reads == [path]
    path.write_bytes(b"two")  # of the same length
    os.utime(path, ns=(0, 1))
    assert looked_up(path, reads) == sha256(b"two")
    os.utime(path, ns=(0, 2))  # touched: it may be another
    assert looked_up(path, reads) == sha256(b"two")
    assert reads == [path] * 3


def test_another_file_of_the_same_name_and_state_is_read(tmp_path: Path, reads: list[StoredPath]) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.zip").write_bytes(folder.encode())
        os.utime(tmp_path / folder / "x.zip", ns=(0, 1))
    assert looked_up(tmp_path / "a/x.zip", reads) != looked_up(tmp_path / "b/x.zip", reads)


def test_a_torn_note_is_written_anew(tmp_path: Path, storage: Path, reads: list[StoredPath]) -> None:
    path = tmp_path / "archive.zip"
    path.write_bytes(b"one")
    looked_up(path, reads)
    (note,) = storage.rglob("verified/*/sources/*.json")
    for text in ("{", "[]", '{"path": 3}'):
        note.write_text(text)
        assert looked_up(path, reads) == sha256(b"one")
    assert len(reads) == 4


def test_a_state_of_the_callers_own_decides(tmp_path: Path, reads: list[StoredPath]) -> None:
    path = tmp_path / "archive.zip"
    path.write_bytes(b"one")
    looked_up(path, reads, "3 files")
    path.write_bytes(b"two")
    assert looked_up(path, reads, "3 files") == sha256(b"one")
    assert looked_up(path, reads, "4 files") == sha256(b"two")
