"""A few rows to report."""

from __future__ import annotations

import pytest

from pipeline.params.load import parse_params
from pipeline.params.schema import Params

AUGMENTATION = {"crop": [64, 64], "short_sides": [64], "long_side_max": 128}
ROW = {
    "dataset": "d",
    "weights": "none",
    "model": {"num_classes": 2},
    "train": {"steps": 100, "augmentation": AUGMENTATION},
    "test": {"short_side": 64, "long_side_max": 128},
}


@pytest.fixture
def params() -> Params:
    """Made up: tests/helpers/report_rows.py has results of these."""
    return parse_params(
        {
            "datasets": {
                "d": {"layout": "folder", "class_names": ["road", "<sky>"], "thing_classes": ["car", "cup"]},
            },
            "rows": {
                "ours": {**ROW, "seeds": [0, 1, 2]},
                "published": {
                    **ROW,
                    "published": {"miou": 80.44, "inf_fps": 9.17, "train_mem_gib": 5.67, "device": "A100"},
                    "published_authors": {"miou": 79.4, "miou_ms_flip": 82.2},
                },
                "panoptic": {
                    **ROW,
                    "task": "panoptic",
                    "seeds": [0, 1, 2],
                    "published": {"pq": 52.0, "ap": 41.8},
                    "published_authors": {"pq": 51.9, "ap": 41.7, "miou": 61.7},
                },
                "instance": {
                    **ROW,
                    "task": "instance",
                    "seeds": [0, 1, 2],
                    "checkpoint_rule": "best",
                    "published_authors": {"ap": 43.7},
                },
            },
        }
    )
