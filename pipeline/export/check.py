"""What an exported network gives beside this project's own: logits at several sizes, and the task's figure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from m2f.kernels.build import use
from m2f.types import Prediction
from pipeline.export.graph import OUTPUTS, STRIDE, ExportedNetwork, Pixels, example
from pipeline.params.tasks import LABELS, primary

if TYPE_CHECKING:
    from pipeline.params.schema import Row
    from pipeline.storage.results.data import Manifest

Run = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""An exported network: `pipeline.export.graph.ExportedNetwork.forward`."""

SIZES = ((64, 96), (224, 160), (416, 448))
"""Height and width of the images that are compared, of one window of a Swin and of several; none is that of the traced
example."""

BATCHES = (1, 3)
"""Images at once; neither is the traced example's number."""

TOLERANCE = 1e-3
"""A query agrees whose logits differ by at most this share of the largest logit."""

MOST_APART = 0.02
"""Share of the queries that may not agree: a mask logit within the rounding of 0 opens or closes a pixel to a query's
attention, and all that follows for this query is another number. A wrong graph changes nearly all."""

FIGURE_TOLERANCE = 1e-4
"""Largest change of the figure, as a fraction: 0.01 points."""


class Parity(NamedTuple):
    """How near an exported network's logits are to this project's."""

    largest: dict[str, float]
    """Largest difference by output."""
    magnitude: dict[str, float]
    """Largest logit by output."""
    queries: int
    apart: int
    """Queries of all images that do not agree."""

    def __str__(self) -> str:
        parts = [f"{name} {self.largest[name]:.1e} (of up to {self.magnitude[name]:.3g})" for name in OUTPUTS]
        return f"largest difference: {', '.join(parts)}; {self.apart} of {self.queries} queries apart"


def parity(network: nn.Module, run: Run, pixels: Pixels) -> Parity:
    """Compare at every size of SIZES and batch of BATCHES. ValueError where too many queries do not agree."""
    use("plain")
    own = ExportedNetwork(network).eval()
    largest, magnitude = dict.fromkeys(OUTPUTS, 0.0), dict.fromkeys(OUTPUTS, 0.0)
    queries = apart = 0
    for place, (batch, (height, width)) in enumerate((batch, size) for size in SIZES for batch in BATCHES):
        images, sizes = example(batch, height, width, pixels, seed=place + 1)
        with torch.no_grad():
            expected = own(images, sizes)
        agrees_BQ = torch.ones(expected[0].shape[:2], dtype=torch.bool)
        for name, right, found in zip(OUTPUTS, expected, run(images, sizes), strict=True):
            if found.shape != right.shape:
                raise ValueError(
                    f"the exported network's {name} have the shape {tuple(found.shape)}, not {tuple(right.shape)}; no "
                    "file is left"
                )
            apart_BQ = (found - right).abs().flatten(2).amax(2)
            largest[name] = max(largest[name], float(apart_BQ.max()))
            magnitude[name] = max(magnitude[name], float(right.abs().max()))
            agrees_BQ &= apart_BQ <= TOLERANCE * right.abs().max()  # false for nan too
        queries += agrees_BQ.numel()
        apart += int((~agrees_BQ).sum())
    result = Parity(largest, magnitude, queries, apart)
    if apart > MOST_APART * queries:
        raise ValueError(f"the exported network does not give this project's numbers ({result}); no file is left")
    return result


class Compared(NamedTuple):
    """The task's figure on the same validation images."""

    images: int
    figure: str
    before: float
    """This project's, as a fraction."""
    after: float
    """The exported network's."""

    def __str__(self) -> str:
        label = LABELS[self.figure]
        return (
            f"{label} on {self.images} validation images: {100 * self.before:.2f} before, {100 * self.after:.2f} after"
        )


def compare_figure(network: nn.Module, run: Run, pixels: Pixels, row: Row, manifest: Manifest, images: int) -> Compared:
    """Measure both networks on the first validation images, at a single scale. ValueError: the figure changes by more
    than FIGURE_TOLERANCE, or the images hold nothing to measure.

    An exported network takes multiples of 32 alone, so that both get images that are padded to one.
    """
    from pipeline.data.loader.val_images import validation_images
    from pipeline.evaluation.predict import PredictConfig, predict, single_scale
    from pipeline.evaluation.task_metrics import TaskMetrics

    test = dataclasses.replace(row.test, ms_flip=None, pad_multiple=max(row.test.pad_multiple, STRIDE))
    row = dataclasses.replace(row, test=test)
    config = PredictConfig(test=test, task=row.task, thing_ids=manifest.thing_ids_of(row.task))
    before, after = TaskMetrics(row, manifest), TaskMetrics(row, manifest)
    count = min(images, manifest.split("val").records)
    for val_image in validation_images(manifest, test, task=row.task, places=range(count)):
        valid, size = val_image.image.shape[1:], val_image.original_size
        before.update(val_image, predict(network, val_image.image, size, config))
        padded = _padded(val_image.image[None], test.pad_multiple, pixels)
        exported = _Exported(run, torch.tensor([list(valid)]))
        after.update(val_image, single_scale(exported, padded, (valid[0], valid[1]), size, config))
    figure = primary(row.task)
    values = [metrics.figures()[figure] for metrics in (before, after)]
    assert values[0] is not None and values[1] is not None
    compared = Compared(count, figure, values[0], values[1])
    if abs(compared.after - compared.before) > FIGURE_TOLERANCE:
        raise ValueError(f"the exported network does not measure as this project's does: {compared}; no file is left")
    return compared


def _padded(images: Tensor, multiple: int, pixels: Pixels) -> Tensor:
    height, width = images.shape[-2:]
    padded = nn.functional.pad(images, (0, -width % multiple, 0, -height % multiple))
    return padded if pixels == "uint8" else padded.float()


class _Exported(nn.Module):
    """An exported network where evaluation calls its own, for images of known sizes."""

    def __init__(self, run: Run, sizes: Tensor) -> None:
        super().__init__()
        self.run, self.sizes = run, sizes

    def forward(self, images: Tensor, *, auxiliary: bool) -> Prediction:
        assert not auxiliary
        return Prediction(*self.run(images.clone(), self.sizes))
