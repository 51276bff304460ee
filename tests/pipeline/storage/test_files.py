from __future__ import annotations

import errno
import os
import stat
import uuid
from pathlib import Path

import pytest

from pipeline.storage.files import (
    Lines,
    copy_file,
    delete,
    files_below,
    link_or_copy,
    read_json,
    sha256,
    whole_file,
    write_json,
    write_text,
)
from pipeline.storage.root import root_at


@pytest.fixture(params=["folder", "s3", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A storage root of every kind: a folder, a bucket on a server, and another of fsspec's drivers."""
    if request.param == "s3":
        bucket: Path = request.getfixturevalue("bucket")
        return bucket
    return root_at(f"memory://{uuid.uuid4().hex}/x" if request.param == "memory" else str(tmp_path / "root"))


def test_a_file_is_written_whole_or_not_at_all(root: Path) -> None:
    path = root / "new" / "facts.json"
    write_json(path, {"a": 1})

    def interrupted() -> None:
        with whole_file(path) as partial:
            partial.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert read_json(path, made_by="x") == {"a": 1}
    assert [entry.name for entry in path.parent.iterdir()] == ["facts.json"]


def test_a_pipe_or_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is a device, a pipe or a socket, which no file replaces"):
        write_text(tmp_path / "pipe", "text")
    assert (tmp_path / "pipe").is_fifo() and [path.name for path in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "Disk quota exceeded"),
     RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")],
)  # fmt: skip
def test_a_full_disk_is_said_with_what_to_do(tmp_path: Path, error: Exception) -> None:
    def write() -> None:
        with whole_file(tmp_path / "checkpoint") as partial:
            partial.write_bytes(bytes(100))
            raise error

    with pytest.raises(ValueError, match="checkpoint could not be written, for its disk is full; make room"):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a file of Linux that is always full")
def test_lines_that_find_no_room_say_so(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "curve.jsonl", "")
    lines.file.close()
    lines.file = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(ValueError, match="curve.jsonl could not be written, for its disk is full"):
        lines.add("{}")


def test_values_that_are_not_json_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "facts.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_written_files_can_be_read_by_others(tmp_path: Path) -> None:
    write_json(tmp_path / "facts.json", {})
    assert (tmp_path / "facts.json").stat().st_mode & stat.S_IRUSR
    (tmp_path / "plain").touch()
    assert (tmp_path / "facts.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_missing_and_torn_facts_name_the_command_that_makes_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="facts.json does not exist; make it with: dvc repro shard@x"):
        read_json(tmp_path / "facts.json", made_by="dvc repro shard@x")
    (tmp_path / "facts.json").write_text('{"a": ')
    with pytest.raises(ValueError, match="facts.json is not JSON .* make it again with: dvc repro shard@x"):
        read_json(tmp_path / "facts.json", made_by="dvc repro shard@x")


def test_a_digest_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert sha256(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_files_are_found_copied_and_deleted_by_their_paths(root: Path, tmp_path: Path) -> None:
    assert files_below(root) == {}
    write_text(root / "a/one.txt", "one")
    write_text(root / "a/b/empty.txt", "")
    assert files_below(root) == {"a/b/empty.txt": 0, "a/one.txt": 3}
    for copy in (copy_file, link_or_copy):
        copy(root / "a/one.txt", root / "c/two.txt")  # within the root
        copy(root / "a/one.txt", tmp_path / "here/three.txt")  # out of it
        copy(tmp_path / "here/three.txt", root / "c/three.txt")  # into it
        copy(root / "a/b/empty.txt", root / "c/three.txt")  # in another's place
    assert (tmp_path / "here/three.txt").read_text() == "one"
    assert files_below(root / "c") == {"three.txt": 0, "two.txt": 3}
    assert sha256(root / "c/two.txt") == sha256(tmp_path / "here/three.txt")
    delete(root / "a")
    delete(root / "c/two.txt")
    assert files_below(root) == {"c/three.txt": 0}


def test_lines_are_in_their_place_when_they_are_saved(root: Path) -> None:
    path = root / "run/curve.jsonl"
    lines = Lines(path, "0\n")
    lines.add("1")
    lines.save()
    assert path.read_text() == "0\n1\n"
    lines.add("2")
    lines.close()
    assert path.read_text() == "0\n1\n2\n"
    assert lines.closed


def test_a_local_copy_is_no_hard_link_but_a_link_is(tmp_path: Path) -> None:
    write_text(tmp_path / "one", "one")
    copy_file(tmp_path / "one", tmp_path / "copied")
    link_or_copy(tmp_path / "one", tmp_path / "linked")
    assert [os.stat(tmp_path / name).st_nlink for name in ("one", "copied", "linked")] == [2, 1, 2]
