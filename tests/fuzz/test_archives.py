"""Zip and tar archives with changed bytes: the files that were packed, or one sentence."""

from __future__ import annotations

import io
import tarfile
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from tests.fuzz import runs
from tests.fuzz.changes import changed_bytes, inputs
from tests.fuzz.child import Child, Sentence

FILES = {
    "images/training/a.txt": b"first " * 30,
    "images/training/é.txt": b"",
    "annotations/a.txt": bytes(range(256)),
    "b.txt": b"last",
}

SUFFIXES = ("stored.zip", "deflated.zip", "bzip2.zip", "tar", "gnu.tar", "tar.gz", "tar.bz2", "tar.xz")


@cache
def packed(suffix: str) -> bytes:
    """FILES as an archive of this kind."""
    archive = io.BytesIO()
    if suffix.endswith(".zip"):
        method = {"stored": zipfile.ZIP_STORED, "deflated": zipfile.ZIP_DEFLATED, "bzip2": zipfile.ZIP_BZIP2}
        with zipfile.ZipFile(archive, "w", method[suffix.partition(".")[0]]) as file:
            for name, contents in FILES.items():
                file.writestr(zipfile.ZipInfo(name), contents, method[suffix.partition(".")[0]])
        return archive.getvalue()
    form = tarfile.GNU_FORMAT if suffix == "gnu.tar" else tarfile.PAX_FORMAT
    compression = suffix.rpartition(".")[2].replace("tar", "")
    with tarfile.open(fileobj=archive, mode=f"w:{compression}", format=form) as tar:
        for name, contents in FILES.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(contents)
            tar.addfile(entry, io.BytesIO(contents))
    return archive.getvalue()


changed_archives = st.sampled_from(SUFFIXES).flatmap(
    lambda suffix: st.tuples(st.just(suffix), changed_bytes(packed(suffix)))
)


def ends_well(child: Child, suffix: str, data: bytes) -> None:
    """AssertionError unless an archive ends in its files, or in a sentence."""
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / f"mine.{suffix}"
        archive.write_bytes(data)
        found = child.run(runs.archive_files, archive)
    event(f"{suffix}: {'a sentence' if isinstance(found, Sentence) else 'files'}")
    if isinstance(found, Sentence):
        runs.check_sentence(found, ["mine."])
        assert data != packed(suffix), found
    elif suffix.endswith(".zip"):  # a plain tar archive has no checksums of contents
        for name in found.keys() & FILES.keys():
            assert found[name] == FILES[name], name


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_whole_archive_holds_the_files_that_were_packed(child: Child, tmp_path: Path, suffix: str) -> None:
    archive = tmp_path / f"mine.{suffix}"
    archive.write_bytes(packed(suffix))
    assert child.run(runs.archive_files, archive) == FILES


@inputs(500)
@given(changed=changed_archives)
def test_changed_archives_give_their_files_or_a_sentence(child: Child, changed: tuple[str, bytes]) -> None:
    ends_well(child, *changed)


@pytest.mark.full
@inputs(1200)
@given(changed=changed_archives)
def test_many_changed_archives_give_their_files_or_a_sentence(child: Child, changed: tuple[str, bytes]) -> None:
    ends_well(child, *changed)
