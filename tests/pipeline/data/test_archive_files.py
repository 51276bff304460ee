from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.data.archive_files import archive_stem, check_archive
from pipeline.data.fetch import fetch, open_sources
from pipeline.data.shards.build import build
from pipeline.storage.files import sha256
from tests.helpers.images import config, write_folder
from tests.helpers.shard_folders import rows


def tar_of(folder: Path, path: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        archive.add(folder, ".")
    return path


COMPRESSIONS = [("tar.gz", gzip.compress), ("tgz", gzip.compress), ("tar.bz2", bz2.compress), ("tar.xz", lzma.compress)]


@pytest.mark.parametrize(("suffix", "compress"), [("tar", bytes), *COMPRESSIONS])
def test_a_tar_archive_gives_the_same_records_as_its_folder(
    tmp_path: Path, storage: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    folder = write_folder(tmp_path / "d")
    tar = tar_of(folder, tmp_path / "plain.tar").read_bytes()
    (tmp_path / f"mine.{suffix}").write_bytes(compress(tar))
    made = []
    for source in ("d", f"mine.{suffix}"):
        entry = config(sources=(source,))
        fetched = fetch("mine", entry, base=tmp_path)
        assert fetch("mine", entry, base=tmp_path) == fetched
        made.append(build("mine", entry, open_sources(fetched), facts=fetched.sources, processes=0))
    assert made[0].splits == made[1].splits
    assert len(rows(storage, made[1], "train")) == 3
    assert (fetched.sources[0].name, fetched.sources[0].bytes) == (f"mine.{suffix}", len(tar))
    published = sha256(tmp_path / f"mine.{suffix}")
    assert Path(fetched.sources[0].path).parent.name == published[:16]
    assert fetch("mine", config(sources=(f"mine.{suffix}",), sha256=(published,)), base=tmp_path) == fetched


@pytest.mark.parametrize(("suffix", "compress"), COMPRESSIONS)
def test_a_torn_or_altered_compressed_tar_is_refused_and_nothing_of_it_kept(
    tmp_path: Path, storage: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    data = compress(tar_of(write_folder(tmp_path / "d"), tmp_path / "plain.tar").read_bytes())
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]
    for content in (data[: middle + 10], flipped):
        (tmp_path / f"mine.{suffix}").write_bytes(content)
        with pytest.raises(ValueError, match=rf"mine\.{suffix} does not decompress \(.*\); it is truncated or altered"):
            fetch("mine", config(sources=(f"mine.{suffix}",)), base=tmp_path)
    assert not (storage / "archives").exists()


def test_what_is_no_archive_is_said(tmp_path: Path, storage: Path) -> None:
    for data, message in (
        (b"7z\xbc\xaf'\x1c", r"neither a zip nor a tar archive \(it begins as 7z\); give one of these"),
        (b"Rar!\x1a\x07", r"begins as RAR\)"),
        (b"\n<html>", r"begins as HTML or XML\)"),
        (b"nothing", r"begins as b'nothing'\)"),
        (b"", r"mine\.x is empty; get it again"),
        (gzip.compress(b"no tar" * 1000), r"mine\.x is not a whole tar archive \(.*\); it is truncated or altered"),
    ):
        (tmp_path / "mine.x").write_bytes(data)
        with pytest.raises(ValueError, match=message):
            fetch("mine", config(sources=("mine.x",)), base=tmp_path)


def test_an_archive_whose_error_would_quote_its_bytes_is_refused_in_one_short_sentence(tmp_path: Path) -> None:
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.txt", bytes(1000))
    data = bytearray(archive.read_bytes())
    data[26:28] = (900).to_bytes(2, "little")  # length of the name, in the header before the file (APPNOTE 4.3.7)
    archive.write_bytes(data)
    with pytest.raises(ValueError, match=r"^a\.zip is not a whole zip archive \(File name.*\.\.\.\); it is") as caught:
        check_archive(archive, archive.name)
    assert len(str(caught.value)) < 300  # the library's own has more than 3,600 characters


def test_a_folder_that_was_unpacked_is_called_as_its_archive_without_suffix() -> None:
    names = ("a.zip", "a.tar", "a.tar.gz", "a.tgz", "a.TAR.XZ", "a.tbz2", "a.v2", "a")
    assert [archive_stem(name) for name in names] == ["a", "a", "a", "a", "a", "a", "a.v2", "a"]


def test_a_tar_archive_cut_between_two_entries_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "d" / name).write_bytes(b"1")
    whole = tar_of(tmp_path / "d", tmp_path / "whole.tar")
    with tarfile.open(whole) as archive:
        third = archive.getmembers()[2]  # ., a, b: what follows b's one block of contents is c
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[: third.offset_data + 512])
    with pytest.raises(ValueError, match=r"cut\.tar is not a whole tar archive \(.*no zeros at its end, after 3"):
        check_archive(tmp_path / "cut.tar", "cut.tar")
