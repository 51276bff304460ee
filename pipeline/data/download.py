"""One file over HTTP into the storage root: resumed after any interruption, tried again, checked; with login forms."""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import http.cookiejar
import json
import os
import re
import shutil
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from pipeline.data.login import HEADERS, LOGINS, TIMEOUT_S, is_page, log_in
from pipeline.storage.digests import file_digest, known_digest
from pipeline.storage.files import matching, write_json
from pipeline.storage.progress import Progress
from pipeline.storage.root import storage_root
from pipeline.storage.stores import FileStore, StoredPath, store_of

ATTEMPTS = 8
"""Tries in a row without a new byte before a download is given up, two minutes after the first."""

BLOCK = 1 << 20

MIB = 2.0**-20


class Fetched(NamedTuple):
    """A file in archives/<first 16 digits of its SHA-256>/ under the storage root."""

    path: StoredPath
    sha256: str


class _WebPageError(Exception):
    """The server answers with a web page where a file was asked for."""


def downloaded(
    url: str,
    *,
    name: str = "",
    size: int = 0,
    sha256_prefix: str = "",
    login: str = "",
    check: Callable[[Path, str], None] | None = None,
    attempts: int = ATTEMPTS,
    pause_s: float = 1.0,
) -> Fetched:
    """Download a file once: goes on where an earlier try stopped, and tries a dropped connection again after
    `pause_s`, doubled each time.

    name: the file's, if the URL does not end with it. size: bytes where published, 0 if not. login: entry of LOGINS.
    check(path, name): ValueError if the content is not what it should be; called before the file gets its place.
    ValueError when the server refuses or sends something else: a page, another length, another digest. Nothing wrong
    is kept.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"{url} cannot be downloaded; sources are http(s) URLs, zip or tar archives, or folders")
    name = name or file_name(url)
    if found := at_hand(name, url=url, size=size, sha256_prefix=sha256_prefix):
        print(f"{name} is here already ({found.path})", file=sys.stderr)
        return found
    partial = _partial(url, name)
    partial.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another process is downloading {url}; wait for it to end") from None
        progress = Progress(f"downloading {partial.stem}", size, unit="MiB", scale=MIB)
        _receive(_Transfer(url, partial, size, progress), login=login, attempts=attempts, pause_s=pause_s)
        os.fsync(file.fileno())
        digest = file_digest(partial, name)
        try:
            check_digest(url, digest, sha256_prefix)
            if check:
                check(partial, name)
        except ValueError:
            shutil.rmtree(partial.parent)
            raise
        target = storage_root() / "archives" / digest[:16] / name
        write_json(target.parent / "url.json", {"url": url})
        store_of(target).take(partial)
        shutil.rmtree(partial.parent)
    return Fetched(target, digest)


def file_name(url: str) -> str:
    """The last part of a URL's path."""
    name = PurePosixPath(unquote(urlsplit(url).path)).name
    return name if name not in ("", "..") else "download"


def at_hand(name: str, *, url: str, size: int, sha256_prefix: str) -> Fetched | None:
    """What an earlier run put under the storage root, known by digest or else by URL, read once and found unaltered."""
    archives = storage_root() / "archives"
    if len(sha256_prefix) >= 16:
        folders = [archives / sha256_prefix[:16]]
    else:
        notes = matching(archives, "*/url.json")
        folders = [note.parent for note in notes if json.loads(note.read_text()).get("url") == url]
    for folder in folders:
        path = folder / name
        if path.is_file() and size in (0, path.stat().st_size):
            digest = stored_digest(path)
            if digest.startswith(folder.name) and digest.startswith(sha256_prefix):
                return Fetched(path, digest)
    return None


def stored_digest(path: StoredPath) -> str:
    """SHA-256 of a file under the storage root, read once per host. In an object store, where nothing is ever changed,
    its length is all that is asked."""
    state = "" if isinstance(store_of(path), FileStore) else str(path.stat().st_size)
    return known_digest(path, state=state)


def bytes_here(url: str, name: str) -> int:
    """How much of a download is here from an earlier try."""
    partial = _partial(url, name)
    return partial.stat().st_size if partial.is_file() else 0


