"""What `benchmarks.network` can measure, and in which order it does."""

from __future__ import annotations

import argparse

ROWS = ("r50", "swin-t")
"""Backbones that both implementations have."""

FORMS = ("ours", "plain", "huggingface")
"""Of one network: this project's, with its kernels and without, and Hugging Face's."""

SIZES = ((512, 512), (640, 640), (1024, 2048))
"""(height, width) of the images at which inference is measured."""

KINDS = ("counts", "inference", "training", "parts", "published")
"""Of measurements. counts needs no device."""


def size_name(size: tuple[int, int]) -> str:
    """How the command line names a height and a width."""
    return f"{size[0]}x{size[1]}"


def plan(arguments: argparse.Namespace) -> list[tuple[str, str, str]]:
    """What is measured, in this order: (row, what, precision). "counts" are once a row, "published" is of all rows."""
    wanted = [size for size in SIZES if arguments.sizes is None or size_name(size) in arguments.sizes]
    whats = [f"inference {height} x {width}" for height, width in wanted]
    whats += [f"training step of {arguments.batch} images", "parts"]
    whats = [what for what in whats if what.split()[0] in arguments.only]
    planned = [(row, what, precision) for row in arguments.rows for precision in arguments.precision for what in whats]
    if "counts" in arguments.only:
        planned = [(row, "counts", "") for row in arguments.rows] + planned
    return planned + [("", "published", "")] * ("published" in arguments.only)
