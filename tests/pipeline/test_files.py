from __future__ import annotations

import stat
from pathlib import Path

import pytest

from pipeline.files import read_json, sha256, whole_file, write_json


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "facts.json"
    write_json(path, {"a": 1})

    def interrupted() -> None:
        with whole_file(path) as partial:
            partial.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert read_json(path, made_by="x") == {"a": 1}
    assert [entry.name for entry in path.parent.iterdir()] == ["facts.json"]


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
