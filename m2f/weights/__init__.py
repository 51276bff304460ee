"""Checkpoints of any origin: read without running code, and renamed to this network's names and back."""

from m2f.weights.any import Loaded, load_any, load_whole
from m2f.weights.backbones import backbone_from_swin, backbone_from_torchvision, load_backbone
from m2f.weights.detectron2 import from_detectron2, to_detectron2
from m2f.weights.huggingface import from_huggingface, to_huggingface
from m2f.weights.read import read_checkpoint
from m2f.weights.reference import from_reference, reference_name, to_reference

__all__ = [
    "Loaded",
    "backbone_from_swin",
    "backbone_from_torchvision",
    "from_detectron2",
    "from_huggingface",
    "from_reference",
    "load_any",
    "load_backbone",
    "load_whole",
    "read_checkpoint",
    "reference_name",
    "to_detectron2",
    "to_huggingface",
    "to_reference",
]
