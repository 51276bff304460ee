from __future__ import annotations

import inspect
import uuid
from pathlib import Path

import pytest

from pipeline.storage.files import files_below, write_text
from pipeline.storage.root import root_at
from pipeline.storage.stores import FileStore, ObjectStore, StoredPath, store_of


@pytest.fixture(params=["folder", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> StoredPath:
    """A storage root of either class."""
    return root_at(f"memory://{uuid.uuid4().hex}/x" if request.param == "memory" else str(tmp_path / "root"))


def operations(store: type) -> dict[str, inspect.Signature]:
    return {name: inspect.signature(each) for name, each in vars(store).items() if not name.startswith("_")}


def test_both_stores_have_the_same_operations() -> None:
    assert operations(FileStore) == operations(ObjectStore)


def test_a_path_says_its_store() -> None:
    assert isinstance(store_of(Path("x")), FileStore)
    assert isinstance(store_of(root_at("memory://x/y") / "z"), ObjectStore)


def test_a_file_gets_another_name_in_its_folder(root: StoredPath) -> None:
    write_text(root / "a/one.safetensors", "1")
    store_of(root / "a/one.safetensors").rename("one.damaged")
    assert files_below(root) == {"a/one.damaged": 1}


def test_a_local_file_is_taken_to_its_place(root: StoredPath, tmp_path: Path) -> None:
    write_text(root / "a/url.json", "")
    write_text(tmp_path / "incoming.part", "data")
    store_of(root / "a/archive.zip").take(tmp_path / "incoming.part")
    assert (root / "a/archive.zip").read_text() == "data"
    assert not (tmp_path / "incoming.part").exists()


def test_a_folder_that_is_held_alone_is_moved_with_what_was_finished_in_it(root: StoredPath) -> None:
    building = root / "shards/.building-x"
    with store_of(building).held_alone("busy"):
        for name in ("build.json", "a.arrow"):
            write_text(building / name, name)
        store_of(building).move_folder_to(root / "shards/x", last="build.json")
    assert files_below(root) == {"shards/x/a.arrow": 7, "shards/x/build.json": 10}


def test_a_folder_of_files_is_held_by_one_alone_and_one_that_stays_empty_is_gone(tmp_path: Path) -> None:
    with store_of(tmp_path / "a").held_alone("busy"), pytest.raises(ValueError, match=r"^two are at it$"):
        store_of(tmp_path / "a").held_alone("two are at it").__enter__()
    assert not (tmp_path / "a").exists()


def test_a_folder_is_held_while_a_process_has_it_and_asking_writes_nothing(tmp_path: Path) -> None:
    store = store_of(tmp_path / "a")
    assert not store.is_held() and not (tmp_path / "a").exists()
    with store.held_alone("busy"):
        assert store.is_held()
    (tmp_path / "a").mkdir()
    (tmp_path / "a/.lock").touch()  # by a process that was killed
    assert not store.is_held()


def test_what_a_folder_was_moved_from_can_be_held_by_another_at_once(tmp_path: Path) -> None:
    building = store_of(tmp_path / "a")
    with building.held_alone("busy"):
        building.move_folder_to(tmp_path / "b", last="x")
        with building.held_alone("busy"):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_file_that_is_being_written_shows_its_bytes_on_a_file_system_only(root: StoredPath) -> None:
    with store_of(root / "a.arrow").written_whole() as partial:
        partial.write_bytes(bytes(100))
        assert store_of(root / "a.arrow").bytes_so_far() == (100 if isinstance(root, Path) else 0)
        assert store_of(root / "b.arrow").bytes_so_far() == 0
    assert store_of(root / "a.arrow").bytes_so_far() == 0
