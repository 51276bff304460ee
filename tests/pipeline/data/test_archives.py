from __future__ import annotations

import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from pipeline.data.archives import file_names, plain_name, read_file
from tests.helpers.images import put

COMPOSED, SPLIT = "images/\u00e9.jpg", "images/e\u0301.jpg"
"""An e with an accent as one character (NFC), and as two, as macOS writes it (NFD)."""


def zip_of(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def tar_of(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def contents(source: Path) -> dict[str, bytes]:
    return {name: read_file(source, name) for name in file_names(source)}


def test_names_are_plain_whichever_program_made_the_archive(tmp_path: Path) -> None:
    plain = {"images/a.jpg": b"a", "images/b/c.jpg": b"c"}
    windows = {"images\\a.jpg": b"a", "images\\b\\": b"", "images\\b\\c.jpg": b"c"}
    with_dot = {"./images/a.jpg": b"a", "./images//b/c.jpg": b"c", "./.hidden": b"", "__MACOSX/images/._a.jpg": b""}
    assert contents(zip_of(tmp_path / "plain.zip", plain)) == plain
    assert contents(zip_of(tmp_path / "windows.zip", windows)) == plain
    assert contents(tar_of(tmp_path / "dot.tar", with_dot)) == plain
    unpacked = tmp_path / "unpacked"  # by a program that takes the backslashes for parts of the names
    put(unpacked / "images\\a.jpg", b"a")
    put(unpacked / "images\\b\\c.jpg", b"c")
    assert contents(unpacked) == plain


def test_accents_of_one_or_two_characters_are_the_same(tmp_path: Path) -> None:
    put(tmp_path / "folder" / SPLIT, b"x")
    for source in (
        zip_of(tmp_path / "a.zip", {SPLIT: b"x"}),
        tar_of(tmp_path / "a.tar", {SPLIT: b"x"}),
        tmp_path / "folder",
    ):
        assert contents(source) == {COMPOSED: b"x"}
    assert plain_name(SPLIT) == COMPOSED
    put(tmp_path / "folder" / COMPOSED, b"y")
    with pytest.raises(ValueError, match=r"folder holds 'images/.*' and 'images/.*', which are one name; keep one"):
        file_names(tmp_path / "folder")


def test_utf_8_in_a_zip_that_does_not_say_so_is_read_as_such(tmp_path: Path) -> None:
    data = zip_of(tmp_path / "said.zip", {COMPOSED: b"x"}).read_bytes()
    for header, at in ((b"PK\3\4", 7), (b"PK\1\2", 9)):  # the higher byte of the flags
        start = data.index(header)
        assert data[start + at] == 8
        data = data[: start + at] + b"\0" + data[start + at + 1 :]
    (tmp_path / "not said.zip").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "not said.zip") as archive:
        assert archive.namelist() != [COMPOSED]
    assert contents(tmp_path / "not said.zip") == {COMPOSED: b"x"}


def test_names_that_are_not_utf_8_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    Path(os.fsdecode(bytes(tmp_path / "folder") + b"/\xe9.jpg")).write_bytes(b"x")
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("\udce9.jpg"))
    for source in (tmp_path / "folder", tmp_path / "a.tar"):
        with pytest.raises(ValueError, match=r"holds a file whose name is not UTF-8, '\\udce9\.jpg'; rename it"):
            file_names(source)


def test_links_that_lead_nowhere_or_in_a_circle_are_named(tmp_path: Path) -> None:
    put(tmp_path / "d/images/a.jpg", b"a")
    put(tmp_path / "elsewhere/b.jpg", b"b")
    (tmp_path / "d/more").symlink_to(tmp_path / "elsewhere")
    assert file_names(tmp_path / "d") == ["images/a.jpg", "more/b.jpg"]
    for target, message in (
        ("..", r"d/images/link is a link to a folder in which it lies; remove the link"),
        ("gone.jpg", r"d/images/link is a link that leads nowhere; remove it"),
        ("link", r"d/images/link .* link"),
    ):
        (tmp_path / "d/images/link").symlink_to(target)
        with pytest.raises(ValueError, match=message):
            file_names(tmp_path / "d")
        (tmp_path / "d/images/link").unlink()
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "d")
    with pytest.raises(ValueError, match=r"more/back is a link to a folder in which it lies"):
        file_names(tmp_path / "d")


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"a\.jpg is no regular file; remove it"):
        file_names(tmp_path)


def test_links_in_a_tar_are_followed_and_those_in_a_zip_refused(tmp_path: Path) -> None:
    entries = []
    for name, link_type, target in (("soft.jpg", tarfile.SYMTYPE, "a.jpg"), ("hard.jpg", tarfile.LNKTYPE, "x/a.jpg")):
        entry = tarfile.TarInfo(f"x/{name}")
        entry.type, entry.linkname = link_type, target
        entries.append(entry)
    with tarfile.open(tar_of(tmp_path / "a.tar", {"x/a.jpg": b"a"}), "a") as archive:
        for entry in entries:
            archive.addfile(entry)
    assert contents(tmp_path / "a.tar") == {"x/a.jpg": b"a", "x/hard.jpg": b"a", "x/soft.jpg": b"a"}
    link = zipfile.ZipInfo("a.jpg")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr(link, "b.jpg")
    with pytest.raises(ValueError, match=r"a\.zip: a\.jpg cannot be read \(it is a symbolic link; put the file itself"):
        read_file(tmp_path / "a.zip", "a.jpg")


def test_a_file_that_a_tar_holds_twice_is_the_last(tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "a.tar", {"a.jpg": b"old"})
    with tarfile.open(tar, "a") as archive:
        entry = tarfile.TarInfo("a.jpg")
        entry.size = 3
        archive.addfile(entry, io.BytesIO(b"new"))
    assert contents(tar) == {"a.jpg": b"new"}


def test_an_archive_in_a_tar_is_read_in_place(tmp_path: Path) -> None:
    inner = zip_of(tmp_path / "inner.zip", {"a.png": b"a"}).read_bytes()
    outer = tar_of(tmp_path / "outer.tar", {"x/inner.zip": inner})
    assert contents(outer / "x/inner.zip") == {"a.png": b"a"}


def test_a_torn_tar_is_not_taken_for_a_shorter_one(tmp_path: Path) -> None:
    data = tar_of(tmp_path / "a.tar", {"a.jpg": b"a" * 600, "b.jpg": b"b"}).read_bytes()
    # headers are blocks of 512 bytes: a's, two of its contents, then b's
    wrong = data[: 3 * 512] + b"x" + data[3 * 512 + 1 :]
    for name, torn in (("header", wrong), ("end", data[: 3 * 512 - 100]), ("middle", data[: 3 * 512 + 100])):
        (tmp_path / f"{name}.tar").write_bytes(torn)
        with pytest.raises(ValueError, match=rf"{name}\.tar is not a whole archive \(.*\); fetch or copy it again"):
            file_names(tmp_path / f"{name}.tar")
