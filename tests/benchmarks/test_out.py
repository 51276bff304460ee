"""The file that a benchmark writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.out import refuse_unwritable, sole_writer


def test_a_second_benchmark_that_writes_the_same_file_is_refused_and_another_file_is_not(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    with sole_writer(out, {"left": ["one", "two"]}):
        with (
            pytest.raises(SystemExit, match="error: another benchmark is writing .*found.json; take another --out"),
            sole_writer(out, {}),
        ):
            pass
        with sole_writer(tmp_path / "other.json", {}):
            pass
        assert json.loads(out.read_text()) == {"left": ["one", "two"]}
    with sole_writer(out, {"left": []}):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.json", "other.json"]


def test_a_missing_folder_is_made_and_what_is_no_file_is_refused(tmp_path: Path) -> None:
    refuse_unwritable(tmp_path / "new" / "found.json")
    assert (tmp_path / "new").is_dir()
    with pytest.raises(SystemExit, match="error: --out .*new is a folder; name a file, such as .*new/found.json"):
        refuse_unwritable(tmp_path / "new")
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="error: --out .*found.json cannot be written"):
        refuse_unwritable(tmp_path / "file" / "found.json")


def test_a_folder_that_this_user_may_not_write_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(SystemExit, match="cannot be written .this user may not write into .*; take a file in a folder"):
        refuse_unwritable(tmp_path / "found.json")
