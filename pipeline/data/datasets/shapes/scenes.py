"""The records of a generated dataset: a picture depends on its classes and on (seed, split, index) only."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from pipeline.data.datasets.shapes.canvas import Scene, paint_light, tidy
from pipeline.data.datasets.shapes.coast import COAST
from pipeline.data.datasets.shapes.street import STREET
from pipeline.data.records import Labelled, Record

if TYPE_CHECKING:
    from pipeline.params.schema import DatasetConfig

SCENES = (STREET, COAST)


def records(config: DatasetConfig, sources: Sequence[Path], split: str) -> list[Record]:
    """The split's records, to be drawn. ValueError says which key of `generate` is missing or too small, or that
    nothing is drawn of these classes."""
    names = tuple(config.class_names)
    scene_of(names)
    for key, least in ((split, 1), ("height", 64), ("width", 64), ("seed", 0)):
        if config.generate.get(key, -1) < least:
            raise ValueError(f"generate.{key} is {config.generate.get(key)}; layout shapes needs at least {least}")
    size = (config.generate["height"], config.generate["width"])
    return [
        Record(
            name=f"{split}_{index:06d}",
            image_file=f"generated picture {split} {index}",
            label_file=f"generated labels {split} {index}",
            read=partial(_read, names, config.generate["seed"], split, index, size),
        )
        for index in range(config.generate[split])
    ]


def scene_of(class_names: tuple[str, ...]) -> Scene:
    """The scene that has these classes. ValueError where none has."""
    for scene in SCENES:
        if class_names == scene.class_names:
            return scene
    known = " or of ".join(", ".join(scene.class_names) for scene in SCENES)
    raise ValueError(f"layout shapes draws scenes of {known}; class_names lists others, or these in another order")


def _read(class_names: tuple[str, ...], seed: int, split: str, index: int, size: tuple[int, int]) -> Labelled:
    image, segments, classes = draw(class_names, seed, split, index, size)
    done, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
    assert done
    return Labelled(data.tobytes(), segments, classes)


def draw(
    class_names: tuple[str, ...], seed: int, split: str, index: int, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """One scene of `size` (height, width): (h, w, 3) uint8 RGB, (h, w) uint8 segment ids, class of every id."""
    from m2f.draws import mix  # brings torch, which the other layouts' processes can do without

    scene = scene_of(class_names)
    canvas = scene.draw(np.random.default_rng(mix(seed, zlib.crc32(split.encode()), index)), size)
    paint_light(canvas)
    return canvas.image, *tidy(canvas, scene.things)
