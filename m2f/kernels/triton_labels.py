"""Label maps in Triton: from mask logits and class probabilities to classes, without scores at the image's size.

B images, Q queries, C classes, h x w mask logits. A program takes PIXELS pixels of one row of the result. Sizes are
those of m2f.inference.bands: logits are upsampled to `padded`, cut to `valid`, and resized to `size`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_PIXELS = 32
_QUERIES_AT_ONCE = 32


@triton.jit
def _neighbours(position, scale, count):
    """The two places that a place of a resized axis mixes, and the weight of the second, as F.interpolate's
    align_corners=False has them."""
    source = tl.maximum((position.to(tl.float32) + 0.5) * scale - 0.5, 0.0)
    low = tl.minimum(source.to(tl.int32), count - 1)
    return low, tl.minimum(low + 1, count - 1), source - low.to(tl.float32)


@triton.jit
def _upsampled(logits, row, column, y_scale, x_scale, h, w, inside, known):
    """(PIXELS, QUERIES): the mask logits at a row and at columns of the padded image."""
    above, below, down = _neighbours(row, y_scale, h)
    left, right, across = _neighbours(column, x_scale, w)
    seen = inside[:, None] & known[None, :]
    upper = logits + (above * w + left)[:, None]
    upper_right = logits + (above * w + right)[:, None]
    lower = logits + (below * w + left)[:, None]
    lower_right = logits + (below * w + right)[:, None]
    first = tl.load(upper, mask=seen, other=0.0).to(tl.float32) * (1 - across)[:, None]
    first += tl.load(upper_right, mask=seen, other=0.0).to(tl.float32) * across[:, None]
    second = tl.load(lower, mask=seen, other=0.0).to(tl.float32) * (1 - across)[:, None]
    second += tl.load(lower_right, mask=seen, other=0.0).to(tl.float32) * across[:, None]
    return first * (1 - down) + second * down


@triton.jit
def _label(
    logits, probability, labels, Q, C, h, w, height, width, valid_height, valid_width,
    y_upsample, x_upsample, y_resize, x_resize,
    QUERIES: tl.constexpr, PIXELS: tl.constexpr, CLASSES: tl.constexpr, RESIZED: tl.constexpr, OF_LOGITS: tl.constexpr,
):  # fmt: skip
    # rows are the first axis of the grid: a GPU counts to 65,535 along the others
    row, image = tl.program_id(0), tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    inside = column < width
    classes = tl.arange(0, CLASSES)
    scores = tl.zeros((PIXELS, CLASSES), tl.float32)
    for first in range(0, Q, QUERIES):
        query = first + tl.arange(0, QUERIES)
        known = query < Q
        maps = logits + (image * Q + query)[None, :] * (h * w)
        if RESIZED:
            above, below, down = _neighbours(row, y_resize, valid_height)
            left, right, across = _neighbours(column, x_resize, valid_width)
            masks = tl.zeros((PIXELS, QUERIES), tl.float32)
            for corner in range(4):
                y = tl.where(corner // 2 == 1, below, above)
                x = tl.where(corner % 2 == 1, right, left)
                share = tl.where(corner // 2 == 1, down, 1 - down) * tl.where(corner % 2 == 1, across, 1 - across)
                part = _upsampled(maps, y, x, y_upsample, x_upsample, h, w, inside, known)
                masks += share[:, None] * (part if OF_LOGITS else tl.sigmoid(part))
            if OF_LOGITS:
                masks = tl.sigmoid(masks)
        else:
            masks = tl.sigmoid(_upsampled(maps, row, column, y_upsample, x_upsample, h, w, inside, known))
        wanted = known[:, None] & (classes < C)[None, :]
        weights = tl.load(probability + (image * Q + query)[:, None] * C + classes[None, :], mask=wanted, other=0.0)
        scores += tl.dot(masks, weights, input_precision="ieee")
    scores = tl.where(scores == scores, scores, float("inf"))  # PyTorch takes the first NaN for the largest, too
    scores = tl.where((classes < C)[None, :], scores, -1.0)  # those of classes are not negative
    label = tl.argmax(scores, axis=1, tie_break_left=True)
    to = labels + (image * height + row) * width + column
    tl.store(to, label.to(labels.dtype.element_ty), mask=inside)


@torch.library.custom_op("m2f::labels", mutates_args=())
def labels(
    logits_BQhw: Tensor,
    probability_BQC: Tensor,
    size: Sequence[int],
    valid: Sequence[int],
    padded: Sequence[int],
    of_logits: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Class with the highest score at every pixel, (B, *size), of two tensors without gaps. `probability_BQC`: float32,
    without "no object". `of_logits`: logits are resized, not scores (m2f.inference.semantic.Resized)."""
    B, Q, h, w = logits_BQhw.shape
    C = probability_BQC.shape[2]
    result = torch.empty(B, *size, dtype=dtype, device=logits_BQhw.device)
    scales = (h / padded[0], w / padded[1], valid[0] / size[0], valid[1] / size[1])
    classes = max(16, triton.next_power_of_2(C))
    _label[size[0], triton.cdiv(size[1], _PIXELS), B](
        logits_BQhw, probability_BQC, result, Q, C, h, w, *size, *valid, *scales,
        QUERIES=_QUERIES_AT_ONCE, PIXELS=_PIXELS, CLASSES=classes, RESIZED=tuple(valid) != tuple(size),
        OF_LOGITS=of_logits, num_warps=warps(classes),
    )  # fmt: skip
    return result


@labels.register_fake
def _labels_shape(
    logits_BQhw: Tensor,
    probability_BQC: Tensor,
    size: Sequence[int],
    valid: Sequence[int],
    padded: Sequence[int],
    of_logits: bool,
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty(len(logits_BQhw), *size, dtype=dtype, device=logits_BQhw.device)


def warps(classes: int) -> int:
    """Of a program, for a tile of so many classes: their registers hold it."""
    return 4 if classes <= 64 else 8
