"""What the process for inputs does with one of them, and what must hold of its end."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.fuzz.child import Sentence

LONGEST = 500
"""Characters of a sentence."""


def shard(sources: Sequence[Path], storage: Path, settings: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows of every split of a dataset, by name, as the shards hold them."""
    import pyarrow as pa

    from pipeline.data.shards import build
    from pipeline.params.schema import DatasetConfig
    from pipeline.storage.results.data import FetchedSource

    os.environ["M2F_STORAGE"] = str(storage)
    sources = [_fetched(source) for source in sources]
    facts = [FetchedSource(name=source.name, path="mine/folder.json", bytes=0, sha256="") for source in sources]
    manifest = build.build("mine", DatasetConfig(**settings), sources, facts=facts, processes=0)
    return {
        name: [row for each in split.shards for row in pa.ipc.open_file(storage / each.path).read_all().to_pylist()]
        for name, split in manifest.splits.items()
    }


def archive_files(archive: Path) -> dict[str, bytes]:
    """All files of an archive."""
    from pipeline.data.archives import file_names, read_file

    archive = _fetched(archive)
    return {name: read_file(archive, name) for name in file_names(archive)}


def _fetched(source: Path) -> Path:
    """A source as fetching checks and decompresses it."""
    from pipeline.data.archive_files import check_archive, decompress, decompressed_name

    if source.is_dir():
        return source
    if name := decompressed_name(source):
        decompress(source, source.with_name(name), source.name)
        return source.with_name(name)
    check_archive(source, source.name)
    return source


def image(data: bytes, exif: str) -> Any:
    """A file's pixels, (h, w, 3) RGB, as the loader gets them."""
    from pipeline.data.images.image_files import ImageReading, loaded_image, memory_said, stored_image

    with memory_said("mine.jpg"):
        return loaded_image(stored_image(data, "mine.jpg", ImageReading(exif=exif)), "mine.jpg")


def params(file: Path) -> Any:
    """A params.yaml as settings."""
    from pipeline.params.load import load_params

    return load_params(file)


def check_sentence(said: Sentence, names: Sequence[str]) -> None:
    """AssertionError unless a refusal is one short line that names a file."""
    assert len(said) <= LONGEST, f"{len(said)} characters: {said}"
    assert said.isprintable(), repr(said)
    assert any(name in said for name in names), said
    assert "Traceback" not in said and "object at 0x" not in said, said


def check_storage(storage: Path, *, refused: bool) -> None:
    """AssertionError where a file is half-written, or a refused dataset has left a finished folder."""
    import pyarrow as pa

    for file in storage.rglob("*"):
        assert file.suffix in ("", ".arrow", ".json", ".png"), file
        if file.suffix == ".arrow":
            assert pa.ipc.open_file(file).num_record_batches >= 0
            assert file.with_suffix(".json").exists(), file
    finished = [folder for folder in storage.glob("shards/*") if not folder.name.startswith(".building-")]
    assert len(finished) == (0 if refused else 1)
    assert all((folder / "build.json").exists() for folder in finished)
