"""Metrics as states: update with pictures, merge over workers, ask for the result."""

from m2f.metrics.cityscapes import CityscapesInstanceMetric
from m2f.metrics.instance import InstanceMetric
from m2f.metrics.panoptic import PanopticMetric
from m2f.metrics.semantic import SemanticMetric

__all__ = ["CityscapesInstanceMetric", "InstanceMetric", "PanopticMetric", "SemanticMetric"]
