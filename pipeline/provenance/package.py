"""This package as it is installed: its version, and a digest of all its files."""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path

from pipeline.provenance.sources import PACKAGES, PROJECT

DISTRIBUTION = "m2f-tables"
"""What pip calls the package."""


def package_version() -> str | None:
    """The version that is installed; None: the code runs without being installed."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None


def package_digest(root: Path = PROJECT) -> str:
    """SHA-256, hexadecimal, of the names and contents of all files of the packages below `root`; compiled ones do not
    count."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                content = hashlib.sha256(file.read_bytes()).hexdigest()
                digest.update(f"{file.relative_to(root).as_posix()} {content}\n".encode())
    return digest.hexdigest()
