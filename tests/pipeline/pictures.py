"""Small data sets for the tests of the data stages, in the layouts that users bring."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pipeline.params import DatasetConfig


def config(**changes: Any) -> DatasetConfig:
    """A folder data set of three classes with ignore label 9."""
    settings: dict[str, Any] = {"layout": "folder", "class_names": ("sky", "road", "car"), "ignore_label": 9}
    return DatasetConfig(**{**settings, **changes})


def labels(height: int = 12, width: int = 16) -> np.ndarray:
    """Upper half class 0, lower half class 1, a 4 x 4 car (class 2) on the border, first column ignored."""
    ids = np.zeros((height, width), np.uint8)
    ids[height // 2 :] = 1
    ids[height // 2 - 2 : height // 2 + 2, 6:10] = 2
    ids[:, 0] = 9
    return ids


def image(height: int = 12, width: int = 16, seed: int = 0) -> np.ndarray:
    """Random colours."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encoded(picture: np.ndarray, suffix: str = ".png") -> bytes:
    """A picture file's bytes; colours are RGB."""
    done, data = cv2.imencode(suffix, picture[..., ::-1] if picture.ndim == 3 else picture)
    assert done
    return bytes(data.tobytes())


def write_folder(folder: Path, *, train: int = 3, val: int = 2, top: str = "") -> Path:
    """A data set in ADE20K's layout below `folder/top`; returns `folder`."""
    for split, count in (("training", train), ("validation", val)):
        for index in range(count):
            put(folder / top / f"images/{split}/p{index}.jpg", encoded(image(seed=index), ".jpg"))
            put(folder / top / f"annotations/{split}/p{index}.png", encoded(labels()))
    return folder


def put(path: Path, data: bytes) -> None:
    """Write a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def zipped(folder: Path, archive: Path) -> Path:
    """The folder's files as a zip archive."""
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                file.write(path, path.relative_to(folder).as_posix())
    return archive
