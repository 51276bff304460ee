"""Comparisons with other implementations, and what each part of this one costs."""
