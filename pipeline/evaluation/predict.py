"""From a picture to the network's predictions: what evaluation measures and a registered model returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from m2f.augmented_inference import semantic_scores_ms_flip
from m2f.inference import Instances, Segments, Size, instances, panoptic_segments, semantic_labels
from m2f.model import normalise, pad

if TYPE_CHECKING:
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
    segments_only: bool = False
    """Panoptic rows: the segments alone."""


@torch.inference_mode()
def predict(
    model: nn.Module, image: Tensor, size: Size, config: PredictConfig, *, original: Tensor | None = None
) -> Predictions:
    """The predictions for one picture of `size` (height, width), given as
    `pipeline.data.images.resize.network_image` makes it.

    The model is in evaluation mode. `original`: (3, h, w) uint8, needed where `test.ms_flip` is set.
    """
    test = config.test
    device = next(model.parameters()).device
    images = pad(normalise(image[None].to(device)), test.pad_multiple)
    predictions = single_scale(model, images, _size(image), size, config)
    if config.task != "semantic" or test.ms_flip is None:
        return predictions
    assert original is not None
    scores = semantic_scores_ms_flip(
        model,
        original,
        short_sides=test.ms_flip.short_sides,
        long_side_max=test.ms_flip.long_side_max,
        pad_multiple=test.pad_multiple,
    )
    return replace(predictions, ms_flip_labels=scores.max(0).indices)


@torch.inference_mode()
def single_scale(model: nn.Module, images: Tensor, valid: Size, size: Size, config: PredictConfig) -> Predictions:
    """`predict` without other sizes, for (1, 3, H, W) normalised, padded `images` of which `valid` is the picture."""
    test, task, thing_ids = config.test, config.task, config.thing_ids
    prediction = model(images, auxiliary=False)
    padded = _size(images)
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
    if config.segments_only:
        return Predictions(segments=segments)
    (found,) = instances(
        prediction, size, valid, padded_size=padded, thing_ids=thing_ids, max_instances=test.max_instances
    )
    labels = semantic_labels(prediction, size, valid, padded_size=padded, resize="logits")[0]
    return Predictions(labels=labels, segments=segments, instances=found)


def _size(images: Tensor) -> Size:
    return images.shape[-2], images.shape[-1]
