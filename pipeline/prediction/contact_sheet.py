"""index.html of a folder of predictions: every picture with its objects, to be looked through by class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from pipeline.data.images.draw import class_colours
from pipeline.report.html.environment import environment
from pipeline.storage.files import write_text

if TYPE_CHECKING:
    from pipeline.prediction.folder import Entry, Folder
    from pipeline.prediction.network import TrainedNetwork

MOST = 2000
"""Pictures that the page shows; summary.csv has all."""

FRAMES = 8
"""Frames that are shown of a video, besides the video."""


def write_contact_sheet(
    folder: Folder,
    network: TrainedNetwork,
    entries: Sequence[Entry],
    *,
    source: str,
    failures: Mapping[str, str],
    videos: Mapping[str, Sequence[Entry]],
) -> None:
    """Write index.html, which needs nothing but the folder. videos: their frames, by name."""
    frames = {entry.name for of_it in videos.values() for entry in of_it}
    cards = [entry for entry in entries if entry.name not in frames]
    cards += [entry for of_it in videos.values() for entry in _spread(of_it)]
    counts = Counter(name for entry in entries for name in entry.classes)
    colours = class_colours(len(network.class_names)).tolist()
    legend = [
        {"name": name, "colour": "rgb({}, {}, {})".format(*colour), "images": counts[name]}
        for name, colour in zip(network.class_names, colours, strict=True)
        if counts[name]
    ]
    text = (
        environment(Path(__file__).with_name("templates"))
        .get_template("contact_sheet.html")
        .render(
            source=source,
            network=network.description,
            total=len(entries),
            cards=[_card(folder, entry) for entry in cards[:MOST]],
            left_out=max(0, len(cards) - MOST),
            videos=[
                {"file": quote(f"overlays/{name}.mp4"), "name": name, "frames": len(videos[name])} for name in videos
            ],
            legend=legend,
            colours={entry["name"]: entry["colour"] for entry in legend},
            failures=failures,
        )
    )
    write_text(folder.path / "index.html", text)


def _spread(frames: Sequence[Entry]) -> list[Entry]:
    """Up to FRAMES of a video's frames, evenly spread."""
    shown = min(FRAMES, len(frames))
    return [frames[place * (len(frames) - 1) // max(1, shown - 1)] for place in range(shown)]


def _card(folder: Folder, entry: Entry) -> dict[str, object]:
    overlay, labels = (
        quote(file.relative_to(folder.path).as_posix())
        for file in (folder.overlay_file(entry.name), folder.labels_file(entry.name))
    )
    return {
        "file": entry.file,
        "overlay": overlay,
        "labels": labels,
        "size": f"{entry.width} × {entry.height}",
        "classes": entry.classes,
    }
