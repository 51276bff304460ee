"""Mask2Former as a library: the network, its losses, metrics and weights."""

from m2f.config import ModelConfig
from m2f.model import build_model

from m2f.types import Prediction, Target

__all__ = ["ModelConfig", "Prediction", "Target", "build_model"]
