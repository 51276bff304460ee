from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest

from pipeline.storage import host_cache
from pipeline.storage.files import local_copy
from pipeline.storage.host_cache import _lock
from tests.helpers.waiting import LIMIT_S

KIB = 1 << 10


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's folder; nothing is held from before."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("M2F_SHARD_CACHE", str(folder))
    monkeypatch.delenv("M2F_SHARD_CACHE_GIB", raising=False)
    monkeypatch.setattr(host_cache, "_held", {})
    return folder


def shard(folder: Path, seed: int, size: int = KIB) -> tuple[Path, str]:
    """A file of `size` bytes and its SHA-256."""
    path = folder / f"train-{seed:05d}.arrow"
    path.write_bytes(bytes([seed]) * size)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def bound(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setenv("M2F_SHARD_CACHE_GIB", str(size / 2**30))


def close_all() -> None:
    """As if the process had ended."""
    for lock in host_cache._held.values():
        lock.close()
    host_cache._held.clear()


def kept(cache: Path) -> set[int]:
    """Seeds of the shards that have a copy."""
    return {path.read_bytes()[0] for path in cache.glob("*/*.arrow")}


def test_without_a_cache_shards_are_read_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("M2F_SHARD_CACHE")
    path, digest = shard(tmp_path, 1)
    assert local_copy(path, digest) == path


def test_a_shard_is_copied_once(tmp_path: Path, cache: Path) -> None:
    path, digest = shard(tmp_path, 1)
    copy = local_copy(path, digest)
    assert copy == cache / digest / path.name
    assert copy.read_bytes() == path.read_bytes()
    path.unlink()
    close_all()
    assert local_copy(path, digest) == copy


def test_a_shard_that_is_not_what_the_manifest_says_is_not_kept(tmp_path: Path, cache: Path) -> None:
    path, digest = shard(tmp_path, 1)
    path.write_bytes(b"torn")
    with pytest.raises(ValueError, match=rf"train-00001\.arrow is truncated or altered: .* results/ says {digest}"):
        local_copy(path, digest)
    assert kept(cache) == set() and not list(cache.rglob("*.part"))


@pytest.mark.parametrize("length", [0, 500, KIB])
def test_a_corrupted_copy_is_made_again(tmp_path: Path, length: int) -> None:
    path, digest = shard(tmp_path, 1)
    copy = local_copy(path, digest)
    copy.write_bytes(b"x" * length)
    os.utime(copy, (0, 0))  # changed at another time, also where clocks are coarse
    close_all()
    assert local_copy(path, digest) == copy
    assert copy.read_bytes() == path.read_bytes()


def test_what_a_killed_process_left_half_copied_is_removed(tmp_path: Path, cache: Path) -> None:
    (cache / "abc").mkdir(parents=True)
    (cache / "abc" / ".train-00000.arrow.123.part").write_bytes(b"half")
    local_copy(*shard(tmp_path, 1))
    assert not list(cache.rglob("*.part"))


def test_the_longest_unused_copies_make_room(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = {seed: shard(tmp_path, seed) for seed in range(5)}
    bound(monkeypatch, 3 * KIB)
    for at, seed in enumerate((0, 1, 2, 0)):  # 0 was used last
        os.utime(_lock(local_copy(*shards[seed])), ns=(at, at))
    close_all()
    local_copy(*shards[3])
    assert kept(cache) == {0, 2, 3}
    local_copy(*shards[4])
    assert kept(cache) == {0, 3, 4}


def test_copies_in_use_are_never_deleted_and_what_has_no_room_is_read_where_it_lies(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound(monkeypatch, 2 * KIB + 100)
    shards = [shard(tmp_path, seed) for seed in range(3)]
    assert [local_copy(*each).is_relative_to(cache) for each in shards] == [True, True, False]
    assert kept(cache) == {0, 1}
    assert local_copy(*shards[2]) == shards[2][0]
    close_all()
    assert local_copy(*shards[2]).is_relative_to(cache)
    assert 2 in kept(cache)
    assert len(kept(cache)) == 2


def test_a_tenth_of_the_disk_stays_free(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, digest = shard(tmp_path, 1)
    for free, kept_there in ((100 * KIB + 1023, False), (101 * KIB, True)):
        usage = shutil._ntuple_diskusage(1000 * KIB, 0, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        assert local_copy(path, digest).is_relative_to(cache) == kept_there


@pytest.mark.parametrize("setting", ["much", "-1", "nan"])
def test_a_bound_that_is_no_size_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    monkeypatch.setenv("M2F_SHARD_CACHE_GIB", setting)
    with pytest.raises(ValueError, match=f"M2F_SHARD_CACHE_GIB is '{setting}'; it must be a number of GiB from 0 on"):
        local_copy(*shard(tmp_path, 1))


def _race(
    shards: list[tuple[Path, str]], start: multiprocessing.synchronize.Barrier, results: multiprocessing.Queue
) -> None:
    copies: list[str] = []
    copy, host_cache._copy = host_cache._copy, lambda *args: (copies.append(str(args[0])), copy(*args))
    start.wait()
    read = [hashlib.sha256(local_copy(*each).read_bytes()).hexdigest() == each[1] for each in shards]
    start.wait()  # nobody's copies are free for deletion before all have theirs
    results.put((copies, read))


def test_processes_that_race_copy_every_shard_once_and_read_it_whole(tmp_path: Path, cache: Path) -> None:
    shards = [shard(tmp_path, seed, 200 * KIB) for seed in range(20)]
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(3), context.Queue()
    racing = [context.Process(target=_race, args=(shards[:: 1 - 2 * (each % 2)], start, results)) for each in range(3)]
    for process in racing:
        process.start()
    found = [results.get(timeout=LIMIT_S) for _ in racing]
    for process in racing:
        process.join()
    assert all(all(read) for _, read in found)
    copied = [name for copies, _ in found for name in copies]
    assert len(copied) == len(set(copied)) == 20


def test_processes_that_race_keep_the_bound(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bound(monkeypatch, 1100 * KIB)  # five of twenty
    shards = [shard(tmp_path, seed, 200 * KIB) for seed in range(20)]
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(2), context.Queue()
    racing = [context.Process(target=_race, args=(shards[:: 1 - 2 * each], start, results)) for each in range(2)]
    for process in racing:
        process.start()
    found = [results.get(timeout=LIMIT_S) for _ in racing]
    for process in racing:
        process.join()
    assert all(all(read) for _, read in found)
    assert len(kept(cache)) == 5


def test_a_cache_that_cannot_be_made_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("M2F_SHARD_CACHE", str(tmp_path / "file"))
    shard = tmp_path / "train-00000.arrow"
    shard.write_bytes(b"records")
    with pytest.raises(ValueError, match=r"M2F_SHARD_CACHE is .*file, where train-00000\.arrow cannot be kept"):
        local_copy(shard, "0" * 64)
