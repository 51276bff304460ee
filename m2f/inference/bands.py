"""Mask logits of a picture's own size, made in bands of rows: whole masks of all queries can take gigabytes.

A picture was resized, normalised and padded right and bottom to `padded_size` for the network, if at all;
`valid_size` is what of it is picture, `size` what is asked for. Sizes are (height, width). The network has
a mask logit for every 4 x 4 pixels, so `padded_size` is 4 * (h, w) unless a side is no multiple of 4.

B pictures, Q queries, h x w mask logits, Y rows of a band, K kept queries
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from m2f.constants import to_device
from m2f.types import Prediction

STRIDE = 4
"""Pixels of the padded picture per mask logit."""

_BAND_ELEMENTS = 1 << 22
"""Floats of the largest tensor a band needs on a CPU, about: 16 MiB, the fastest. Whole masks can take gigabytes."""

_GPU_BAND_ELEMENTS = 1 << 26
"""The same on a GPU: 256 MiB, so that each operation has enough pixels to fill it, and few are launched."""

Size = tuple[int, int]


def checked_sizes(
    prediction: Prediction, size: Size, valid_size: Size | None, padded_size: Size | None
) -> tuple[Size, Size]:
    """Padded and valid size with their defaults; ValueError where the sizes do not fit each other."""
    height, width = prediction.mask_logits.shape[2:]
    padded = (STRIDE * height, STRIDE * width) if padded_size is None else padded_size
    if (-(-padded[0] // STRIDE), -(-padded[1] // STRIDE)) != (height, width):
        raise ValueError(f"an image of {padded} does not have mask logits of {(height, width)}; padded_size is wrong")
    valid = padded if valid_size is None else valid_size
    if not all(0 < v <= p for v, p in zip(valid, padded, strict=True)) or min(size) < 1:
        raise ValueError(f"cannot cut {valid} out of a padded image of {padded} and resize it to {size}")
    return padded, valid


def checked_things(thing_ids: Collection[int], classes: int) -> frozenset[int]:
    things = frozenset(thing_ids)
    outside = sorted(c for c in things if not 0 <= c < classes)
    if outside:
        raise ValueError(f"thing_ids names {outside[0]}, which is outside the classes 0 to {classes - 1}")
    return things


def logit_bands(logits_Khw: Tensor, size: Size, valid: Size, padded: Size) -> Iterator[tuple[int, Tensor]]:
    """Masks' logits at `size` in bands of rows from top to bottom: (first row, (K, rows, width) float32).

    No band without masks. A band is nobody else's and may be changed.
    """
    masks = len(logits_Khw)
    if not masks:
        return

    def valid_logits(start: int, stop: int) -> Tensor:
        return upsampled_rows(logits_Khw[None], start, stop, padded)[..., : valid[1]]

    with torch.autocast(logits_Khw.device.type, enabled=False):
        for first, last in row_bands(valid, size, masks * padded[1], masks * size[1], logits_Khw.device):
            yield first, resized_part(valid_logits, valid, size, first, last)[0]


def row_bands(
    valid: Size, size: Size, source_row: int, result_row: int, device: torch.device
) -> Iterator[tuple[int, int]]:
    """Rows [first, last) from top to bottom, as many as fit; `source_row` and `result_row` are the floats that one row
    takes before and after resizing."""
    elements = _GPU_BAND_ELEMENTS if device.type == "cuda" else _BAND_ELEMENTS
    rows = max(STRIDE, int(elements / max(source_row * valid[0] / size[0], result_row)))
    for first in range(0, size[0], rows):
        yield first, min(first + rows, size[0])


def resized_part(rows_of: Callable[[int, int], Tensor], valid: Size, size: Size, first: int, last: int) -> Tensor:
    """Rows [first, last) of maps of `valid` resized to `size`; `rows_of` makes rows of the maps."""
    maps = _resized_rows(rows_of, valid[0], size[0], first, last)
    return maps if size[1] == valid[1] else _resize(maps, (maps.shape[2], size[1]))


def _resized_rows(rows_of: Callable[[int, int], Tensor], source_rows: int, rows: int, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of maps resized from `source_rows` to `rows` rows; `rows_of` makes rows of the source."""
    if rows == source_rows:
        return rows_of(start, stop)
    above_Y, below_Y, weight_Y = (t[start:stop] for t in _row_neighbours(rows, source_rows))
    low = int(above_Y[0])
    maps = rows_of(low, int(below_Y[-1]) + 1)
    above_Y, below_Y = to_device(torch.stack((above_Y, below_Y)) - low, maps.device)
    return maps[:, :, above_Y].lerp_(maps[:, :, below_Y], to_device(weight_Y[:, None], maps.device))


def _row_neighbours(rows: int, source_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """The two source rows each resized row mixes, and the weight of the second, (rows,); on the CPU.

    In float32 like `F.interpolate`, so that a band holds what the whole picture would.
    """
    position = ((torch.arange(rows) + 0.5) * (torch.tensor(float(source_rows)) / rows) - 0.5).clamp_(min=0)
    above = position.long()
    return above, (above + 1).clamp_(max=source_rows - 1), position - above


def upsampled_rows(logits_BQhw: Tensor, start: int, stop: int, padded: Size) -> Tensor:
    """Rows [start, stop) of mask logits upsampled to the padded picture, (B, Q, stop - start, width) float32."""
    height = logits_BQhw.shape[2]
    if padded[0] != STRIDE * height:
        band = _resized_rows(lambda low, high: logits_BQhw[:, :, low:high].float(), height, padded[0], start, stop)
        return _resize(band, (stop - start, padded[1]))
    # The logits that these rows lie in, and one more on either side, which the rows near the edge mix with.
    low = max(start // STRIDE - 1, 0)
    high = min(-(-stop // STRIDE) + 1, height)
    band = logits_BQhw[:, :, low:high].float()
    band = _resize(band, (STRIDE * band.shape[2], padded[1]))
    return band[:, :, start - STRIDE * low : stop - STRIDE * low]


def _resize(maps: Tensor, size: Size) -> Tensor:
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
