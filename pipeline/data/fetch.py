"""Gets a dataset's sources as published: archives verified under the storage root, never unpacked; folders in place.

For an archive that is published at a URL, looks first under the storage root, then in the mirrors' folders, then for
the dataset unpacked there; what is still missing is downloaded, from the mirrors that are URLs or its own.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

from pipeline.data.archive_files import archive_stem, check_archive, decompress, decompressed_name
from pipeline.data.download import (
    Fetched,
    at_hand,
    bytes_here,
    check_digest,
    check_space,
    downloaded,
    file_name,
    published_size,
    stored_digest,
)
from pipeline.data.login import LOGINS, has_login
from pipeline.storage.digests import file_digest, known_digest
from pipeline.storage.disk import in_gib
from pipeline.storage.files import link_or_copy, local_file, matching, read_json, sha256, whole_file, write_json
from pipeline.storage.progress import Progress
from pipeline.storage.results.data import FetchedDataset, FetchedSource
from pipeline.storage.results.folder import RESULTS, sound_result
from pipeline.storage.root import storage_root, stored
from pipeline.storage.stores import store_of

if TYPE_CHECKING:
    from pipeline.params.schema import DatasetConfig

WHOLE_DIGEST = 64
"""Digits of a SHA-256: an archive that has them all is the published one, to its last byte."""


class _Wanted(NamedTuple):
    """A source as params.yaml describes it."""

    url: str
    """Empty: `source` is a path."""
    source: str
    name: str
    size: int
    """Bytes; 0: not published."""
    sha256: str
    """Its first digits, lower case; empty: not published."""


def fetch(dataset: str, config: DatasetConfig, *, base: Path) -> FetchedDataset:
    """Get and verify every source of a dataset.

    base: folder that relative sources and mirrors start at. ValueError says in one sentence what is missing or altered.
    """
    if config.layout == "shapes":
        return FetchedDataset(dataset=dataset, sources=(), terms="", generate=dict(config.generate))
    if not config.sources:
        raise ValueError(
            f"datasets.{dataset}.sources is empty; list a zip or tar archive, a folder or a URL in params.yaml"
        )
    wanted = _wanted(config)
    folders = [_path(mirror, base) for mirror in config.mirrors if not is_url(mirror)]
    found = [_without_download(one, dataset=dataset, folders=folders, base=base) for one in wanted]
    missing = [one for one, source in zip(wanted, found, strict=True) if source is None]
    if missing and (folder := _unpacked(dataset, config, folders, names=[one.name for one in wanted])):
        print(f"{dataset} is here, unpacked ({folder})", file=sys.stderr)
        found = [_folder(folder, "")]
    elif missing:
        _check_terms(dataset, config, missing)
        _check_space(dataset, missing)
        bases = [mirror for mirror in config.mirrors if is_url(mirror)]
        found = [
            source or _download(one, bases=bases, login=config.login) for one, source in zip(wanted, found, strict=True)
        ]
    sources = tuple(source for source in found if source is not None)
    return FetchedDataset(dataset=dataset, sources=sources, terms=config.terms, generate={})


def lacking(dataset: str, config: DatasetConfig, *, base: Path, results: Path = RESULTS) -> list[str]:
    """What keeps a dataset from being fetched, in words that say what to do; empty: nothing, though a download may be
    to come. Looks for files and lengths only."""
    fetched = sound_result(FetchedDataset, dataset, results=results)
    if config.layout == "shapes" or (fetched is not None and _still_there(fetched)):
        return []
    if not config.sources:
        return [f"datasets.{dataset}.sources in params.yaml"]
    wanted = _wanted(config)
    folders = [_path(mirror, base) for mirror in config.mirrors if not is_url(mirror)]
    missing = [one for one in wanted if not _seems_here(one, folders, base)]
    if not missing or _unpacked(dataset, config, folders, names=[one.name for one in wanted]):
        return []
    if paths := [one.source for one in missing if not one.url]:
        return [f"{', '.join(paths)} (or another datasets.{dataset}.sources in params.yaml)"]
    to_download = []
    if config.terms and not config.accept_terms:
        to_download.append(f"datasets.{dataset}.accept_terms: true (the terms are beside it in params.yaml)")
    if config.login and not has_login(config.login):
        login = LOGINS[config.login]
        to_download.append(f"a login ({login.username} and {login.password}, or an entry in ~/.netrc)")
    if not to_download:
        return []
    here = next((f" in {mirror}/, or" for mirror in config.mirrors if not is_url(mirror)), ":")
    return [f"{', '.join(one.name for one in missing)}{here} {' and '.join(to_download)}"]


def gone(dataset: str, config: DatasetConfig, fetched: FetchedDataset, *, base: Path) -> list[str]:
    """Names of the sources that were fetched and are not here; empty too where others are wanted now."""
    if config.layout == "shapes" or not config.sources:
        return []
    wanted = _wanted(config)
    folders = [_path(mirror, base) for mirror in config.mirrors if not is_url(mirror)]
    missing = [one.name for one in wanted if not _seems_here(one, folders, base)]
    unpacked = [source.name for source in fetched.sources if source.path.endswith("folder.json")]
    same = [source.name for source in fetched.sources] == [one.name for one in wanted] or (
        unpacked and all(is_url(source) for source in config.sources)
    )
    return missing if same and not _unpacked(dataset, config, folders, names=[one.name for one in wanted]) else []


def _still_there(fetched: FetchedDataset) -> bool:
    """Whether all that was fetched lies where it was put."""
    try:
        for source in fetched.sources:
            entry = stored(source.path, made_by="")
            if entry.name == "folder.json" and not Path(read_json(entry, made_by="")["folder"]).is_dir():
                return False
    except ValueError:
        return False
    return True


def _seems_here(wanted: _Wanted, folders: Sequence[Path], base: Path) -> bool:
    """Whether there is a file or folder by the name, and of the length, of a source."""
    if not wanted.url:
        return _path(wanted.source, base).exists()
    if wanted.sha256:
        found = matching(storage_root() / "archives", f"{wanted.sha256[:16]}*/{wanted.name}")
        if any(path.is_file() for path in found):
            return True
    return any(
        (path := folder / wanted.name).is_file() and wanted.size in (0, path.stat().st_size) for folder in folders
    )


def open_sources(fetched: FetchedDataset) -> list[Path]:
    """Archives and folders that `fetch` recorded, as files of this host, checked against their digests.

    ValueError names what is gone or altered and the command that fetches it again.
    """
    made_by = f"python -m stages.fetch {fetched.dataset}"
    paths = []
    for source in fetched.sources:
        entry = stored(source.path, made_by=made_by)
        if entry.name == "folder.json":
            path = Path(read_json(entry, made_by=made_by)["folder"])
            if not path.is_dir():
                raise ValueError(f"folder {path} is gone, or on another host; put it back or run {made_by}")
            digest = folder_digest(path)[0]
        else:
            path, digest = store_of(entry).local_and_digest(source.sha256, file_digest)
        if digest != source.sha256:
            raise ValueError(
                f"{path} has changed since it was fetched (sha256 {digest[:16]}, was {source.sha256[:16]}); "
                f"run {made_by}"
            )
        paths.append(path)
    return paths


def is_url(source: str) -> bool:
    """Whether a source is to be downloaded."""
    return "://" in source


def _wanted(config: DatasetConfig) -> list[_Wanted]:
    """The sources with what is published about each. `URL#name` names a file whose URL does not end with its name."""
    wanted = []
    for index, source in enumerate(config.sources):
        url, _, name = source.partition("#") if is_url(source) else ("", "", "")
        name = file_name(name or url) if url else Path(source).name
        size = config.bytes[index] if config.bytes else 0
        digest = config.sha256[index].lower() if config.sha256 else ""
        wanted.append(_Wanted(url, source, name, size, digest))
    return wanted


def _path(source: str, base: Path) -> Path:
    try:
        return (base / Path(source).expanduser()).absolute()
    except RuntimeError:
        raise ValueError(f"{source} names the home folder of a user that there is not; give the whole path") from None


def _without_download(wanted: _Wanted, *, dataset: str, folders: Sequence[Path], base: Path) -> FetchedSource | None:
    """A source that is on this machine; None: it has to be downloaded. ValueError when a path is wrong."""
    if not wanted.url:
        path = _path(wanted.source, base)
        if path.is_dir():
            return _folder(path, wanted.sha256)
        if not path.is_file():
            raise ValueError(
                f"{path} does not exist; put the archive or folder there, or change "
                f"datasets.{dataset}.sources in params.yaml"
            )
        return _archive(path, wanted)
    found = at_hand(wanted.name, url=wanted.url, size=wanted.size, sha256_prefix=wanted.sha256)
    if found:
        print(f"{wanted.name} is here already ({found.path})", file=sys.stderr)
        return _as_source(found)
    for folder in folders:
        path = folder / wanted.name
        if path.is_file():
            try:
                source = _archive(path, wanted)
            except ValueError as error:
                print(
                    f"{error}; it is left out (list it in datasets.{dataset}.sources to use it as it is)",
                    file=sys.stderr,
                )
            else:
                print(f"{wanted.name} is here ({path})", file=sys.stderr)
                return source
    return None


_TOPS: Mapping[str, tuple[str, ...]] = {
    "folder": ("images", "annotations"),
    "cityscapes": ("leftImg8bit", "gtFine"),
    "ade20k": ("images", "annotations", "annotations_instance"),
}
"""By layout, the folders of all splits' folders."""


