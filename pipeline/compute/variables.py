"""Variables of the environment whose value is a number."""

from __future__ import annotations

import os

GROUPS_AT_ONCE, CHECKPOINT_ACTIVATIONS = "M2F_GROUPS_AT_ONCE", "M2F_CHECKPOINT_ACTIVATIONS"
"""They save memory (pipeline.compute.resources)."""


def environment_int(name: str) -> int | None:
    """An environment variable as a non-negative int; None when unset."""
    text = os.environ.get(name)
    if not text:
        return None
    if not text.isdecimal():
        raise ValueError(f"{name} is {text!r}; it must be a whole number, 0 or more")
    return int(text)
