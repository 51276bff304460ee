from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.shards import reader
from pipeline.storage import files
from pipeline.storage.results.data import Manifest
from tests.helpers.images import image, labels, raw, stored, write_shards
from tests.helpers.loading import batches, images_of, shard_path


@pytest.mark.parametrize("truncated", [True, False])
def test_an_altered_shard_is_named_with_both_digests(manifest: Manifest, storage: Path, truncated: bool) -> None:
    path = shard_path(storage, manifest)
    batches(manifest)  # verified now, so the note says that it is whole
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data[:-10] if truncated else data)
    expected = manifest.splits["train"].shards[0].sha256
    with pytest.raises(
        ValueError, match=rf"train-00000\.arrow is truncated or altered: its sha256 is [0-9a-f]{{64}}, .*{expected}.*"
    ) as caught:
        batches(manifest)
    assert "make it again with: python -m stages.shard mine" in str(caught.value)


def test_a_missing_shard_is_named_with_the_command_that_makes_it(manifest: Manifest, storage: Path) -> None:
    shard_path(storage, manifest).unlink()
    with pytest.raises(ValueError, match=r"train-00000\.arrow is missing .* python -m stages\.shard mine"):
        batches(manifest)


def test_shards_are_verified_once_per_host(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    monkeypatch.setattr(reader, "sha256", lambda path: read.append(path) or files.sha256(path))
    for _ in range(3):
        batches(manifest, steps=1)
    assert len(read) == 2  # of 7 records, four to a shard
    monkeypatch.setattr("socket.gethostname", lambda: "another-host")
    batches(manifest, steps=1)
    assert len(read) == 4


@pytest.mark.parametrize("processes", [0, 1])
def test_a_record_that_fails_is_named(storage: Path, monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    manifest = write_shards(storage, {"train": [stored("p0", image(), labels() % 9)]})
    path = shard_path(storage, manifest)
    data = path.read_bytes()
    start = data.index(b"\x89PNG")  # the first picture's header
    path.write_bytes(data[:start] + b"\0" * 20 + data[start + 20 :])
    monkeypatch.setattr(reader, "verify_shards", lambda *_: None)  # as if it was altered after verification
    with pytest.raises(ValueError, match=r"train-00000\.arrow: p0 does not decode") as caught:
        batches(manifest, processes=processes)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("processes", [0, 1])
@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        ("raw", {"image": b"\1" * 575}, "575 bytes of pixels instead of 576 for 12 x 16 x 3; the shard is altered"),
        ("raw", {"segments": b"\1" * 191}, "191 bytes of pixels instead of 192 for 12 x 16; the shard is altered"),
        ("raw", {"segments": b"\7" * 192}, "holds segment 7, but has 3; the shard is altered"),
        ("encoded", {"segments": b"no PNG"}, "the segments do not decode; the shard is altered"),
        ("encoded", {"image": b""}, "does not decode"),
        ("encoded", {"height": 13}, "decodes to 12 x 16 pixels instead of 13 x 16; the shard is altered"),
    ],
)
def test_torn_pixels_are_named_with_shard_and_record(
    storage: Path, layout: str, changes: dict[str, Any], message: str, processes: int
) -> None:
    record = stored("p0", image(), np.zeros((12, 16), np.uint8))
    torn = {**(raw(record) if layout == "raw" else record), **changes}
    manifest = dataclasses.replace(write_shards(storage, {"train": [torn]}), pixel_layout=layout)
    with pytest.raises(ValueError, match=rf"shards/mine/train-00000\.arrow: p0:? {message}"):
        batches(manifest, processes=processes)


def test_a_record_whose_header_is_torn_is_named(
    storage: Path, monkeypatch: pytest.MonkeyPatch, manifest: Manifest
) -> None:
    path = shard_path(storage, manifest)
    split = reader.SplitReader.of(manifest, "train", "semantic")
    data = bytearray(path.read_bytes())
    starts = [at for at in range(0, len(data), 8) if data[at : at + 4] == b"\xff\xff\xff\xff"]  # of Arrow's messages
    data[starts[2] + 8 : starts[2] + 40] = b"\xff" * 32  # schema, first record, second record
    path.write_bytes(data)
    assert split[0].name == "p0"
    with pytest.raises(
        ValueError, match=r"train-00000\.arrow: record 1 is not readable .* python -m stages\.shard mine"
    ):
        _ = split[1].name


def test_a_hosts_copies_of_shards_are_read_where_a_cache_is_set(
    manifest: Manifest, tmp_path: Path, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = images_of(batches(manifest))
    monkeypatch.setenv("M2F_SHARD_CACHE", str(tmp_path / "cache"))
    opened: list[Path] = []
    mapped = reader._mapped
    monkeypatch.setattr(reader, "_mapped", lambda path: opened.append(path) or mapped(path))
    assert images_of(batches(manifest)) == expected
    assert {path.parent.parent for path in opened} == {tmp_path / "cache"}
    assert images_of(batches(manifest, processes=2)) == expected
    assert len(list((tmp_path / "cache").glob("*/*.arrow"))) == 2
