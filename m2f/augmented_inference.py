"""Where `semantic_scores_ms_flip` is imported from by whoever uses m2f as a library (m2f.inference.augmented)."""

from m2f.inference.augmented import semantic_scores_ms_flip

__all__ = ["semantic_scores_ms_flip"]
