"""From a prediction to label maps, segments and instances of a picture's own size.

A picture was resized, normalised and padded right and bottom to `padded_size` for the network, if at all;
`valid_size` is what of it is picture, `size` what is asked for. Sizes are (height, width). The network has
a mask logit for every 4 x 4 pixels, so `padded_size` is 4 * (h, w) unless a side is no multiple of 4.

B pictures, Q queries, C classes, h x w mask logits, Y rows of a band, H x W = size asked for, K kept queries,
S segments, N instances
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

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
    dtype = torch.uint8 if classes - 1 <= 255 else torch.int64
    result = torch.empty(batch_size, *size, dtype=dtype, device=prediction.mask_logits.device)
    for first, scores_BCYw in score_bands(prediction, size, valid_size, padded_size=padded_size, resize=resize):
        result[:, first : first + scores_BCYw.shape[2]] = scores_BCYw.max(
            1
        ).indices  # argmax(1), but 3 times as fast on a CPU
    return result


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Segments:
    """Panoptic segments of one picture: every pixel belongs to one or to none."""

    segments: Tensor
    """(H, W) int32: the index of the segment that holds the pixel; -1 where there is none (void)."""
    labels: Tensor
    """(S,) int64 class of every segment."""
    is_thing: Tensor
    """(S,) bool: one object; otherwise all of a class's stuff in the picture."""
    scores: Tensor
    """(S,) float32 class probability; of stuff from several queries, the highest."""


@torch.no_grad()
def panoptic_segments(
    prediction: Prediction,
    size: Size,
    valid_size: Size | None = None,
    *,
    thing_ids: Collection[int],
    padded_size: Size | None = None,
    score_threshold: float = 0.8,
    overlap_threshold: float = 0.8,
) -> list[Segments]:
    """The segments of every picture, by query; stuff of one class is one segment.

    Mask logits are upsampled to `padded_size`, cropped to `valid_size` and resized to `size`, all
    bilinear; probabilities are made of the result. Queries whose likeliest class is not "no object" and
    has a probability over `score_threshold` compete for the pixels by class times mask probability. One
    that wins fewer pixels than `overlap_threshold` times those of its own mask (probability at least 1/2)
    is dropped and leaves them void; so are pixels won with a mask probability below 1/2. Thresholds are
    the published ones (paper, sec. 4; the reference's test_cfg). Made band by band: masks never exist at
    full resolution.

    `thing_ids`: the classes whose queries stay apart; `range(80)` for COCO. ValueError when one is no
    class, or when the sizes do not fit each other.
    """
    classes = prediction.class_logits.shape[2] - 1
    things = _checked_things(thing_ids, classes)
    padded, valid = _checked_sizes(prediction, size, valid_size, padded_size)
    device = prediction.mask_logits.device
    result = []
    for class_logits_QC1, mask_logits_Qhw in zip(prediction.class_logits, prediction.mask_logits, strict=True):
        score_Q, label_Q = class_logits_QC1.float().softmax(-1).max(-1)
        kept_K = ((label_Q < classes) & (score_Q > score_threshold)).nonzero()[:, 0]
        score_K, label_K = score_Q[kept_K], label_Q[kept_K]
        winner_HW, areas_3K = _competition(score_K, mask_logits_Qhw[kept_K], size, valid, padded)

        lookup = [-1] * (len(kept_K) + 1)
        labels: list[int] = []
        scores: list[float] = []
        stuff: dict[int, int] = {}
        kept = zip(label_K.tolist(), score_K.tolist(), *areas_3K.tolist(), strict=True)
        for k, (label, score, won, won_surely, own) in enumerate(kept):
            if not won_surely or not own or won / own < overlap_threshold:
                continue
            segment = len(labels) if label in things else stuff.setdefault(label, len(labels))
            if segment == len(labels):
                labels.append(label)
                scores.append(score)
            else:
                scores[segment] = max(scores[segment], score)
            lookup[k] = segment
        result.append(
            Segments(
                segments=torch.tensor(lookup, dtype=torch.int32, device=device)[winner_HW],
                labels=torch.tensor(labels, dtype=torch.int64, device=device),
                is_thing=torch.tensor([label in things for label in labels], dtype=torch.bool, device=device),
                scores=torch.tensor(scores, dtype=torch.float32, device=device),
            )
        )
    return result


