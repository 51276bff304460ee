"""From a prediction to label maps of a picture's own size.

A picture was resized, normalised and padded right and bottom to `padded = 4 * (h, w)` for the network;
`valid_size` is what of it is picture, `size` what is asked for. Sizes are (height, width).

B pictures, Q queries, C classes, h x w mask logits, Y rows of a band
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from m2f.draws import to_device
from m2f.types import Prediction

STRIDE = 4
"""Pixels of the padded picture per mask logit."""

_BAND_ELEMENTS = 1 << 22
"""Floats of the largest tensor a band needs, about: 16 MiB, the fastest on a CPU. Whole masks can take gigabytes."""

Size = tuple[int, int]


@torch.no_grad()
def semantic_scores(prediction: Prediction, size: Size, valid_size: Size | None = None) -> Tensor:
    """Score of every class at every pixel, (B, C, *size) float32.

    Mask logits are upsampled to the padded picture; the score is the sum over queries of class
    probability (softmax, without "no object") times mask probability (sigmoid); scores are cropped to
    `valid_size` (None: all of the padded picture) and resized to `size`. All resizing is bilinear
    (align_corners=False). Made band by band: masks never exist at full resolution.

    ValueError when `valid_size` does not fit into the padded picture.
    """
    pictures, _, classes = prediction.class_logits.shape
    result = torch.empty(pictures, classes - 1, *size, device=prediction.mask_logits.device)
    for first, scores_BCYw in _score_bands(prediction, size, valid_size):
        result[:, :, first : first + scores_BCYw.shape[2]] = scores_BCYw
    return result


@torch.no_grad()
def semantic_labels(prediction: Prediction, size: Size, valid_size: Size | None = None) -> Tensor:
    """Class with the highest of `semantic_scores` at every pixel, (B, *size); uint8, or int64 beyond 255 classes.

    Scores of all classes only ever exist for a band of rows.
    """
    pictures, _, classes = prediction.class_logits.shape
    dtype = torch.uint8 if classes - 1 <= 255 else torch.int64
    result = torch.empty(pictures, *size, dtype=dtype, device=prediction.mask_logits.device)
    for first, scores_BCYw in _score_bands(prediction, size, valid_size):
        result[:, first : first + scores_BCYw.shape[2]] = scores_BCYw.max(
            1
        ).indices  # argmax(1), but 3 times as fast on a CPU
    return result


def _score_bands(prediction: Prediction, size: Size, valid_size: Size | None) -> Iterator[tuple[int, Tensor]]:
    """`semantic_scores` in bands of rows from top to bottom: (first row, (B, C, rows, width))."""
    device = prediction.mask_logits.device
    padded = (STRIDE * prediction.mask_logits.shape[2], STRIDE * prediction.mask_logits.shape[3])
    valid = padded if valid_size is None else valid_size
    if not all(0 < v <= p for v, p in zip(valid, padded, strict=True)) or min(size) < 1:
        raise ValueError(f"cannot cut {valid} out of a padded picture of {padded} and resize it to {size}")
    rows = _rows_per_band(prediction, size, valid)
    above, below, weight_below = _row_neighbours(size[0], valid[0])
    with torch.autocast(device.type, enabled=False):
        probability_BCQ = prediction.class_logits.float().softmax(-1)[..., :-1].transpose(1, 2)
        for first in range(0, size[0], rows):
            band = slice(first, min(first + rows, size[0]))
            start, stop = int(above[band][0]), int(below[band][-1]) + 1
            scores_BCYw = _valid_scores(probability_BCQ, prediction.mask_logits, start, stop, valid[1])
            if size[0] != valid[0]:
                above_Y, below_Y = to_device(torch.stack((above[band], below[band])) - start, device)
                weight_Y1 = to_device(weight_below[band, None], device)
                scores_BCYw = scores_BCYw[:, :, above_Y].lerp_(scores_BCYw[:, :, below_Y], weight_Y1)
            if size[1] != valid[1]:
                scores_BCYw = _resize(scores_BCYw, (scores_BCYw.shape[2], size[1]))
            yield first, scores_BCYw


def _rows_per_band(prediction: Prediction, size: Size, valid: Size) -> int:
    pictures, queries, classes = prediction.class_logits.shape
    source_row = max(queries * STRIDE * prediction.mask_logits.shape[3], classes * valid[1])
    result_row = max(source_row * valid[0] / size[0], classes * size[1])
    return max(STRIDE, int(_BAND_ELEMENTS / (pictures * result_row)))


def _row_neighbours(rows: int, source_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """The two source rows each resized row mixes, and the weight of the second, (rows,); on the CPU.

    In float32 like `F.interpolate`, so that a band holds what the whole picture would.
    """
    position = ((torch.arange(rows) + 0.5) * (torch.tensor(float(source_rows)) / rows) - 0.5).clamp_(min=0)
    above = position.long()
    return above, (above + 1).clamp_(max=source_rows - 1), position - above


def _valid_scores(probability_BCQ: Tensor, logits_BQhw: Tensor, start: int, stop: int, width: int) -> Tensor:
    """Scores in rows [start, stop) and the first `width` columns of the padded picture, (B, C, rows, width)."""
    masks_BQYw = upsampled_rows(logits_BQhw, start, stop)[..., :width].sigmoid()
    return (probability_BCQ @ masks_BQYw.flatten(2)).unflatten(2, masks_BQYw.shape[2:])


def upsampled_rows(logits_BQhw: Tensor, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of mask logits upsampled to the padded picture, (B, Q, stop - start, 4 w) float32."""
    # The logits that these rows lie in, and one more on either side, which the rows near the edge mix with.
    low = max(start // STRIDE - 1, 0)
    high = min(-(-stop // STRIDE) + 1, logits_BQhw.shape[2])
    band = logits_BQhw[:, :, low:high].float()
    band = _resize(band, (STRIDE * band.shape[2], STRIDE * band.shape[3]))
    return band[:, :, start - STRIDE * low : stop - STRIDE * low]


def _resize(maps: Tensor, size: Size) -> Tensor:
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
