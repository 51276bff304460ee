"""params.yaml, parsed once."""

from pipeline.params.load import load_params

__all__ = ["load_params"]
