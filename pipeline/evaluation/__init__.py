"""A checkpoint to figures."""
