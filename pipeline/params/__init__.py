"""params.yaml, parsed once."""

from pipeline.params.schema import load_params

__all__ = ["load_params"]
