"""The semantic rows of params.yaml on this GPU: images per second and training memory beside the published figures."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.cost.benchmark import benchmark
from pipeline.params.load import load_params
from pipeline.params.schema import Params, Row

LEAST_S = 2.0
"""For the images of a row, and for its training steps: less says nothing."""


def semantic_rows(params: Params) -> list[Row]:
    """The rows whose tables print images per second and memory."""
    return [row for row in params.rows.values() if "inf_fps" in row.published]


def beside_published(until: float, rows: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """One line per row, each measured as `stages.benchmark` measures it, on random images of the published size.

    The time to `until`, a time.monotonic(), is shared equally by the rows that are left; a row whose share is less than
    LEAST_S for images and for steps is measured no shorter.
    """
    params = load_params("params.yaml")
    chosen = [row for row in semantic_rows(params) if rows is None or row.name in rows]
    for number, row in enumerate(chosen):
        share_s = (until - time.monotonic()) / (len(chosen) - number)
        seconds = max(LEAST_S, 0.4 * share_s)  # twice this, and building the network
        found = benchmark(row, params.dataset(row.dataset), manifest=None, seconds=seconds)
        memory_mib = found.training.memory_mib if found.training else None
        yield {
            "row": row.name,
            "images_per_second": round(found.inference.fps, 2),
            "published_images_per_second": row.published["inf_fps"],
            "training_memory_gib": None if memory_mib is None else round(memory_mib / 2**10, 2),
            "published_training_memory_gib": row.published.get("train_mem_gib"),
            "training_images": found.training.images if found.training else None,
            "step_seconds": round(found.training.step_s, 4) if found.training else None,
            "images_timed": found.inference.images,
            "steps_timed": found.training.steps if found.training else 0,
            "skipped": found.skipped,
            "published_device": row.published.get("device"),
        }