def _unpacked(dataset: str, config: DatasetConfig, folders: Sequence[Path], *, names: Sequence[str]) -> Path | None:
    """The folder that holds all of a dataset, unpacked: <mirror>/<dataset>, <mirror>/<archive without suffix> or the
    mirror itself, if the folders in it are unmistakable."""
    splits = config.splits.values()
    if config.layout in _TOPS:
        needed = [f"{top}/{split}" for top in _TOPS[config.layout] for split in splits]
    elif config.layout == "vistas":
        needed = [f"{split}/images" for split in splits]
    elif config.layout == "voc":
        needed = ["JPEGImages", "SegmentationClass", *(f"ImageSets/Segmentation/{split}.txt" for split in splits)]
    else:
        label_types = (
            ("instances", "panoptic") if set(config.class_names) - set(config.thing_classes) else ("instances",)
        )
        needed = [*splits, *(config.annotation_path(name, split) for name in label_types for split in config.splits)]
    for mirror in folders:
        inside = [mirror / dataset, *(mirror / archive_stem(name) for name in names)]
        # images/ and annotations/ may be anybody's
        for folder in inside if config.layout == "folder" else [*inside, mirror]:
            if all((folder / path).exists() for path in needed):
                return folder
    return None


def _check_terms(dataset: str, config: DatasetConfig, missing: Sequence[_Wanted]) -> None:
    """Name what is about to be downloaded, and its terms. ValueError unless they are accepted."""
    archives = ", ".join(f"{one.name} ({in_gib(one.size)})" if one.size else one.name for one in missing)
    print(f"{dataset}: to be downloaded: {archives}", file=sys.stderr)
    if not config.terms:
        return
    print(f"{dataset} comes under these terms: {config.terms}", file=sys.stderr)
    if not config.accept_terms:
        here = ", or put the archives where its `mirrors` say" if config.mirrors else ""
        raise ValueError(
            f"{dataset} carries terms ({config.terms}); to download it under them set "
            f"datasets.{dataset}.accept_terms: true in params.yaml{here}"
        )


