"""Mask2Former as a library: the network, its losses, metrics and weights.

The names below are loaded when they are first used, so that reading settings does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m2f.config import ModelConfig
    from m2f.model import build_model
    from m2f.types import Prediction, Target

__all__ = ["ModelConfig", "Prediction", "Target", "build_model"]

_HOME = {
    "ModelConfig": "m2f.config",
    "Prediction": "m2f.types",
    "Target": "m2f.types",
    "build_model": "m2f.model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