def _competition(score_K: Tensor, logits_Khw: Tensor, size: Size, valid: Size, padded: Size) -> tuple[Tensor, Tensor]:
    """The query that wins each pixel, (H, W) int64, K where its mask probability is below 1/2; and pixels
    of each query, (3, K) int64: won, won with at least 1/2, at least 1/2."""
    queries = len(score_K)
    winner_HW = torch.full(size, queries, device=score_K.device)
    areas_3K = torch.zeros(3, queries, dtype=torch.int64, device=score_K.device)
    for first, logits_KYw in _logit_bands(logits_Khw, size, valid, padded):
        mask_KYw = logits_KYw.sigmoid_()
        winner_Yw = (mask_KYw * score_K[:, None, None]).max(0).indices  # argmax(0), but 3 times as fast on a CPU
        surely_Yw = mask_KYw.gather(0, winner_Yw[None])[0] >= 0.5
        areas_3K[0] += winner_Yw.flatten().bincount(minlength=queries)
        areas_3K[1] += winner_Yw[surely_Yw].bincount(minlength=queries)
        areas_3K[2] += (mask_KYw >= 0.5).flatten(1).sum(1)
        winner_HW[first : first + len(winner_Yw)] = winner_Yw.masked_fill_(~surely_Yw, queries)
    return winner_HW, areas_3K


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Instances:
    """Instances of one picture, best first; they may overlap."""

    scores: Tensor
    """(N,) float32: class probability times the mean mask probability inside the mask; 0 for an empty mask."""
    labels: Tensor
    """(N,) int64 classes. One query may stand for several classes."""
    masks: Tensor
    """(N, H, W) bool."""
    boxes: Tensor
    """(N, 4) float32 x1, y1, x2, y2 in pixels around the mask, its last column and row included; 0 for an empty one."""


