"""Mapillary Vistas 1.2: <folder>/images/*.jpg with <folder>/panoptic/*.png and panoptic_2018.json, which is COCO's
format with text for ids; in the archive of version 2.0 in <folder>/v1.2/panoptic/.

Semantic labels are those of the panoptic segments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.data.archives import file_names
from pipeline.data.datasets import coco
from pipeline.data.records import Record

if TYPE_CHECKING:
    from pipeline.params.schema import DatasetConfig

_LISTING = "panoptic/panoptic_2018.json"


def records(config: DatasetConfig, sources: Sequence[Path], split: str) -> list[Record]:
    """The split's records by id. ValueError as `coco.records`, and where no source has panoptic labels of 1.2."""
    folder = config.splits[split]
    within = f"{folder}/v1.2/{_LISTING}"
    names = [name for source in sources for name in file_names(source)]
    listing = within if any(name.endswith(within) for name in names) else f"{folder}/{_LISTING}"
    if not any(f"/{name}".endswith(f"/{listing}") for name in names):
        there = [name for name in names if name.endswith(".json")][:5]
        raise ValueError(
            f"split {split} has no {listing} or {within} in {', '.join(source.name for source in sources)} (found "
            f"{', '.join(there) or 'no JSON file'}); Mapillary Vistas 1.2 and 2.0 have one of them, see docs/data.md"
        )
    as_coco = dataclasses.replace(
        config,
        splits={split: f"{folder}/images"},
        annotation_files={"panoptic": listing, "panoptic_maps": listing.rpartition("/")[0]},
    )
    return coco.records(as_coco, sources, split)
