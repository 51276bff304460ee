"""From a picture to the network's predictions: what evaluation measures and a registered model returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from m2f.constants import to_device
from m2f.inference import Instances, Resized, Segments, Size, instances, panoptic_segments, semantic_labels
from m2f.inference.augmented import semantic_scores_ms_flip
from m2f.inference.windowed import Seen, Window, window_strips, windowed_labels
from m2f.inference.windowed_objects import CroppedInstance, InstanceMerger, SegmentMerger, dense_instances
from m2f.model import normalise, pad
from m2f.types import Prediction
from pipeline.compute.precision import in_precision

if TYPE_CHECKING:
    import numpy as np

    from pipeline.params.schema import Task, TestConfig


@dataclass(frozen=True, eq=False)
class Predictions:
    """What the network makes of one picture, at the picture's own size. None: not the task's, or not asked for."""

    labels: Tensor | None = None
    """(h, w) class ids."""
    ms_flip_labels: Tensor | None = None
    """(h, w) class ids from several sizes, each also mirrored."""
    segments: Segments | None = None
    instances: Instances | None = None


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """How pictures are shown to a row's network, and what is made of its prediction."""

    test: TestConfig
    task: Task
    """Semantic rows resize scores. Panoptic rows take all three predictions from one forward pass, their label map from
    resized mask logits, as the authors do."""
    thing_ids: Sequence[int]
    """The dataset's things, among the row's classes."""
    panoptic: Literal["all", "maps", "objects", "segments"] = "all"
    """What is made for panoptic rows: segments, and with them label map and instances; the label map; the instances;
    nothing else."""


@torch.inference_mode()
def predict(
    model: nn.Module, image: Tensor, size: Size, config: PredictConfig, *, original: Tensor | None = None
) -> Predictions:
    """The predictions for one picture of `size` (height, width), given as
    `pipeline.data.images.resize.network_image` makes it.

    The model is in evaluation mode. `original`: (3, h, w) uint8, needed where `test.ms_flip` or `test.window` is set.
    """
    test = config.test
    if (window := test.window) is not None and max(size) > window["size"]:
        assert original is not None
        return predict_windows(model, original.permute(1, 2, 0).numpy(), config).dense(test.max_instances)
    device = next(model.parameters()).device
    images = pad(normalise(to_device(image[None], device)), test.pad_multiple)
    predictions = single_scale(model, images, _size(image), size, config)
    if config.task != "semantic" or test.ms_flip is None:
        return predictions
    assert original is not None
    with in_precision(test.precision, device):  # scores are float32 nevertheless
        scores = semantic_scores_ms_flip(
            model,
            original,
            short_sides=test.ms_flip.short_sides,
            long_side_max=test.ms_flip.long_side_max,
            pad_multiple=test.pad_multiple,
        )
    return replace(predictions, ms_flip_labels=scores.max(0).indices)


@torch.inference_mode()
def predict_batch(
    model: nn.Module, images: Sequence[Tensor], sizes: Sequence[Size], config: PredictConfig
) -> list[Predictions]:
    """`predict` at a single scale for several pictures, which are of one size when they are padded.

    One forward pass sums in another order than several: scores differ from `predict`'s by rounding.
    """
    device = next(model.parameters()).device
    padded = [pad(normalise(to_device(image[None], device)), config.test.pad_multiple) for image in images]
    prediction = _prediction(model, torch.cat(padded), config)
    return [
        _made_of(
            Prediction(prediction.class_logits[place, None], prediction.mask_logits[place, None], ()),
            valid=_size(image),
            padded=_size(padded[place]),
            size=size,
            config=config,
        )
        for place, (image, size) in enumerate(zip(images, sizes, strict=True))
    ]


@dataclass(frozen=True, eq=False)
class WindowedPredictions:
    """What the network makes of a picture in windows, on the CPU."""

    size: Size
    labels: Tensor | None = None
    """(h, w) class ids."""
    segments: Segments | None = None
    instances: Sequence[CroppedInstance] | None = None
    """All that all windows have, best first."""

    def dense(self, max_instances: int) -> Predictions:
        """The same, with at most so many instances."""
        found = None if self.instances is None else dense_instances(self.instances[:max_instances], self.size)
        return Predictions(labels=self.labels, segments=self.segments, instances=found)


