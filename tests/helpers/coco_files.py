"""A small data set in COCO's two layouts of labels, as a folder and as the published archives."""

from __future__ import annotations

import copy
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask

from pipeline.params.schema import DatasetConfig
from tests.helpers.images import encoded, image, put

SKY, CAR, DOG = 5, 300, 256 * 256 * 2 + 1
"""Segment ids: (5, 0, 0), (44, 1, 0) and (1, 0, 2) as colours."""

CONFIG = DatasetConfig(
    layout="coco",
    class_names=("sky", "car", "dog", "cat"),
    thing_classes=("car", "dog", "cat"),
    splits={"val": "val2017"},
)


IMAGES = [
    {"id": 7, "file_name": "b.jpg", "height": 6, "width": 8},
    {"id": 2, "file_name": "a.jpg", "height": 6, "width": 8},
]


COLUMN = np.zeros((6, 8), np.uint8)


COLUMN[:, 0] = 1


INSTANCES = {
    "info": {"description": 'with "quotes" and ], }'},
    "images": IMAGES,
    "licenses": [],
    "annotations": [
        {
            "id": 11,
            "image_id": 2,
            "category_id": 3,
            "segmentation": [[1, 1, 4, 1, 4, 3, 1, 3], [5, 4, 7, 4, 7, 6, 5, 6]],
            "bbox": [1, 1, 6, 5],
            "area": 9.5,
            "iscrowd": 0,
        },
        {
            "id": 12,
            "image_id": 2,
            "category_id": 18,
            "segmentation": {"size": [6, 8], "counts": [0, 6, 42]},
            "bbox": [0, 0, 1, 6],
            "area": 6,
            "iscrowd": 1,
        },
        {
            "id": 13,
            "image_id": 2,
            "category_id": 18,
            "segmentation": {
                "size": [6, 8],
                "counts": mask.encode(np.asfortranarray(COLUMN))["counts"].decode(),
            },
            "bbox": [0.5, 0, 0.5, 6],
            "area": 6,
        },
    ],
    "categories": [{"id": 3, "name": "car"}, {"id": 18, "name": "dog"}],
}


IDS = np.full((6, 8), SKY)


IDS[0] = 0


IDS[1:3, 1:4] = CAR


IDS[5, 6:] = DOG


PANOPTIC = {
    "images": IMAGES,
    "annotations": [
        {
            "image_id": identity,
            "file_name": name,
            "segments_info": [
                {"id": DOG, "category_id": 18, "iscrowd": 1, "area": 2, "bbox": [6, 5, 2, 1]},
                {"id": SKY, "category_id": 200, "iscrowd": 0, "area": 32, "bbox": [0, 1, 8, 5]},
                {"id": CAR, "category_id": 3, "iscrowd": 0, "area": 6, "bbox": [1, 1, 3, 2]},
            ],
        }
        for identity, name in ((2, "a.png"), (7, "b.png"))
    ],
    "categories": [
        {"id": 3, "name": "car", "isthing": 1},
        {"id": 18, "name": "dog", "isthing": 1},
        {"id": 200, "name": "sky", "isthing": 0},
    ],
}


def png(ids: np.ndarray, mode: str = "RGB") -> bytes:
    colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(colours).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def write_coco(
    folder: Path, instances: dict[str, Any] | None = INSTANCES, panoptic: dict[str, Any] | None = PANOPTIC
) -> Path:
    """A COCO folder of two pictures of 6 x 8; returns it."""
    for index, name in enumerate(("a", "b")):
        put(folder / f"val2017/{name}.jpg", encoded(image(6, 8, seed=index), ".jpg"))
        if panoptic is not None:
            put(folder / f"annotations/panoptic_val2017/{name}.png", png(IDS))
    for label_type, content in (("instances", instances), ("panoptic", panoptic)):
        if content is not None:
            put(folder / f"annotations/{label_type}_val2017.json", json.dumps(content, indent=1).encode())
    return folder


def published(folder: Path, compression: int) -> list[Path]:
    """The folder as COCO's archives: pictures, instances, and panoptic labels with an archive inside."""
    parts = [folder.parent / f"{name}.zip" for name in ("val2017", "annotations", "panoptic_annotations")]
    with zipfile.ZipFile(parts[0], "w") as archive:
        for path in sorted((folder / "val2017").iterdir()):
            archive.write(path, f"val2017/{path.name}")
    with zipfile.ZipFile(parts[1], "w") as archive:
        archive.write(folder / "annotations/instances_val2017.json", "annotations/instances_val2017.json")
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        for path in sorted((folder / "annotations/panoptic_val2017").iterdir()):
            archive.writestr(f"panoptic_val2017/{path.name}", path.read_bytes())
            archive.writestr(f"__MACOSX/panoptic_val2017/._{path.name}", b"resource fork")
    with zipfile.ZipFile(parts[2], "w", compression) as archive:
        archive.write(folder / "annotations/panoptic_val2017.json", "annotations/panoptic_val2017.json")
        archive.writestr("annotations/panoptic_val2017.zip", inner.getvalue())
    return parts


FIRST = ("annotations", 0)
"""Where the first annotation is."""


def changed(content: dict[str, Any], *path: Any, value: Any) -> dict[str, Any]:
    """A copy with one value replaced; None takes the key away."""
    content = copy.deepcopy(content)
    place: Any = content
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return content
