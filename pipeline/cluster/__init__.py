"""Rows on a remote cluster."""
