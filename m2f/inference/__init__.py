"""From predictions to label maps, segments and instances: of whole pictures, in several sizes, in windows."""

from m2f.inference.bands import Size, upsampled_rows
from m2f.inference.instance import Instances, instances
from m2f.inference.panoptic import Segments, panoptic_segments
from m2f.inference.semantic import Resized, score_bands, score_rows, semantic_labels, semantic_scores

__all__ = [
    "Instances",
    "Resized",
    "Segments",
    "Size",
    "instances",
    "panoptic_segments",
    "score_bands",
    "score_rows",
    "semantic_labels",
    "semantic_scores",
    "upsampled_rows",
]
