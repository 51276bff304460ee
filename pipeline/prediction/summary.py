"""What is written of all pictures together: predictions.json, summary.csv and videos."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data.images.draw import class_colours
from pipeline.prediction.video import frame_rate, write_video
from pipeline.storage.files import whole_file

if TYPE_CHECKING:
    from pipeline.prediction.folder import Entry, Folder
    from pipeline.prediction.images import Found
    from pipeline.prediction.network import TrainedNetwork

COLUMNS = ("image", "labels", "height", "width", "objects", "classes", "error")


def write_summary(
    folder: Folder, network: TrainedNetwork, names: list[str], failures: Mapping[str, str], facts: Mapping[str, Any]
) -> None:
    """Write predictions.json and summary.csv of the finished pictures of these names, and of those that failed.

    failures: why, by file. facts: what the predictions are of, for predictions.json's `info`.
    """
    with whole_file(folder.path / "predictions.json") as partial, open(partial, "w", encoding="utf-8") as file:
        _write_json(file, folder, network, names, facts)
    with (
        whole_file(folder.path / "summary.csv") as partial,
        open(partial, "w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for entry in folder.entries(names):
            classes = "; ".join(f"{name} x{count}" if count > 1 else name for name, count in entry.classes.items())
            labels = folder.labels_file(entry.name).relative_to(folder.path).as_posix()
            writer.writerow([entry.file, labels, entry.height, entry.width, sum(entry.classes.values()), classes, ""])
        for name, error in failures.items():
            writer.writerow([name, "", "", "", "", "", error])


def _write_json(file: Any, folder: Folder, network: TrainedNetwork, names: list[str], facts: Mapping[str, Any]) -> None:
    """COCO's panoptic JSON for the task panoptic, else its JSON of objects; of one picture at a time, as they may be
    many."""
    lists = {
        "images": (
            {"id": number, "file_name": entry.file, "height": entry.height, "width": entry.width}
            for number, entry in enumerate(folder.entries(names), start=1)
        ),
        "annotations": _panoptic(folder, names) if network.task == "panoptic" else _objects(folder, names),
        "categories": categories(network),
    }
    file.write(f'{{"info": {json.dumps(facts, ensure_ascii=False)}')
    for key, values in lists.items():
        file.write(f',\n"{key}": [')
        for place, value in enumerate(values):
            file.write(("\n" if place == 0 else ",\n") + json.dumps(value, ensure_ascii=False))
        file.write("]")
    file.write("}\n")


def categories(network: TrainedNetwork) -> Iterator[dict[str, Any]]:
    """COCO's categories: the classes with their ids in label maps, and their colours."""
    things, colours = set(network.thing_ids), class_colours(len(network.class_names)).tolist()
    for label, (name, colour) in enumerate(zip(network.class_names, colours, strict=True)):
        yield {"id": label, "name": name, "isthing": int(label in things), "color": colour}


def _panoptic(folder: Folder, names: list[str]) -> Iterator[dict[str, Any]]:
    for number, entry in enumerate(folder.entries(names), start=1):
        yield {"image_id": number, "file_name": f"{entry.name}.png", "segments_info": list(entry.annotations)}


def _objects(folder: Folder, names: list[str]) -> Iterator[dict[str, Any]]:
    count = 0
    for number, entry in enumerate(folder.entries(names), start=1):
        for annotation in entry.annotations:
            count += 1
            yield {"id": count, "image_id": number, **annotation}


def write_videos(folder: Folder, found: Sequence[Found], entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Put the overlays of every video's frames together as overlays/<name>.mp4; the videos' frames by name."""
    videos = {}
    for video in (each for each in found if each.is_video):
        of_it = [entry for entry in entries if entry.name.rpartition("/")[0] == video.name]
        if of_it:
            path = folder.path / "overlays" / f"{video.name}.mp4"
            write_video(path, _overlays(folder, of_it), rate=frame_rate(video.path))
            videos[video.name] = of_it
    return videos


def _overlays(folder: Folder, entries: Sequence[Entry]) -> Iterator[np.ndarray]:
    import cv2

    for entry in entries:
        image = cv2.imread(str(folder.overlay_file(entry.name)))
        if image is None:
            raise ValueError(f"{folder.overlay_file(entry.name)} does not decode; delete it and run this again")
        yield image