def _check_space(dataset: str, missing: Sequence[_Wanted]) -> None:
    """ValueError unless the storage root has room for what is still to come of all archives."""
    check_space(
        f"downloading {dataset}",
        sum(max(0, (one.size or published_size(one.url)) - bytes_here(one.url, one.name)) for one in missing),
    )


def _download(wanted: _Wanted, *, bases: Sequence[str], login: str) -> FetchedSource:
    """An archive after downloading it, from the first place that has the published one."""

    def get(url: str, login: str) -> FetchedSource:
        check = None if len(wanted.sha256) == WHOLE_DIGEST else check_archive
        return _as_source(
            downloaded(url, name=wanted.name, size=wanted.size, sha256_prefix=wanted.sha256, login=login, check=check)
        )

    for mirror in bases:
        try:
            return get(f"{mirror.rstrip('/')}/{quote(wanted.name)}", "")
        except ValueError as error:
            print(f"{error}; trying the next place", file=sys.stderr)
    return get(wanted.url, login)


def _archive(path: Path, wanted: _Wanted) -> FetchedSource:
    """An archive on this machine, linked or copied into the storage root."""
    size = path.stat().st_size
    if wanted.size and size != wanted.size:
        raise ValueError(
            f"{path} is {size:,} bytes long, published are {wanted.size:,}; it is truncated or altered: get it again"
        )
    digest = known_digest(path)
    check_digest(str(path), digest, wanted.sha256)
    target = storage_root() / "archives" / digest[:16] / path.name
    # What lies there has been checked before it was put there.
    if not (target.is_file() and (store_of(target).is_same_file(path) or sha256(target) == digest)):
        if len(wanted.sha256) < WHOLE_DIGEST:
            check_archive(path, str(path))
        link_or_copy(path.resolve(), target)
    return _as_source(Fetched(target, digest))


