"""The validation pictures on which a network does worst, by the figure of its row's task on each picture alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.evaluation.overlays import write_overlay
from pipeline.evaluation.task_metrics import TaskMetrics, predict_images, while_training
from pipeline.params.tasks import primary
from pipeline.storage.progress import Progress

if TYPE_CHECKING:
    from torch import nn

    from pipeline.params.schema import Row
    from pipeline.storage.results.data import Manifest


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A validation picture's figure."""

    place: int
    """In the split."""
    name: str
    value: float


def scored_images(network: nn.Module, manifest: Manifest, row: Row, *, processes: int = 0) -> list[Scored]:
    """The row's first figure, a fraction, of every validation picture alone, worst first; pictures in which there is
    nothing to measure are left out. The mean of all is not the dataset's figure, which counts over pictures."""
    places, figure = range(manifest.split("val").records), primary(row.task)
    progress = Progress(f"looking for the worst images of {row.name}", len(places), unit="images")
    row, found = while_training(row), []
    for val_image, predictions in predict_images(network, manifest, row, places=places, processes=processes):
        metrics = TaskMetrics(row, manifest)
        metrics.update(val_image, predictions)
        try:
            value = metrics.figures()[figure]
        except ValueError:  # nothing to measure
            value = None
        if value is not None:
            found.append(Scored(place=val_image.index, name=val_image.name, value=value))
        progress.add()
    progress.done()
    return sorted(found, key=lambda each: (each.value, each.place))


def write_worst(
    folder: Path, network: nn.Module, manifest: Manifest, row: Row, scored: list[Scored]
) -> list[tuple[Scored, Path]]:
    """Write the picture, the prediction and the truth of some validation pictures side by side, as PNGs."""
    by_place = {each.place: each for each in scored}
    row, written = while_training(row), []
    for val_image, predictions in predict_images(network, manifest, row, places=[each.place for each in scored]):
        path = folder / f"worst-{val_image.index:06d}.png"
        write_overlay(path, val_image, predictions, row.model.num_classes)
        written.append((by_place[val_image.index], path))
    return written
