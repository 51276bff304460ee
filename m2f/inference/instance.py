"""From a prediction to instances of a picture's own size (sizes: m2f.inference.bands).

B pictures, Q queries, C classes, h x w mask logits, Y rows of a band, H x W = size asked for, K kept queries,
N instances
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from m2f.constants import to_device
from m2f.inference.bands import Size, checked_sizes, checked_things, logit_bands
from m2f.types import Prediction


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
    padded, valid = checked_sizes(prediction, size, valid_size, padded_size)
    device = prediction.mask_logits.device
    is_thing_C = torch.zeros(classes, dtype=torch.bool)
    is_thing_C[sorted(checked_things(range(classes) if thing_ids is None else thing_ids, classes))] = True
    probability_BQC = prediction.class_logits.float().softmax(-1)[..., :-1]
    # a stable sort, so that ties fall alike on every device
    probability_BN, pair_BN = probability_BQC.flatten(1).sort(descending=True, stable=True)
    # The host waits for the device here and nowhere else: it has to know how many masks there will be.
    pair_BN = pair_BN[:, :max_instances].cpu()
    result = []
    for probability_N, pair_N, mask_logits_Qhw in zip(probability_BN, pair_BN, prediction.mask_logits, strict=True):
        thing_N = is_thing_C[pair_N % classes].nonzero()[:, 0]
        pair_N = pair_N[thing_N]
        query_K, kept_N = (pair_N // classes).unique(return_inverse=True)  # each mask once, whatever it may be
        thing_N, kept_N, label_N = to_device(torch.stack((thing_N, kept_N, pair_N % classes)), device)
        query_K = to_device(query_K, device)

        masks_KHW = torch.empty(len(query_K), *size, dtype=torch.bool, device=device)
        inside_K = torch.zeros(len(query_K), dtype=torch.float64, device=device)
        for first, logits_KYw in logit_bands(mask_logits_Qhw[query_K], size, valid, padded):
            mask_KYw = masks_KHW[:, first : first + logits_KYw.shape[1]]
            torch.gt(logits_KYw, 0, out=mask_KYw)
            inside_K += logits_KYw.sigmoid_().mul_(mask_KYw).sum((1, 2), dtype=torch.float64)
        mean_K = (inside_K / masks_KHW.sum((1, 2)).clamp_(min=1)).float()

        scores_N, order_N = (probability_N[thing_N] * mean_K[kept_N]).sort(descending=True, stable=True)
        kept_N = kept_N[order_N]
        result.append(
            Instances(
                scores=scores_N,
                labels=label_N[order_N],
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
