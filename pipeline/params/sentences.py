"""Values and libraries' errors as parts of a sentence: on one line, and short."""

from __future__ import annotations

import reprlib
from typing import Any

_LONGEST = 200
"""Characters of a library's error."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120


def shown(value: Any) -> str:
    """A value for a message, shortened."""
    return _SHORT.repr(value)


def how_many(count: int, noun: str) -> str:
    """1 picture, 2 pictures, 1,000 pictures."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def error_shown(error: BaseException) -> str:
    """What a library's error says, shortened; its type where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
