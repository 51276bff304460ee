"""From a prediction to class scores and label maps of a picture's own size (sizes: m2f.inference.bands).

B pictures, Q queries, C classes, h x w mask logits, Y rows of a band
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from m2f.inference.bands import Size, checked_sizes, resized_part, row_bands, upsampled_rows
from m2f.kernels import gpu
from m2f.types import Prediction

Resized = Literal["scores", "logits"]
"""What is resized from the network's picture to the size asked for: class scores or mask logits."""


@torch.no_grad()
def semantic_scores(
    prediction: Prediction,
    size: Size,
    valid_size: Size | None = None,
    *,
    padded_size: Size | None = None,
    resize: Resized = "scores",
) -> Tensor:
    """Score of every class at every pixel, (B, C, *size) float32.

    Mask logits are upsampled to `padded_size` (None: 4 times theirs); the score is the sum over queries of
    class probability (softmax, without "no object") times mask probability (sigmoid); scores are cropped to
    `valid_size` (None: all of the padded picture) and resized to `size`. With `resize="logits"` the mask
    logits are cropped and resized, and scores made of the result, as for panoptic segments. All resizing
    is bilinear (align_corners=False). Made band by band: masks never exist at full resolution.

    ValueError when the sizes do not fit each other.
    """
    batch_size, _, classes = prediction.class_logits.shape
    result = torch.empty(batch_size, classes - 1, *size, device=prediction.mask_logits.device)
    for first, scores_BCYw in score_bands(prediction, size, valid_size, padded_size=padded_size, resize=resize):
        result[:, :, first : first + scores_BCYw.shape[2]] = scores_BCYw
    return result


@torch.no_grad()
def semantic_labels(
    prediction: Prediction,
    size: Size,
    valid_size: Size | None = None,
    *,
    padded_size: Size | None = None,
    resize: Resized = "scores",
) -> Tensor:
    """Class with the highest of `semantic_scores` at every pixel, (B, *size); uint8, or int64 beyond 255 classes.

    Scores of all classes only ever exist for a band of rows.
    """
    batch_size, _, classes = prediction.class_logits.shape
    if gpu.takes_labels(prediction.mask_logits, classes - 1):
        padded, valid = checked_sizes(prediction, size, valid_size, padded_size)
        probability_BQC = prediction.class_logits.float().softmax(-1)[..., :-1]
        return gpu.labels(
            prediction.mask_logits,
            probability_BQC,
            size=size,
            valid=valid,
            padded=padded,
            of_logits=checked_resize(resize) == "logits",
        )
    dtype = torch.uint8 if classes - 1 <= 255 else torch.int64
    result = torch.empty(batch_size, *size, dtype=dtype, device=prediction.mask_logits.device)
    for first, scores_BCYw in score_bands(prediction, size, valid_size, padded_size=padded_size, resize=resize):
        result[:, first : first + scores_BCYw.shape[2]] = scores_BCYw.max(
            1
        ).indices  # argmax(1), but 3 times as fast on a CPU
    return result


def score_bands(
    prediction: Prediction,
    size: Size,
    valid_size: Size | None = None,
    *,
    padded_size: Size | None = None,
    resize: Resized = "scores",
) -> Iterator[tuple[int, Tensor]]:
    """`semantic_scores` in bands of rows from top to bottom: (first row, (B, C, rows, width))."""
    padded, valid = checked_sizes(prediction, size, valid_size, padded_size)
    batch_size, queries, classes = prediction.class_logits.shape
    source_row, result_row = batch_size * queries * padded[1], batch_size * queries * size[1]
    if resize == "scores":
        source_row = max(source_row, batch_size * classes * valid[1])
        result_row = batch_size * classes * size[1]
    for rows in row_bands(valid, size, source_row, result_row, prediction.mask_logits.device):
        scores = score_rows(prediction, size, rows, valid_size, padded_size=padded_size, resize=resize)
        yield rows[0], scores


def score_rows(
    prediction: Prediction,
    size: Size,
    rows: tuple[int, int],
    valid_size: Size | None = None,
    *,
    padded_size: Size | None = None,
    resize: Resized = "scores",
) -> Tensor:
    """Rows [first, last) of `semantic_scores`, (B, C, rows, width); nothing else is made."""
    padded, valid = checked_sizes(prediction, size, valid_size, padded_size)
    checked_resize(resize)
    logits_BQhw = prediction.mask_logits
    with torch.autocast(logits_BQhw.device.type, enabled=False):
        probability_BCQ = prediction.class_logits.float().softmax(-1)[..., :-1].transpose(1, 2)

        def scores(logits_BQYw: Tensor) -> Tensor:
            return (probability_BCQ @ logits_BQYw.sigmoid().flatten(2)).unflatten(2, logits_BQYw.shape[2:])

        def source(start: int, stop: int) -> Tensor:
            logits_BQYw = upsampled_rows(logits_BQhw, start, stop, padded)[..., : valid[1]]
            return scores(logits_BQYw) if resize == "scores" else logits_BQYw

        maps = resized_part(source, valid, size, *rows)
        return maps if resize == "scores" else scores(maps)


def checked_resize(resize: Resized) -> Resized:
    """ValueError where there is no such way to resize."""
    if resize not in get_args(Resized):
        raise ValueError(f"resize is {resize!r}; it must be one of {', '.join(get_args(Resized))}")
    return resize