def published_size(url: str) -> int:
    """What the server says about a file's length, in bytes, without sending it; 0: nothing."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=HEADERS, method="HEAD"), timeout=30) as answer:
            length = answer.headers.get("Content-Length", "")
            return 0 if is_page(answer.headers) or not length.isdecimal() else int(length)
    except (OSError, http.client.HTTPException):
        return 0  # the download will say what is the matter


def check_digest(what: str, digest: str, expected: str) -> None:
    """ValueError unless `digest` begins with the expected digits."""
    if not digest.startswith(expected):
        raise ValueError(
            f"{what} has sha256 {digest}, expected {expected}; it is truncated or altered: get it again, "
            "or correct sha256 in params.yaml"
        )


def check_space(what: str, needed: int) -> None:
    """ValueError unless there is room for `needed` more bytes where downloads grow; what: "downloading coco"."""
    store_of(storage_root()).room_for_downloads().check(what, needed)


def _partial(url: str, name: str) -> Path:
    """Where a download grows: on a disk, for an object store cannot append to a file."""
    folder = store_of(storage_root()).incoming()
    return folder / hashlib.sha256(url.encode()).hexdigest()[:16] / f"{name}.part"


@dataclass(frozen=True)
class _Transfer:
    """A file on its way to this host."""

    url: str
    partial: Path
    """Where it grows."""
    size: int
    """Bytes as published; 0: not published."""
    progress: Progress

    @property
    def note(self) -> Path:
        """Tells of what file the bytes in `partial` are: its length, and the version that the server named."""
        return self.partial.with_suffix(".json")

    @property
    def here(self) -> int:
        """Bytes that have come."""
        return self.partial.stat().st_size


def _receive(transfer: _Transfer, *, login: str, attempts: int, pause_s: float) -> None:
    """Bring `transfer.partial` to the file's full length."""
    url = transfer.url
    most = transfer.here  # a byte that was here before and had to be sent again is no progress
    opener: urllib.request.OpenerDirector | None = None
    login_is_fresh, failures = False, 0
    while True:
        before = most
        problem: Exception | None = None
        try:
            if opener is None:
                opener, login_is_fresh = log_in(login) if login else urllib.request.build_opener(), True
            _receive_rest(opener, transfer)
            return
        except _WebPageError as page:
            refusal = f"{url} cannot be downloaded: {page}; {_way_out(url, login)}"
        except urllib.error.HTTPError as error:
            error.close()
            refusal = f"{url} cannot be downloaded: the server answers {error.code} {error.reason}"
            if error.code == 416:  # what is here is not a part of what is there
                transfer.partial.write_bytes(b"")
                problem = error
            elif error.code >= 500 or error.code in (408, 425, 429):
                problem = error
        except (OSError, http.client.HTTPException) as error:
            refusal = f"{url} cannot be downloaded: {error}"
            if not isinstance(getattr(error, "reason", None), ssl.SSLCertVerificationError):
                problem = error
        most = max(most, transfer.here)
        if problem is None:
            if not login or login_is_fresh:
                raise ValueError(refusal) from None
            opener = None  # hours have passed: perhaps the session has ended, so log in once more
            continue
        login_is_fresh = login_is_fresh and most == before
        failures = 1 if most > before else failures + 1
        if failures >= attempts:
            raise ValueError(
                f"{url} cannot be downloaded ({problem}), {attempts} tries in a row; the "
                f"{transfer.here:,} bytes that came are kept, so run the command again to go on"
            ) from None
        wait_s = min(60.0, pause_s * 2 ** (failures - 1))
        print(f"{url}: {problem}; trying again in {wait_s:.0f} s", file=sys.stderr)
        time.sleep(wait_s)


def _receive_rest(opener: urllib.request.OpenerDirector, transfer: _Transfer) -> None:
    """One request for the bytes that are missing. OSError when the connection ends early or the answer is not what
    was asked for, ValueError when no other try can help, _WebPageError when a page comes instead."""
    start, size = transfer.here, transfer.size
    known = json.loads(transfer.note.read_text()) if transfer.note.exists() else {}
    if start and start == (size or known.get("total")):
        return  # all came, and the process ended before it was put in its place
    if not known or (size and start > size):
        start = 0  # of what file it is a part, nobody knows
    with opener.open(_request(transfer.url, start, known), timeout=TIMEOUT_S) as answer:
        _check_content(transfer.url, answer)
        start, total = _span(answer, transfer, start, known)
        check_space(f"downloading {transfer.partial.stem}", total - start)
        head = answer.read1(BLOCK)
        if start == 0:
            head = _start_over(answer, head, transfer, total)
        transfer.progress.restart(start, total)
        _append(answer, head, transfer, start)
    _check_length(transfer, total)
    transfer.progress.done()


