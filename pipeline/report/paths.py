"""Text of results without the folders of the machine that made them: reports are sent to others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")

_BEFORE = r"(?:(?<![\w.:/~<-])|(?<=sqlite:///)|(?<=file://))"
"""What an absolute path begins after, also in the address of a database or a file; other URLs are left alone."""
_HOME = re.compile(_BEFORE + r"(?:/(?:home|Users)/[^\s/'\":,;]+|/root)(?![\w.-])")
"""Anybody's home folder: a result may be of another machine."""
_FOLDERS = re.compile(_BEFORE + r"/(?:[^\s/'\"<>]+/)+")


def without_folders(value: _T) -> _T:
    """The value with all text in it, at any depth, naming files by their path below the working folder or a home
    folder, or else by their name alone. Keys stay as they are."""
    changed: Any = _changed(value)
    return changed


def _changed(value: object) -> object:
    if isinstance(value, str):
        text = _without(value, Path.cwd(), "")
        text = _without(text, Path.home(), "~/")
        return _FOLDERS.sub("", _HOME.sub("~", text))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{each.name: _changed(getattr(value, each.name)) for each in fields(value)})
    if isinstance(value, Mapping):
        return {key: _changed(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_changed, value))
    return value


def _without(text: str, folder: Path, instead: str) -> str:
    """The text with paths below a folder from there on; that of everything, /, has no name to leave out."""
    return text if folder == Path("/") else re.sub(rf"{_BEFORE}{re.escape(str(folder))}/", instead, text)
