"""The page of a dataset: its counts as tables, and its pictures with names and boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data.images.draw import class_colours
from pipeline.params.sentences import how_many
from pipeline.prediction.annotations import Objects
from pipeline.prediction.drawing import overlay
from pipeline.report.html.environment import environment
from pipeline.storage.files import whole_file, write_text

if TYPE_CHECKING:
    from pipeline.browse.samples import Sample
    from pipeline.storage.results.data import Manifest

LEAST_SIDE = 480
"""Pixels of the longer side of a picture on the page: smaller ones are enlarged, so that names are legible."""

IMAGES = "images"
"""The folder of the page's pictures, beside it."""

_MARK = ".browse"
"""A file that says that the folder is a page's: what lies in its pictures' folder may be deleted."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """A picture on the page."""

    file: str
    """Relative to the page."""
    title: str
    note: str
    classes: Mapping[str, int]
    """Objects of every class that it shows."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """Pictures below one heading."""

    title: str
    text: str
    cards: Sequence[Card]
    wide: bool = False
    """Each picture takes the whole line."""


def open_page(folder: Path) -> None:
    """Make the folder of a page, or empty an earlier page's. ValueError where it holds other files."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder with --out")
    mark = folder / _MARK
    there = {path.name for path in folder.iterdir()} if folder.exists() else set()
    foreign = sorted(there - {IMAGES, "index.html", _MARK} if mark.exists() else there)
    if foreign:
        raise ValueError(f"{folder} holds {foreign[0]}, which no such page does; give an empty or a new folder")
    try:
        (folder / IMAGES).mkdir(parents=True, exist_ok=True)
        mark.touch()
        for path in (folder / IMAGES).iterdir():
            path.unlink()
    except (PermissionError, NotADirectoryError, IsADirectoryError) as error:
        raise ValueError(f"{error.filename} cannot be written ({error.strerror}); give another --out") from None


def write_sample(folder: Path, key: str, sample: Sample, class_names: Sequence[str], *, borders: bool) -> Card:
    """Write a sample with its labels, names and boxes as a JPEG of the page."""
    import cv2

    image, ids, boxes = sample.image, sample.objects.ids, sample.boxes
    height, width = ids.shape
    if (scale := LEAST_SIDE / max(height, width)) > 1:
        size = max(1, round(width * scale)), max(1, round(height * scale))
        image = cv2.resize(np.ascontiguousarray(image), size, interpolation=cv2.INTER_CUBIC)
        ids = cv2.resize(ids, size, interpolation=cv2.INTER_NEAREST)
    drawn = overlay(image, Objects(ids=ids, labels=sample.objects.labels), class_names, borders=borders).copy()
    colours, scale = class_colours(len(class_names)).tolist(), drawn.shape[1] / width
    for (x1, y1, x2, y2), label in zip((boxes * scale).round().astype(int).tolist(), sample.box_labels, strict=True):
        cv2.rectangle(drawn, (x1, y1), (x2 - 1, y2 - 1), (0, 0, 0), 3)
        cv2.rectangle(drawn, (x1, y1), (x2 - 1, y2 - 1), colours[label], 1)
    done, data = cv2.imencode(".jpg", np.ascontiguousarray(drawn[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 88])
    assert done
    file = f"{IMAGES}/{key}.jpg"
    with whole_file(folder / file) as partial:
        partial.write_bytes(data.tobytes())
    objects = len(sample.boxes)
    return Card(
        file=file,
        title=sample.name,
        note=f"{width} × {height}, {how_many(objects, 'object')}",
        classes={class_names[label]: count for label, count in sample.counts.items()},
    )


def write_page(
    folder: Path, manifest: Manifest, sections: Sequence[Section], *, title: str, notes: Sequence[str]
) -> None:
    """Write index.html, which needs nothing but the folder."""
    rooms = Path(__file__).parents[1]
    templates = environment(rooms / "browse" / "templates", rooms / "prediction" / "templates")
    names = manifest.class_names
    colours = ["rgb({}, {}, {})".format(*colour) for colour in class_colours(len(names)).tolist()]
    text = templates.get_template("page.html").render(
        title=title,
        notes=notes,
        splits=_splits(manifest),
        split_names=list(manifest.splits),
        classes=_classes(manifest, colours),
        colours=dict(zip(names, colours, strict=True)),
        sections=[section for section in sections if section.cards],
    )
    write_text(folder / "index.html", text)


def _splits(manifest: Manifest) -> list[dict[str, Any]]:
    """By split, how many pictures there are and of which sizes."""
    found = []
    for name, split in manifest.splits.items():
        sides, ends = manifest.image_sizes[name], manifest.extreme_sizes.get(name)
        found.append(
            {
                "name": name,
                "records": split.records,
                "median": f"{sides.width[1]} × {sides.height[1]}",
                "smallest": f"{ends.smallest[1]} × {ends.smallest[0]}" if ends else "",
                "largest": f"{ends.largest[1]} × {ends.largest[0]}" if ends else "",
                "objects": sum(manifest.instances[name]),
                "most": max(manifest.things_per_image[name], default=0),
            }
        )
    return found


def _classes(manifest: Manifest, colours: Sequence[str]) -> list[dict[str, Any]]:
    """By class, the pictures that hold it, its objects and its share of the labelled pixels, of every split."""
    totals = {split: max(1, sum(manifest.pixels[split])) for split in manifest.splits}
    return [
        {
            "name": name,
            "colour": colours[place],
            "thing": name in manifest.thing_classes,
            "splits": [
                {
                    "images": manifest.images[split][place],
                    "objects": manifest.instances[split][place],
                    "share": f"{100 * manifest.pixels[split][place] / totals[split]:.2f} %",
                }
                for split in manifest.splits
            ],
        }
        for place, name in enumerate(manifest.class_names)
    ]