@torch.no_grad()
def instances(
    prediction: Prediction,
    size: Size,
    valid_size: Size | None = None,
    *,
    thing_ids: Collection[int] | None = None,
    padded_size: Size | None = None,
    max_instances: int = 100,
) -> list[Instances]:
    """The instances of every picture: the `max_instances` likeliest pairs of query and class, things only.

    Mask logits are upsampled to `padded_size`, cropped to `valid_size` and resized to `size`, all
    bilinear; a mask is where they are positive. `thing_ids`: the classes that are things (None: all).
    As in the reference, stuff takes part in the choice and is left out afterwards, so there may be fewer.
    Made band by band: only the boolean masks exist at full resolution.

    ValueError when a thing is no class, or when the sizes do not fit each other.
    """
    classes = prediction.class_logits.shape[2] - 1
    padded, valid = _checked_sizes(prediction, size, valid_size, padded_size)
    device = prediction.mask_logits.device
    is_thing_C = torch.zeros(classes, dtype=torch.bool)
    is_thing_C[sorted(_checked_things(range(classes) if thing_ids is None else thing_ids, classes))] = True
    is_thing_C = to_device(is_thing_C, device)
    result = []
    for class_logits_QC1, mask_logits_Qhw in zip(prediction.class_logits, prediction.mask_logits, strict=True):
        probability_QC = class_logits_QC1.float().softmax(-1)[:, :-1]
        # a stable sort, so that ties fall alike on every device
        probability_N, pair_N = (t[:max_instances] for t in probability_QC.flatten().sort(descending=True, stable=True))
        thing_N = is_thing_C[pair_N % classes]
        probability_N, pair_N = probability_N[thing_N], pair_N[thing_N]
        query_K, kept_N = (pair_N // classes).unique(return_inverse=True)  # each mask once, whatever it may be

        masks_KHW = torch.empty(len(query_K), *size, dtype=torch.bool, device=device)
        inside_K = torch.zeros(len(query_K), dtype=torch.float64, device=device)
        for first, logits_KYw in _logit_bands(mask_logits_Qhw[query_K], size, valid, padded):
            mask_KYw = masks_KHW[:, first : first + logits_KYw.shape[1]]
            torch.gt(logits_KYw, 0, out=mask_KYw)
            inside_K += logits_KYw.sigmoid_().mul_(mask_KYw).sum((1, 2), dtype=torch.float64)
        mean_K = (inside_K / masks_KHW.sum((1, 2)).clamp_(min=1)).float()

        scores_N, order_N = (probability_N * mean_K[kept_N]).sort(descending=True, stable=True)
        kept_N = kept_N[order_N]
        result.append(
            Instances(
                scores=scores_N,
                labels=pair_N[order_N] % classes,
                masks=masks_KHW[kept_N],
                boxes=_boxes(masks_KHW)[kept_N],
            )
        )
    return result


def _boxes(masks_KHW: Tensor) -> Tensor:
    """x1, y1, x2, y2 around every mask, (K, 4) float32; 0 for an empty one."""
    edges = []
    for present in (masks_KHW.any(1), masks_KHW.any(2)):  # columns (K, W), rows (K, H)
        first = present.int().argmax(1)
        last = present.shape[1] - present.flip(1).int().argmax(1)
        edges.append(torch.stack((first, last), 1) * present.any(1, keepdim=True))
    return torch.stack(edges, 2).flatten(1).float()


def _checked_things(thing_ids: Collection[int], classes: int) -> frozenset[int]:
    things = frozenset(thing_ids)
    outside = sorted(c for c in things if not 0 <= c < classes)
    if outside:
        raise ValueError(f"thing_ids names {outside[0]}, which is outside the classes 0 to {classes - 1}")
    return things


def _checked_sizes(
    prediction: Prediction, size: Size, valid_size: Size | None, padded_size: Size | None
) -> tuple[Size, Size]:
    """Padded and valid size with their defaults; ValueError where the sizes do not fit each other."""
    height, width = prediction.mask_logits.shape[2:]
    padded = (STRIDE * height, STRIDE * width) if padded_size is None else padded_size
    if (-(-padded[0] // STRIDE), -(-padded[1] // STRIDE)) != (height, width):
        raise ValueError(f"a picture of {padded} does not have mask logits of {(height, width)}; padded_size is wrong")
    valid = padded if valid_size is None else valid_size
    if not all(0 < v <= p for v, p in zip(valid, padded, strict=True)) or min(size) < 1:
        raise ValueError(f"cannot cut {valid} out of a padded picture of {padded} and resize it to {size}")
    return padded, valid


def score_bands(
    prediction: Prediction,
    size: Size,
    valid_size: Size | None = None,
    *,
    padded_size: Size | None = None,
    resize: Resized = "scores",
) -> Iterator[tuple[int, Tensor]]:
    """`semantic_scores` in bands of rows from top to bottom: (first row, (B, C, rows, width))."""
    padded, valid = _checked_sizes(prediction, size, valid_size, padded_size)
    if resize not in get_args(Resized):
        raise ValueError(f"resize is {resize!r}; it must be one of {', '.join(get_args(Resized))}")
    batch_size, queries, classes = prediction.class_logits.shape
    logits_BQhw = prediction.mask_logits
    with torch.autocast(logits_BQhw.device.type, enabled=False):
        probability_BCQ = prediction.class_logits.float().softmax(-1)[..., :-1].transpose(1, 2)

        def scores(masks_BQYw: Tensor) -> Tensor:
            return (probability_BCQ @ masks_BQYw.flatten(2)).unflatten(2, masks_BQYw.shape[2:])

        if resize == "logits":
            for first, logits_KYw in _logit_bands(logits_BQhw.flatten(0, 1), size, valid, padded):
                yield first, scores(logits_KYw.sigmoid_().unflatten(0, (batch_size, queries)))
            return
        yield from _resized_bands(
            lambda start, stop: scores(upsampled_rows(logits_BQhw, start, stop, padded)[..., : valid[1]].sigmoid()),
            valid,
            size,
            source_row=batch_size * max(queries * padded[1], classes * valid[1]),
            result_row=batch_size * classes * size[1],
        )


def _logit_bands(logits_Khw: Tensor, size: Size, valid: Size, padded: Size) -> Iterator[tuple[int, Tensor]]:
    """Masks' logits at `size` in bands of rows from top to bottom: (first row, (K, rows, width) float32).

    No band without masks. A band is nobody else's and may be changed.
    """
    masks = len(logits_Khw)
    if not masks:
        return

    def valid_logits(start: int, stop: int) -> Tensor:
        return upsampled_rows(logits_Khw[None], start, stop, padded)[..., : valid[1]]

    with torch.autocast(logits_Khw.device.type, enabled=False):
        for first, logits_1KYw in _resized_bands(
            valid_logits, valid, size, source_row=masks * padded[1], result_row=masks * size[1]
        ):
            yield first, logits_1KYw[0]


def _resized_bands(
    rows_of: Callable[[int, int], Tensor], valid: Size, size: Size, *, source_row: int, result_row: int
) -> Iterator[tuple[int, Tensor]]:
    """Maps of `valid` resized to `size`, in bands of rows from top to bottom: (first row, (..., rows, width)).

    `rows_of(start, stop)` makes those rows of the maps; `source_row` and `result_row` are the floats
    that one row takes before and after resizing.
    """
    rows = max(STRIDE, int(_BAND_ELEMENTS / max(source_row * valid[0] / size[0], result_row)))
    for first in range(0, size[0], rows):
        maps = _resized_rows(rows_of, valid[0], size[0], first, min(first + rows, size[0]))
        if size[1] != valid[1]:
            maps = _resize(maps, (maps.shape[2], size[1]))
        yield first, maps


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
