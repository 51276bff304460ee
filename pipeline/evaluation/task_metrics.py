"""What a row's task measures on validation pictures: the predictions, and metrics whose parts merge exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from m2f.metrics import CityscapesInstanceMetric, InstanceMetric, PanopticMetric, SemanticMetric
from pipeline.data.images.codecs import IGNORE
from pipeline.evaluation.predict import PredictConfig, Predictions, predict
from pipeline.params.schema import Row
from pipeline.params.tasks import FIGURES, MS_FLIP, primary

if TYPE_CHECKING:
    from pipeline.data.loader.val_images import ValImage
    from pipeline.storage.results.data import Manifest


class TaskMetrics:
    """The metrics of one task over any number of pictures; `merge` adds another part of the data set exactly."""

    def __init__(self, row: Row, manifest: Manifest) -> None:
        classes = row.model.num_classes
        self.task = row.task
        self.class_names = manifest.class_names_of(row.task)
        self.thing_ids = manifest.thing_ids_of(row.task)
        nothing = IGNORE if classes <= IGNORE else -1  # in ValImage.label_map
        pixels = partial(SemanticMetric, num_classes=classes, ignore_label=nothing)
        self.semantic = pixels() if row.task != "instance" else None
        self.ms_flip = pixels() if row.test.ms_flip is not None else None
        self.panoptic = (
            PanopticMetric(num_classes=classes, thing_ids=self.thing_ids) if row.task == "panoptic" else None
        )
        self.instance = _instance_metric(row, manifest) if row.task != "semantic" else None
        things = {manifest.class_names.index(self.class_names[place]): place for place in self.thing_ids}
        self._instance_class = torch.tensor([things.get(c, -1) for c in range(len(manifest.class_names))])

    def update(self, val_image: ValImage, predictions: Predictions) -> None:
        """Count one picture."""
        if self.semantic is not None:
            assert predictions.labels is not None and val_image.label_map is not None
            self.semantic.update(predictions.labels, val_image.label_map)
        if self.ms_flip is not None:
            assert predictions.ms_flip_labels is not None and val_image.label_map is not None
            self.ms_flip.update(predictions.ms_flip_labels, val_image.label_map)
        if self.panoptic is not None:
            assert predictions.segments is not None and val_image.segments is not None
            found = predictions.segments
            self.panoptic.update(
                found.segments, found.labels, val_image.segments, val_image.labels, crowd=val_image.crowd
            )
        if isinstance(self.instance, CityscapesInstanceMetric):
            assert predictions.instances is not None and val_image.segments is not None
            self.instance.update(
                predictions.instances.masks,
                predictions.instances.labels,
                predictions.instances.scores,
                val_image.segments,
                self._instance_class[val_image.labels],
                image_id=val_image.index,
                crowd=val_image.crowd,
                of_no_class=val_image.of_no_class,
            )
        elif self.instance is not None:
            assert predictions.instances is not None and val_image.instances is not None
            true, predicted = val_image.instances, predictions.instances
            self.instance.update(
                predicted.masks,
                predicted.labels,
                predicted.scores,
                true.run_lengths,
                true.labels,
                image_id=val_image.index,
                size=val_image.original_size,
                crowd=true.crowd,
                true_areas=true.areas,
            )

    def merge(self, other: TaskMetrics) -> None:
        """Add another part's counts, in place."""
        others = other._metrics()
        for name, metric in self._metrics().items():
            metric.merge(others[name])  # type: ignore[arg-type]

    def state(self) -> dict[str, Any]:
        """What has been counted, as JSON values."""
        return {name: metric.state() for name, metric in self._metrics().items()}

    def add_state(self, state: Mapping[str, Any]) -> None:
        """Add what the `state` of another part holds, in place."""
        for name, metric in self._metrics().items():
            metric.add_state(state[name])

    def _metrics(self) -> dict[str, SemanticMetric | PanopticMetric | InstanceMetric | CityscapesInstanceMetric]:
        """The metrics that the row has."""
        every = {name: getattr(self, name) for name in ("semantic", "ms_flip", "panoptic", "instance")}
        return {name: metric for name, metric in every.items() if metric is not None}

    def figures(self) -> dict[str, float | None]:
        """The task's FIGURES, and MS_FLIP if asked for; ValueError when the first of them has nothing to count."""
        known: dict[str, float | None] = {}
        if self.semantic is not None:
            known |= {name: self.semantic.result()[name] for name in FIGURES["semantic"]}  # type: ignore[literal-required]
        if self.panoptic is not None:
            quality = self.panoptic.result()
            for part, values in (("", quality), ("_things", quality["things"]), ("_stuff", quality["stuff"])):
                known |= {f"{name}{part}": values[name] for name in ("pq", "sq", "rq")}
        if self.instance is not None:
            known |= {name: value for name, value in self.instance.result().items() if name != "per_class"}  # type: ignore[misc]
        figures = {name: known[name] for name in FIGURES[self.task]}
        if figures[primary(self.task)] is None:
            what = "instance" if self.task == "instance" else "labelled pixel"
            raise ValueError(f"no validation image has a {what}, so there is nothing to measure; check the annotations")
        if self.ms_flip is not None:
            figures[MS_FLIP] = self.ms_flip.result()["miou"]
        return figures

    def per_class(self) -> dict[str, dict[str, float | None]]:
        """By metric (iou, pq, ap), the value of every class that the metric knows; None: nothing to count."""
        values: dict[str, list[float | None]] = {}
        if self.panoptic is not None:
            values["pq"] = self.panoptic.result()["per_class"]["pq"]
        if self.instance is not None:
            values["ap"] = self.instance.result()["per_class"]
        if self.semantic is not None:
            values["iou"] = self.semantic.result()["per_class"]["iou"]
        named = {metric: dict(zip(self.class_names, column, strict=True)) for metric, column in values.items()}
        if self.task == "panoptic":  # stuff has no instances
            named["ap"] = {self.class_names[c]: named["ap"][self.class_names[c]] for c in self.thing_ids}
        return named


