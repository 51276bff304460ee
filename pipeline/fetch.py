"""Gets a dataset's sources as published: archives verified under the storage root, never unpacked; folders in place."""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import json
import os
import shutil
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from pipeline.files import read_json, sha256, whole_file, write_json
from pipeline.progress import Progress
from pipeline.storage import storage_root, stored

if TYPE_CHECKING:
    from pipeline.params import DatasetConfig

ATTEMPTS = 6
"""Tries in a row without a new byte before a download is given up."""

BLOCK = 1 << 20

MIB = 2.0**-20


def fetch(dataset: str, config: DatasetConfig, *, base: Path) -> dict[str, Any]:
    """Get and verify every source of a dataset; the facts for results/fetch/<dataset>.json.

    base: folder that relative sources start at. ValueError says in one sentence what is missing or altered.
    """
    if config.layout == "shapes":
        return {"dataset": dataset, "sources": [], "terms": "", "generate": dict(config.generate)}
    if not config.sources:
        raise ValueError(f"datasets.{dataset}.sources is empty; list a zip archive, a folder or a URL in params.yaml")
    if config.sha256 and len(config.sha256) != len(config.sources):
        raise ValueError(
            f"datasets.{dataset} lists {len(config.sha256)} sha256 digests for {len(config.sources)} sources; "
            "give one for each, or none"
        )
    if config.terms and any(is_url(source) for source in config.sources):
        print(f"{dataset} comes under these terms: {config.terms}", file=sys.stderr)
        if not config.accept_terms:
            raise ValueError(
                f"{dataset} carries terms ({config.terms}); to download it under them set "
                f"datasets.{dataset}.accept_terms: true in params.yaml"
            )
    expected = config.sha256 or ("",) * len(config.sources)
    sources = [
        _fetch_source(source, digest.lower(), dataset=dataset, base=base)
        for source, digest in zip(config.sources, expected, strict=True)
    ]
    return {"dataset": dataset, "sources": sources, "terms": config.terms}


def open_sources(facts: Mapping[str, Any]) -> list[Path]:
    """Archives and folders that `fetch` recorded, checked against their digests.

    ValueError names what is gone or altered and the command that fetches it again.
    """
    made_by = f"python -m stages.fetch {facts['dataset']}"
    paths = []
    for source in facts["sources"]:
        path = stored(source["path"], made_by=made_by)
        if path.name == "folder.json":
            path = Path(read_json(path, made_by=made_by)["folder"])
            if not path.is_dir():
                raise ValueError(f"folder {path} is gone; put it back or run {made_by}")
            digest = folder_digest(path)[0]
        else:
            digest = sha256(path)
        if digest != source["sha256"]:
            raise ValueError(
                f"{path} has changed since it was fetched (sha256 {digest[:16]}, was {source['sha256'][:16]}); "
                f"run {made_by}"
            )
        paths.append(path)
    return paths


def is_url(source: str) -> bool:
    """Whether a source is to be downloaded."""
    return "://" in source


def _fetch_source(source: str, expected: str, *, dataset: str, base: Path) -> dict[str, Any]:
    if is_url(source):
        return check_archive(download(source, sha256_prefix=expected))
    path = (base / Path(source).expanduser()).absolute()
    if path.is_dir():
        digest, size = folder_digest(path)
        _check_digest(str(path), digest, expected)
        pointer = f"archives/{digest[:16]}/folder.json"
        write_json(storage_root() / pointer, {"folder": str(path)})
        return {"name": path.name, "path": pointer, "bytes": size, "sha256": digest}
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; put the archive or folder there, or change "
            f"datasets.{dataset}.sources in params.yaml"
        )
    digest = sha256(path)
    _check_digest(str(path), digest, expected)
    _check_zip(path)
    target = storage_root() / "archives" / digest[:16] / path.name
    if not (target.is_file() and sha256(target) == digest):
        _place(path.resolve(), target)
    return _facts(target, digest)


def check_archive(path: Path) -> dict[str, Any]:
    """Facts of a zip archive under the storage root, after reading it whole. An altered one is taken away."""
    try:
        _check_zip(path)
    except ValueError:
        path.unlink()
        raise
    return _facts(path, sha256(path))


def _facts(path: Path, digest: str) -> dict[str, Any]:
    relative = path.relative_to(storage_root()).as_posix()
    return {"name": path.name, "path": relative, "bytes": path.stat().st_size, "sha256": digest}


def _check_digest(what: str, digest: str, expected: str) -> None:
    if not digest.startswith(expected):
        raise ValueError(
            f"{what} has sha256 {digest}, expected {expected}; it is truncated or altered: get it again, "
            "or correct sha256 in params.yaml"
        )


def _check_zip(path: Path) -> None:
    """ValueError when any entry of a zip archive does not match its checksum."""
    advice = "it is truncated or altered: get it again"
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            progress = Progress(f"checking {path.name}", sum(e.file_size for e in entries), unit="MiB", scale=MIB)
            for entry in entries:
                with archive.open(entry) as file:
                    while block := file.read(BLOCK):
                        progress.add(len(block))
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a whole zip archive ({error}); {advice}") from None
    except (RuntimeError, NotImplementedError) as error:  # encrypted, unknown compression
        raise ValueError(f"{path} cannot be read ({error}); give a plain zip archive or a folder") from None
    except Exception as error:  # zlib.error has no public base class
        raise ValueError(f"{path} does not decompress ({error}); {advice}") from None


