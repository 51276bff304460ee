"""The storage root: where archives, shards, weights and runs lie. Facts about them are in results/.

M2F_STORAGE names it: a folder, or the URL of an object store (s3://bucket/prefix, or whatever else fsspec has a driver
for). Paths in a folder are pathlib's, those below a URL universal-pathlib's; both have /, exists, read_text, glob and
so on. The driver reads credentials and the address of the store from the environment or its own files; nothing here
does.
"""

from __future__ import annotations

import os
import re
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from pipeline.storage.stores import RIGHTS, StoredPath

if TYPE_CHECKING:
    from upath import UPath

ANSWER_S = 20.0
"""A store that has not answered the first question after this long is called unreachable."""

_BUCKETS = ("s3", "s3a", "gs", "gcs", "abfs", "az")
"""Schemes whose first part is a bucket, which has to exist."""


def storage_root() -> StoredPath:
    """`M2F_STORAGE`, or the project's `storage/`; absolute. ValueError if it is a URL that does not work."""
    return root_at(os.environ.get("M2F_STORAGE") or "storage")


def in_project(path: str | Path) -> Path:
    """A path that is relative to the project's folder, absolute: storage/, data/ and mlflow.db lie there.

    The project's folder is the working directory. An experiment of `dvc exp run --temp` or `--queue` works in a
    temporary copy of it, and DVC names the folder itself in DVC_ROOT, as it does to every stage.
    """
    return Path(os.environ.get("DVC_ROOT") or "").absolute() / path


def root_at(setting: str) -> StoredPath:
    """A storage root by its folder or URL. ValueError says what is wrong with a URL, once its store has been asked."""
    url = urlsplit(setting)
    scheme, _, rest = setting.partition(":")
    if scheme in _BUCKETS and not re.match("//[^/<>]", rest):
        raise ValueError(f"the storage root {setting} names no bucket; set M2F_STORAGE as {scheme}://bucket/prefix")
    if "://" not in setting:
        return in_project(Path(setting).expanduser())
    if url.scheme == "file":
        return Path(unquote(url.path)).absolute()
    if url.password:
        raise ValueError("a storage root's URL must not hold a password; the driver reads it from the environment")
    _ask(setting.rstrip("/"))
    return _below_url(setting.rstrip("/"))


def _below_url(url: str) -> UPath:
    from upath import UPath

    return UPath(url, use_listings_cache=False)  # other hosts write there too


@cache
def _ask(url: str) -> None:
    """Ask the store at a URL for its bucket, once per process. ValueError in one sentence when it gives none."""
    errors: list[Exception] = []

    def ask() -> None:
        try:
            root = _below_url(url)
            if urlsplit(url).scheme not in _BUCKETS:
                root.exists()
                return
            try:
                root.fs.info(urlsplit(url).netloc)
            except PermissionError:  # of the whole bucket; the root may be a part of it that is theirs
                with suppress(FileNotFoundError):
                    root.fs.ls(root.path)
        except Exception as error:  # drivers have errors of their own
            errors.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ANSWER_S)
    if asking.is_alive():
        raise ValueError(f"the storage root {url} has not answered for {ANSWER_S:.0f} s; {_ADVICE}")
    for error in errors:
        raise ValueError(f"the storage root {url} cannot be used: {_reason(url, error)}") from error


_ADVICE = (
    "credentials and address come from the environment, for s3:// AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, if it "
    "is not Amazon's, AWS_ENDPOINT_URL; for gs:// GOOGLE_APPLICATION_CREDENTIALS"
)


def _reason(url: str, error: Exception) -> str:
    if isinstance(error, ImportError):
        return (
            f"its driver is not installed ({error}); for s3:// run: pip install s3fs, "
            "for gs://: pip install -r requirements-gcp.lock"
        )
    if isinstance(error, FileNotFoundError):
        return f"there is no {urlsplit(url).netloc}; make the bucket, or correct M2F_STORAGE"
    if isinstance(error, PermissionError):
        return f"the credentials are refused ({error.__cause__ or error}); {RIGHTS}; {_ADVICE}"
    return f"{error}; {_ADVICE}"


def store_failure(error: BaseException) -> str:
    """What an error says that a store's driver raised, or a Ray task on its behalf; empty: it is another's.

    Drivers raise OSErrors for what a store answers, but not for what becomes of the connection.
    """
    seen: BaseException | None = error
    while seen is not None:
        if type(seen).__module__.partition(".")[0] in _DRIVERS:
            if isinstance(error, PermissionError):
                return f"the storage root {os.environ.get('M2F_STORAGE')} may not be used so ({seen}); {RIGHTS}"
            return f"the storage root does not work any more: {seen}; run the command again to go on"
        seen = getattr(seen, "cause", None) or seen.__cause__
    return ""


_DRIVERS = ("adlfs", "aiobotocore", "aiohttp", "azure", "botocore", "fsspec", "gcsfs", "google", "s3fs")


def stored(relative: str, *, made_by: str) -> StoredPath:
    """Absolute path of something under the storage root; ValueError with the command that makes it if it is gone."""
    path = storage_root() / relative
    if not path.exists():
        raise ValueError(f"{relative} is missing from the storage root {storage_root()}; make it again with: {made_by}")
    return path