def _instance_metric(row: Row, manifest: Manifest) -> InstanceMetric | CityscapesInstanceMetric:
    """The metric of `test.ap_rule`. ValueError where the dataset's labels are none that it can count."""
    if row.test.ap_rule == "coco":
        return InstanceMetric(num_classes=row.model.num_classes, max_instances=row.test.max_instances)
    if "panoptic" not in manifest.labels:
        raise ValueError(
            f"rows.{row.name}.test.ap_rule is {row.test.ap_rule}, which counts pixels of every segment, but dataset "
            f"{manifest.dataset} has {' and '.join(manifest.labels)} labels; set ap_rule: coco"
        )
    return CityscapesInstanceMetric(num_classes=row.model.num_classes)


def measure(
    model: nn.Module, manifest: Manifest, row: Row, *, worker: int = 0, workers: int = 1, processes: int = 0
) -> TaskMetrics:
    """The metrics of this worker's share of the validation pictures; puts the model in evaluation mode.

    processes: 0 decodes between predictions, else that many others do it ahead of them; the metrics are the same.
    """
    metrics = TaskMetrics(row, manifest)
    places = range(worker, manifest.split("val").records, workers)
    for val_image, predictions in predict_images(model, manifest, row, places=places, processes=processes):
        metrics.update(val_image, predictions)
    return metrics


def predict_images(
    model: nn.Module, manifest: Manifest, row: Row, *, places: Sequence[int], processes: int = 0
) -> Iterator[tuple[ValImage, Predictions]]:
    """The validation pictures at some places, in their order, with what the network makes of each; puts the model in
    evaluation mode. processes: of the loader."""
    from pipeline.data.loader.val_images import validation_images

    model.eval()
    config = PredictConfig(test=row.test, task=row.task, thing_ids=manifest.thing_ids_of(row.task))
    for val_image in validation_images(manifest, row.test, task=row.task, places=places, processes=processes):
        predictions = predict(model, val_image.image, val_image.original_size, config, original=val_image.original)
        yield val_image, predictions


def while_training(row: Row) -> Row:
    """The row as the loop validates it: at one size."""
    return dataclasses.replace(row, test=dataclasses.replace(row.test, ms_flip=None))