@torch.inference_mode()
def predict_windows(
    model: nn.Module,
    original: np.ndarray,
    config: PredictConfig,
    *,
    on_window: Callable[[int], None] = lambda windows: None,
) -> WindowedPredictions:
    """The predictions for a picture, (h, w, 3) uint8 RGB, in the windows of `test.window`, each shown like a picture.

    on_window: is called after each window with the number of all.
    """
    from pipeline.data.images.resize import network_image

    test, size = config.test, (original.shape[0], original.shape[1])
    assert test.window is not None
    device = next(model.parameters()).device
    strips = window_strips(size, window=test.window["size"], overlap=test.window["overlap"])
    segments = SegmentMerger(size) if config.task == "panoptic" else None
    with_objects = config.task == "instance" or (config.task == "panoptic" and config.panoptic == "all")
    objects = InstanceMerger(size) if with_objects else None

    def see(window: Window) -> Seen:
        part = original[window.top : window.top + window.height, window.left : window.left + window.width]
        image = network_image(part, test)
        images = pad(normalise(to_device(image[None], device)), test.pad_multiple)
        return Seen(_prediction(model, images, config), _size(image), _size(images))

    def merge(window: Window, seen: Seen) -> None:
        parts = replace(config, panoptic="objects" if with_objects else "segments")
        shape = (window.height, window.width)
        if segments is not None or objects is not None:
            found = _made_of(seen.prediction, valid=seen.valid, padded=seen.padded, size=shape, config=parts)
            if segments is not None and found.segments is not None:
                segments.add(window, found.segments)
            if objects is not None and found.instances is not None:
                objects.add(window, found.instances)
        on_window(sum(map(len, strips)))

    resize: Resized | None = None
    if config.task == "semantic":
        resize = "scores"
    elif config.task == "panoptic" and config.panoptic in ("all", "maps"):
        resize = "logits"
    labels = windowed_labels(strips, size, see, overlap=test.window["overlap"], resize=resize, on_window=merge)
    return WindowedPredictions(
        size,
        labels,
        None if segments is None else segments.result(),
        None if objects is None else objects.result(),
    )


@torch.inference_mode()
def single_scale(model: nn.Module, images: Tensor, valid: Size, size: Size, config: PredictConfig) -> Predictions:
    """`predict` without other sizes, for (1, 3, H, W) normalised, padded `images` of which `valid` is the picture."""
    prediction = _prediction(model, images, config)
    return _made_of(prediction, valid=valid, padded=_size(images), size=size, config=config)


def _prediction(model: nn.Module, images: Tensor, config: PredictConfig) -> Prediction:
    """The network's own, of its last layer, in the row's precision for tests."""
    with in_precision(config.test.precision, images.device):
        prediction: Prediction = model(images, auxiliary=False)
    return prediction


def _made_of(prediction: Prediction, *, valid: Size, padded: Size, size: Size, config: PredictConfig) -> Predictions:
    """What the task makes of the network's prediction for one picture."""
    test, task, thing_ids = config.test, config.task, config.thing_ids
    if task == "semantic":
        return Predictions(labels=semantic_labels(prediction, size, valid, padded_size=padded)[0])
    if task == "instance":
        (found,) = instances(prediction, size, valid, padded_size=padded, max_instances=test.max_instances)
        return Predictions(instances=found)
    (segments,) = panoptic_segments(
        prediction,
        size,
        valid,
        padded_size=padded,
        thing_ids=thing_ids,
        score_threshold=test.score_threshold,
        overlap_threshold=test.overlap_threshold,
    )
    if config.panoptic == "segments":
        return Predictions(segments=segments)
    labels = None
    if config.panoptic != "objects":
        labels = semantic_labels(prediction, size, valid, padded_size=padded, resize="logits")[0]
    if config.panoptic == "maps":
        return Predictions(labels=labels, segments=segments)
    (found,) = instances(
        prediction, size, valid, padded_size=padded, thing_ids=thing_ids, max_instances=test.max_instances
    )
    return Predictions(labels=labels, segments=segments, instances=found)


def _size(images: Tensor) -> Size:
    return images.shape[-2], images.shape[-1]
