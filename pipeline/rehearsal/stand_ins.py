"""Stand-in data sets: scenes of random shapes with labels, in the layout and archives of the published ones."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

if TYPE_CHECKING:
    from pipeline.data.images.sizes import Size
    from pipeline.params.schema import DatasetConfig

_SHAPES = 24
"""Shapes of a scene."""


@dataclass(frozen=True)
class Scene:
    """A stand-in picture of h x w."""

    image: np.ndarray
    """(h, w, 3) uint8 RGB."""
    classes: np.ndarray
    """(h, w) int32 class, -1: none."""
    shapes: np.ndarray
    """(h, w) int32, the shape that shows; 0: none."""
    class_of: tuple[int, ...]
    """Class of every shape; that of shape 0 counts for nothing."""


def scene(size: Size, num_classes: int, seed: int) -> Scene:
    """Ellipses and rectangles of random classes on a ground, with noise: files are about as large as photos'."""
    import cv2

    draw = np.random.default_rng(seed)
    height, width = size
    shapes = np.ones(size, np.int32)
    class_of = [0, *draw.integers(0, num_classes, _SHAPES).tolist()]
    for shape in range(2, _SHAPES + 1):
        centre = int(draw.integers(0, width)), int(draw.integers(0, height))
        half = int(draw.uniform(0.02, 0.25) * width) + 1, int(draw.uniform(0.02, 0.25) * height) + 1
        if shape % 2:
            cv2.ellipse(shapes, centre, half, float(draw.uniform(0, 180)), 0, 360, shape, -1)
        else:
            corner = centre[0] + half[0], centre[1] + half[1]
            cv2.rectangle(shapes, (centre[0] - half[0], centre[1] - half[1]), corner, shape, -1)
    shapes[: max(1, height // 50)] = 0
    colours = draw.integers(40, 216, (_SHAPES + 1, 3)).astype(np.uint8)
    coarse = cv2.resize(draw.integers(-30, 31, (9, 16)).astype(np.float32), (width, height))
    fine = draw.normal(0, 3, size).astype(np.float32)
    image = np.clip(colours[shapes] + (coarse + fine)[..., None], 0, 255).astype(np.uint8)
    classes = np.where(shapes == 0, -1, np.array(class_of, np.int32)[shapes])
    return Scene(image, classes, shapes, tuple(class_of))


def write_stand_ins(
    config: DatasetConfig, folder: Path, *, size: Size, images: Mapping[str, int], seed: int = 0
) -> list[Path]:
    """Archives of a data set in its layout, called as those in `sources`; `images`: how many of every split."""
    scenes = {
        split: [scene(size, len(config.class_names), seed + 1000 * place + index) for index in range(images[split])]
        for place, split in enumerate(sorted(config.splits))
        if images.get(split)
    }
    files = {
        "folder": _folder,
        "voc": _voc,
        "cityscapes": _cityscapes,
        "ade20k": _ade20k,
        "coco": _coco,
        "vistas": _vistas,
    }[config.layout]
    names = [_archive_name(source) for source in config.sources] or ["dataset.zip"]
    archives: dict[str, list[tuple[str, bytes]]] = {}
    for archive, name, content in files(config, scenes, names):
        archives.setdefault(archive, []).append((name, content))
    for archive, members in archives.items():
        with zipfile.ZipFile(folder / archive, "w") as file:
            for name, content in members:
                file.writestr(name, content)
    return [folder / archive for archive in archives]


_File = tuple[str, str, bytes]
"""Archive, path in it, content."""


def _archive_name(source: str) -> str:
    """A zip archive's name for a source, which may be a folder, a tar archive, or a URL with the name at its end."""
    url = urlsplit(source)
    name = PurePosixPath(url.fragment or url.path).name
    return f"{name.partition('.')[0] or 'dataset'}.zip"


def _folder(config: DatasetConfig, scenes: Mapping[str, Sequence[Scene]], names: Sequence[str]) -> Iterator[_File]:
    """ADE20K's layout."""
    top = names[0].removesuffix(".zip")
    top = "dataset" if top in ("images", "annotations") else top
    for split, all_of in scenes.items():
        for index, each in enumerate(all_of):
            place, name = f"{config.splits[split]}", f"{split}_{index:05d}"
            yield names[0], f"{top}/images/{place}/{name}.jpg", _encoded(each.image, ".jpg")
            yield names[0], f"{top}/annotations/{place}/{name}{config.label_suffix}.png", _label_file(config, each)


def _voc(config: DatasetConfig, scenes: Mapping[str, Sequence[Scene]], names: Sequence[str]) -> Iterator[_File]:
    for split, all_of in scenes.items():
        listed = [f"{split}_{index:05d}" for index in range(len(all_of))]
        yield names[0], f"ImageSets/Segmentation/{config.splits[split]}.txt", "\n".join([*listed, ""]).encode()
        for name, each in zip(listed, all_of, strict=True):
            yield names[0], f"JPEGImages/{name}.jpg", _encoded(each.image, ".jpg")
            yield names[0], f"SegmentationClass/{name}{config.label_suffix}.png", _label_file(config, each)


def _cityscapes(config: DatasetConfig, scenes: Mapping[str, Sequence[Scene]], names: Sequence[str]) -> Iterator[_File]:
    from pipeline.data.datasets.cityscapes import (
        IMAGE_SUFFIX,
        INSTANCE_SUFFIX,
        LABEL_SUFFIX,
        PER_LABEL,
        THINGS,
        TRAIN_IDS,
    )

    label_of = np.zeros(256, np.uint16)
    label_of[: len(TRAIN_IDS)] = TRAIN_IDS
    for split, all_of in scenes.items():
        for index, each in enumerate(all_of):
            place = f"{config.splits[split]}/town/town_{index:06d}_000019"
            labels = label_of[each.classes]  # -1: the last, 0
            objects = np.where(np.isin(each.classes, THINGS), PER_LABEL * labels + each.shapes, labels)
            yield names[0], f"leftImg8bit/{place}{IMAGE_SUFFIX}", _encoded(each.image, ".png")
            yield names[-1], f"gtFine/{place}{LABEL_SUFFIX}", _encoded(labels.astype(np.uint8), ".png")
            yield names[-1], f"gtFine/{place}{INSTANCE_SUFFIX}", _encoded(objects.astype(np.uint16), ".png")


def _ade20k(config: DatasetConfig, scenes: Mapping[str, Sequence[Scene]], names: Sequence[str]) -> Iterator[_File]:
    """Images and semantic labels in the first archive, objects in the last."""
    category = np.zeros(len(config.class_names) + 1, np.uint8)  # -1: the last, 0
    things = [place for place, name in enumerate(config.class_names) if name in config.thing_classes]
    category[things] = range(1, len(things) + 1)
    for split, all_of in scenes.items():
        for index, each in enumerate(all_of):
            place = f"{config.splits[split]}/{split}_{index:05d}"
            categories = category[each.classes]
            objects = np.stack((categories, np.where(categories, each.shapes, 0), 0 * categories), axis=2)
            yield names[0], f"dataset/images/{place}.jpg", _encoded(each.image, ".jpg")
            yield names[0], f"dataset/annotations/{place}.png", _encoded((each.classes + 1).astype(np.uint8), ".png")
            yield names[-1], f"annotations_instance/{place}.png", _encoded(objects.astype(np.uint8), ".png")


def _vistas(config: DatasetConfig, scenes: Mapping[str, Sequence[Scene]], names: Sequence[str]) -> Iterator[_File]:
    for split, all_of in scenes.items():
        folder, listed, segments = config.splits[split], list[dict[str, Any]](), list[dict[str, Any]]()
        for index, each in enumerate(all_of):
            name, (height, width) = f"{split}-{index:05d}", each.classes.shape
            listed.append({"id": name, "file_name": f"{name}.jpg", "height": height, "width": width})
            segments.append({"image_id": name, "file_name": f"{name}.png", "segments_info": _segments(each)})
            yield names[0], f"{folder}/images/{name}.jpg", _encoded(each.image, ".jpg")
            yield names[0], f"{folder}/panoptic/{name}.png", _encoded(_colours(each.shapes), ".png")
        content = {"images": listed, "annotations": segments, "categories": _categories(config)}
        yield names[0], f"{folder}/panoptic/panoptic_2018.json", json.dumps(content).encode()


def _categories(config: DatasetConfig) -> list[dict[str, Any]]:
    """COCO's categories of a dataset, with ids from 1 on."""
    return [
        {"id": index + 1, "name": name, "isthing": int(name in config.thing_classes)}
        for index, name in enumerate(config.class_names)
    ]


def _coco(config: DatasetConfig, scenes: Mapping[str, Sequence[Scene]], names: Sequence[str]) -> Iterator[_File]:
    """COCO's four archives where there are as many sources, or all in the first."""
    published = len(names) == 4
    categories = _categories(config)
    things = [category for category in categories if category["isthing"]]
    for split, all_of in scenes.items():
        folder, maps = config.splits[split], list[tuple[str, bytes]]()
        listed, objects, segments = list[dict[str, Any]](), list[dict[str, Any]](), list[dict[str, Any]]()
        of_images = next((name for name in names if name.startswith(folder)), names[0])
        for index, each in enumerate(all_of):
            name, (height, width) = f"{index + 1:012d}", each.classes.shape
            listed.append({"id": index + 1, "file_name": f"{name}.jpg", "height": height, "width": width})
            yield of_images, f"{folder}/{name}.jpg", _encoded(each.image, ".jpg")
            found = _segments(each)
            segments.append({"image_id": index + 1, "file_name": f"{name}.png", "segments_info": found})
            maps.append((f"{name}.png", _encoded(_colours(each.shapes), ".png")))
            objects += [
                _object(len(objects) + place, index + 1, each, part)
                for place, part in enumerate(
                    (part for part in found if categories[part["category_id"] - 1]["isthing"]), start=1
                )
            ]
        paths = {label: config.annotation_path(label, split) for label in ("instances", "panoptic", "panoptic_maps")}
        content: dict[str, Any] = {"images": listed, "annotations": objects, "categories": things}
        yield names[2 if published else 0], paths["instances"], json.dumps(content).encode()
        content = {"images": listed, "annotations": segments, "categories": categories}
        yield names[3 if published else 0], paths["panoptic"], json.dumps(content).encode()
        if published:  # the maps are an archive in the archive
            inner = io.BytesIO()
            with zipfile.ZipFile(inner, "w") as archive:
                for name, png in maps:
                    archive.writestr(f"{PurePosixPath(paths['panoptic_maps']).name}/{name}", png)
            yield names[3], f"{paths['panoptic_maps']}.zip", inner.getvalue()
        else:
            for name, png in maps:
                yield names[0], f"{paths['panoptic_maps']}/{name}", png


def _segments(each: Scene) -> list[dict[str, Any]]:
    """COCO's segments of a scene: every shape is one."""
    found = []
    for shape in np.unique(each.shapes[each.shapes > 0]).tolist():
        rows, columns = np.nonzero(each.shapes == shape)
        top, left = int(rows.min()), int(columns.min())
        box = [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top]
        info = {"id": shape, "category_id": each.class_of[shape] + 1, "iscrowd": 0, "area": len(rows), "bbox": box}
        found.append(info)
    return found


def _object(identity: int, image: int, each: Scene, segment: Mapping[str, Any]) -> dict[str, Any]:
    from pycocotools import mask

    run_lengths = mask.encode(np.asfortranarray(each.shapes == segment["id"], np.uint8))
    outline = {"size": list(run_lengths["size"]), "counts": run_lengths["counts"].decode()}
    return {**segment, "id": identity, "image_id": image, "segmentation": outline}


def _colours(ids: np.ndarray) -> np.ndarray:
    """COCO's panoptic PNG: the id is R + 256 G + 256 * 256 B."""
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)


def _label_file(config: DatasetConfig, each: Scene) -> bytes:
    """A label map as the data set stores it: before `label_offset`, or in the colours of its palette."""
    if config.palette:
        ignored = config.palette.get("ignore", ((0, 0, 0),))[0]
        colours = [config.palette[name][0] for name in config.class_names]
        return _encoded(np.array([*colours, ignored], np.uint8)[each.classes], ".png")  # -1 is the last one
    values = 65536 if len(config.class_names) > 255 else 256
    labels = np.where(each.classes < 0, config.ignore_labels[0], each.classes) - config.label_offset
    return _encoded((labels % values).astype(np.uint16 if values > 256 else np.uint8), ".png")


def _encoded(pixels: np.ndarray, suffix: str) -> bytes:
    import cv2

    done, data = cv2.imencode(suffix, pixels[..., ::-1] if pixels.ndim == 3 else pixels)
    assert done
    return bytes(data.tobytes())