def _request(url: str, start: int, known: Mapping[str, Any]) -> urllib.request.Request:
    """A request for the bytes from `start` on; of a file that has changed since, it is answered by all of them."""
    request = urllib.request.Request(url, headers=HEADERS)
    if start:
        request.add_header("Range", f"bytes={start}-")
        if known["validator"]:
            request.add_header("If-Range", known["validator"])
    return request


def _check_content(url: str, answer: Any) -> None:
    """_WebPageError or ValueError unless the answer is a file as it is."""
    if is_page(answer.headers):
        raise _WebPageError(f"the server sent a web page ({answer.headers.get_content_type()}), not the file")
    encoding = answer.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise ValueError(
            f"{url} cannot be downloaded: the server sends it re-packed ({encoding}) though asked not to, so its "
            "length and digest cannot be checked; use another address"
        )


def _span(answer: Any, transfer: _Transfer, start: int, known: Mapping[str, Any]) -> tuple[int, int]:
    """First byte of an answer and the length of the whole file (0: not said); `start` was asked for."""
    total = int(answer.length or 0)
    if answer.status == 206:
        begins, total = _content_range(answer.headers.get("Content-Range", ""))
        total = total or known.get("total", 0)
        if begins != start or total != (known.get("total") or total):
            os.truncate(transfer.partial, 0)
            raise OSError(
                f"asked for the bytes from {start:,} on, the server sent something else (Content-Range: "
                f"{answer.headers.get('Content-Range', 'none')}); starting over"
            )
    else:
        start = 0
    if transfer.size and total and total != transfer.size:
        raise ValueError(
            f"{transfer.url} is {total:,} bytes long on the server, published are {transfer.size:,}; it is not the "
            "published file: use a mirror, or correct bytes and sha256 in params.yaml"
        )
    return start, total or transfer.size


def _start_over(answer: Any, head: bytes, transfer: _Transfer, total: int) -> bytes:
    """Note of what file the bytes are that begin with `head`; the head, long enough to tell that it is no page."""
    while len(head) < 32 and (more := answer.read1(BLOCK)):
        head += more
    if re.match(rb"\s*<(!doctype\s+)?html", head, re.IGNORECASE):
        raise _WebPageError("the server sent a web page, not the file")
    if transfer.here:
        print(f"{transfer.url}: the server starts over from the first byte", file=sys.stderr)
    os.truncate(transfer.partial, 0)  # first: the note tells of what file the bytes are
    etag = answer.headers.get("ETag")
    validator = etag if etag and not etag.startswith("W/") else answer.headers.get("Last-Modified")
    write_json(transfer.note, {"validator": validator, "total": total})
    return head


def _append(answer: Any, head: bytes, transfer: _Transfer, start: int) -> None:
    """Write what comes as it comes, so that an interruption costs as little as it can."""
    with open(transfer.partial, "r+b") as file:
        file.seek(start)
        block = head
        while block:
            file.write(block)
            file.flush()
            transfer.progress.add(len(block))
            block = answer.read1(BLOCK)


def _check_length(transfer: _Transfer, total: int) -> None:
    """OSError unless all bytes have come, as far as their number is known, and no more."""
    at = transfer.here
    if total and at > total:
        os.truncate(transfer.partial, 0)
        raise OSError(f"{at:,} bytes came of a file of {total:,}; starting over")
    if at < total:
        raise OSError(f"the connection ended after {at:,} of {total:,} bytes")


def _content_range(header: str) -> tuple[int, int]:
    """First byte and length of the whole file (0: not said) of a Content-Range header; -1 when there is none."""
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", header.strip())
    return (int(found[1]), int(found[2]) if found[2] != "*" else 0) if found else (-1, 0)


def _way_out(url: str, login: str) -> str:
    if login:
        site = LOGINS[login]
        return (
            "the login was accepted, so perhaps the account still has to accept the licence: open it in a browser, "
            f"logged in at {site.url}, or put the archive where datasets.<name>.mirrors says"
        )
    return (
        "open it in a browser to see whether it wants a login or a licence accepted (an archive that comes that way "
        "may be put where datasets.<name>.mirrors says)"
    )
