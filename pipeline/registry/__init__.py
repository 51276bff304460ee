"""A checkpoint becomes a served model."""
