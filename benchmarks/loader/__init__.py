"""Training images per second of one process, beside the recipe written down plainly."""
