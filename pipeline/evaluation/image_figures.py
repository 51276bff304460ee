"""The figures of every validation picture alone, to find those on which a network does badly. Their mean is not the
data set's figure, which counts over pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.storage.files import read_json, write_json

if TYPE_CHECKING:
    from pipeline.data.loader.val_images import ValImage
    from pipeline.evaluation.evaluate_checkpoint import Job
    from pipeline.evaluation.task_metrics import TaskMetrics
    from pipeline.storage.stores import StoredPath

ImageLine = dict[str, Any]
"""A picture: `image`, its name; figures as fractions, None where it holds nothing to count; numbers of instances."""


class ImageFigures:
    """Watches the metrics of a part while they count, and writes each picture's own figures."""

    def __init__(self, job: Job, part: range) -> None:
        self._path = images_file(job.folder, part)
        self._lines: dict[int, ImageLine] = {}
        self._counted: dict[str, Any] = {}

    def add(self, val_image: ValImage, metrics: TaskMetrics) -> None:
        """To be called when `metrics` have counted the picture: what was added since the last one is its own."""
        from m2f.metrics import PanopticMetric, SemanticMetric

        line: ImageLine = {"image": val_image.name}
        if (panoptic := metrics.panoptic) is not None:
            counts = self._added("panoptic", panoptic.counts)
            alone = PanopticMetric(num_classes=panoptic.num_classes, thing_ids=panoptic.thing_ids, counts=counts)
            line["pq"] = alone.result()["pq"]
        if (semantic := metrics.semantic) is not None:
            confusion = self._added("semantic", semantic.confusion)
            own = SemanticMetric(num_classes=semantic.num_classes, confusion=confusion).result()
            line |= {"miou": own["miou"], "pixel_accuracy": own["pixel_accuracy"]}
        self._lines[val_image.index] = line

    def _added(self, name: str, state: Any) -> Any:
        now = state.cpu()
        before, self._counted[name] = self._counted.get(name), now.clone()
        return now if before is None else now - before

    def save(self, metrics: TaskMetrics) -> None:
        """Write the lines of the part's pictures, in their order."""
        if metrics.instance is not None:
            for image_id, own in metrics.instance.alone():
                self._lines[image_id] |= own
        write_json(self._path, list(self._lines.values()))


def images_file(folder: StoredPath, part: range) -> StoredPath:
    """Where the lines of a part of an evaluation lie until all parts are there."""
    return folder / "parts" / f"{part.start:06d}-{part.stop - 1:06d}.images.json"


def merged_lines(files: Sequence[StoredPath]) -> list[ImageLine]:
    """The lines of all parts in their order; none where a part has none, as one of an earlier version."""
    if not all(path.exists() for path in files):
        return []
    return [line for path in files for line in read_json(path, made_by="the same command")]