def _folder(path: Path, expected: str) -> FetchedSource:
    """A folder that is read where it is, with a file under the storage root that says where."""
    inside = [str(place) for place in (RESULTS, storage_root()) if Path(str(place)).absolute().is_relative_to(path)]
    if inside:
        raise ValueError(
            f"{path} is to be read as a dataset, but holds {inside[0]}, which changes with every command; move the "
            "dataset's files to a folder of their own"
        )
    state, size = _folder_state(path)
    digest = known_digest(path, lambda _: folder_digest(path)[0], state=state)
    check_digest(str(path), digest, expected)
    pointer = f"archives/{digest[:16]}/folder.json"
    store_of(storage_root()).say_not_copied(path)
    write_json(storage_root() / pointer, {"folder": str(path)})
    return FetchedSource(name=path.name, bytes=size, sha256=digest, path=pointer)


def _as_source(found: Fetched) -> FetchedSource:
    """An archive as it is read. Of a compressed tar archive that is another file beside it, decompressed: in the
    published one no file can be found without reading all that come before it."""
    path, digest = found
    if name := decompressed_name(path):
        target = path.with_name(name)
        if not target.is_file():
            with local_file(path, digest) as packed, whole_file(target) as partial:
                decompress(packed, partial, path.name)
        path, digest = target, stored_digest(target)
    relative = path.relative_to(str(storage_root())).as_posix()
    return FetchedSource(name=found.path.name, bytes=path.stat().st_size, sha256=digest, path=relative)


def _names(folder: Path) -> list[str]:
    """A folder's visible files, sorted. ValueError names one whose name is not UTF-8."""
    from pipeline.data.archives import folder_files

    names = folder_files(folder)
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{folder} holds a file whose name is not UTF-8, {name!r}; rename it") from None
    return names


def _folder_state(folder: Path) -> tuple[str, int]:
    """A digest of the names, sizes and modification times of a folder's visible files, and their bytes."""
    state, total = hashlib.sha256(), 0
    for name in _names(folder):
        status = (folder / name).stat()
        state.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        total += status.st_size
    return state.hexdigest(), total


def folder_digest(folder: Path) -> tuple[str, int]:
    """SHA-256 over the sorted relative names, sizes and contents of a folder's visible files, and their bytes."""
    names = _names(folder)
    if not names:
        raise ValueError(f"folder {folder} is empty")
    whole, total = hashlib.sha256(), 0
    progress = Progress(f"reading {folder.name}", len(names), unit="files")
    for name in names:
        size = (folder / name).stat().st_size
        whole.update(f"{name}\0{size}\0{sha256(folder / name)}\n".encode())
        total += size
        progress.add()
    progress.done(brief=True)
    return whole.hexdigest(), total
