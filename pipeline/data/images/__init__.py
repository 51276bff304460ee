"""Pixels: decoding, scaling, drawing."""