def _place(source: Path, target: Path) -> None:
    """Hard link where the file system allows it, else a copy, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        with whole_file(target) as partial:
            shutil.copyfile(source, partial)


def folder_digest(folder: Path) -> tuple[str, int]:
    """SHA-256 over the sorted relative names, sizes and contents of a folder's visible files, and their bytes."""
    from pipeline.datasets.source import file_names

    names = file_names(folder)
    if not names:
        raise ValueError(f"folder {folder} is empty")
    whole, total = hashlib.sha256(), 0
    progress = Progress(f"reading {folder.name}", len(names), unit="files")
    for name in names:
        size = (folder / name).stat().st_size
        whole.update(f"{name}\0{size}\0{sha256(folder / name)}\n".encode())
        total += size
        progress.add()
    return whole.hexdigest(), total


def download(url: str, *, sha256_prefix: str = "", attempts: int = ATTEMPTS, pause_s: float = 1.0) -> Path:
    """Download a file once, into archives/<digest>/ under the storage root; its path there.

    Goes on where an earlier try stopped; a dropped connection is tried again after `pause_s`, doubled each time.
    ValueError when the server refuses, the length is wrong or the digest does not begin with `sha256_prefix`.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"{url} cannot be downloaded; sources are http(s) URLs, zip archives or folders")
    archives = storage_root() / "archives"
    name = PurePosixPath(unquote(urlsplit(url).path)).name or "download"
    for note in sorted(archives.glob("*/url.json")):
        path = note.parent / name
        if json.loads(note.read_text()).get("url") == url and path.is_file():
            digest = sha256(path)
            if digest.startswith(note.parent.name) and digest.startswith(sha256_prefix):
                print(f"{name} is here already ({path})", file=sys.stderr)
                return path
    partial = archives / "incoming" / hashlib.sha256(url.encode()).hexdigest()[:16] / f"{name}.part"
    partial.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another process is downloading {url}; wait for it to end") from None
        _receive(url, partial, attempts=attempts, pause_s=pause_s)
        digest = sha256(partial)
        if not digest.startswith(sha256_prefix):
            shutil.rmtree(partial.parent)
            _check_digest(url, digest, sha256_prefix)
        target = archives / digest[:16] / name
        write_json(target.parent / "url.json", {"url": url})
        partial.replace(target)
        shutil.rmtree(partial.parent)
    return target


def _receive(url: str, partial: Path, *, attempts: int, pause_s: float) -> None:
    """Bring `partial` to the file's full length."""
    failures = 0
    while True:
        before = partial.stat().st_size
        try:
            _receive_rest(url, partial)
            return
        except urllib.error.HTTPError as error:
            if error.code == 416:  # what is here is not a part of what is there
                partial.write_bytes(b"")
            elif error.code < 500 and error.code not in (408, 429):
                raise ValueError(
                    f"{url} cannot be downloaded: the server answers {error.code} {error.reason}"
                ) from None
            problem: Exception = error
        except (OSError, http.client.HTTPException) as error:
            problem = error
        failures = 1 if partial.stat().st_size > before else failures + 1
        if failures >= attempts:
            raise ValueError(
                f"{url} cannot be downloaded ({problem}), {attempts} tries in a row; the "
                f"{partial.stat().st_size:,} bytes that came are kept, so run the command again to go on"
            ) from None
        wait_s = min(60.0, pause_s * 2 ** (failures - 1))
        print(f"{url}: {problem}; trying again in {wait_s:.0f} s", file=sys.stderr)
        time.sleep(wait_s)


def _receive_rest(url: str, partial: Path) -> None:
    """One request for the bytes that are missing. OSError when the connection ends early."""
    note = partial.with_suffix(".json")
    start = partial.stat().st_size
    request = urllib.request.Request(url, headers={"User-Agent": "mask2former-pipeline"})
    validator = json.loads(note.read_text())["validator"] if start and note.exists() else None
    if start:
        request.add_header("Range", f"bytes={start}-")
        if validator:
            request.add_header("If-Range", validator)  # a file that has changed there is sent from its beginning
    with urllib.request.urlopen(request, timeout=60) as answer:
        if answer.status != 206:
            start = 0
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length else 0
        etag = answer.headers.get("ETag")
        validator = etag if etag and not etag.startswith("W/") else answer.headers.get("Last-Modified")
        write_json(note, {"validator": validator})
        progress = Progress(f"downloading {partial.stem}", total, unit="MiB", scale=MIB)
        progress.add(start)
        with open(partial, "r+b") as file:
            file.truncate(start)
            file.seek(start)
            while block := answer.read(BLOCK):
                file.write(block)
                progress.add(len(block))
        if total and partial.stat().st_size != total:
            raise OSError(f"the connection ended after {partial.stat().st_size:,} of {total:,} bytes")
        progress.done()
