"""Generated scenes with panoptic labels, of classes that are listed together: a street, a coast."""

from pipeline.data.datasets.shapes.scenes import records

__all__ = ["records"]
