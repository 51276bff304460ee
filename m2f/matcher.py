"""Which query answers for which true mask: Hungarian matching (paper, sec. 3.3; DETR, sec. 3.1).

L predictions (decoder layers), B pictures, Q queries, T most masks of a picture, P points, C classes,
M matched pairs of one prediction
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from m2f.config import LossConfig
from m2f.draws import mix
from m2f.points import TrueMasks, sample_logits, uniform_points
from m2f.types import Prediction, Target

_STREAM = 101
"""Tells the matcher's draws from other uses of a picture's seed."""


class Divergence(FloatingPointError):
    """The network no longer gives finite numbers. A retry would give the same."""


@torch.no_grad()
def match(
    predictions: Sequence[Prediction], targets: Sequence[Target], *, config: LossConfig, seeds: Sequence[int]
) -> Tensor:
    """Cheapest one-to-one pairs of queries and true masks, for every prediction and picture.

    Returns (L, M, 3) int64 on the CPU: picture, query, mask; by rising picture and mask. A picture with
    T masks has min(T, Q) pairs, so M is the same for all predictions. Prediction l of a picture is
    compared at points that depend on (`seeds[picture]`, l) alone. Device and host meet once, whatever
    the number of pictures and predictions.

    Raises Divergence when a cost is not finite.
    """
    counts = [len(target) for target in targets]
    queries = predictions[0].class_logits.shape[1]
    if not any(counts):
        return torch.zeros(len(predictions), 0, 3, dtype=torch.int64)
    device = predictions[0].mask_logits.device
    with torch.autocast(device.type, enabled=False):
        true_masks = TrueMasks.of(targets)
        labels_BT = torch.nn.utils.rnn.pad_sequence([target.labels for target in targets], batch_first=True)
        costs = []
        for layer, prediction in enumerate(predictions):
            points_BP2 = uniform_points(
                [mix(seed, _STREAM, layer) for seed in seeds], points=config.points, device=device
            )
            costs.append(
                pair_cost(
                    prediction.class_logits,
                    sample_logits(prediction.mask_logits, points_BP2),
                    labels_BT,
                    true_masks.at_shared_points(points_BP2),
                    config=config,
                )
            )
        costs_LBQT = torch.stack(costs).cpu().numpy()
    pairs = []
    for layer in range(len(predictions)):
        for image, count in enumerate(counts):
            cost_QT = costs_LBQT[layer, image, :, :count]
            if not np.isfinite(cost_QT).all():
                raise Divergence(_explain(predictions, layer, image))
            query, mask = linear_sum_assignment(cost_QT)
            order = np.argsort(mask)
            pairs.append(np.stack((np.full_like(mask, image), query[order], mask[order]), axis=1))
    matched = sum(min(count, queries) for count in counts)
    return torch.from_numpy(np.concatenate(pairs).astype(np.int64)).view(len(predictions), matched, 3)


def pair_cost(
    class_logits_BQC1: Tensor, mask_logits_BQP: Tensor, labels_BT: Tensor, masks_BTP: Tensor, *, config: LossConfig
) -> Tensor:
    """Cost of giving query q the true mask t, (B, Q, T) float32; lower is better.

    class_weight * -(probability of the mask's class) + mask_weight * (binary cross entropy, mean over the
    points) + dice_weight * (1 - (2ab + 1) / (a + b + 1)), `mask_logits` and `masks` (0 to 1) at the same points.
    """
    probability_BQC1 = class_logits_BQC1.float().softmax(-1)
    class_cost = -probability_BQC1.gather(2, labels_BT.unsqueeze(1).expand(-1, probability_BQC1.shape[1], -1))

    logits_BQP = mask_logits_BQP.float()
    masks_BPT = masks_BTP.transpose(1, 2)
    # -t log(s) - (1 - t) log(1 - s) with s = sigmoid(x) is softplus(x) - t x: one product instead of two
    mask_cost = (F.softplus(logits_BQP).sum(2, keepdim=True) - logits_BQP @ masks_BPT) / logits_BQP.shape[2]

    inside_BQP = logits_BQP.sigmoid()
    overlap = inside_BQP @ masks_BPT
    area = inside_BQP.sum(2, keepdim=True) + masks_BTP.sum(2).unsqueeze(1)
    dice_cost = 1 - (2 * overlap + 1) / (area + 1)
    return config.class_weight * class_cost + config.mask_weight * mask_cost + config.dice_weight * dice_cost


def _explain(predictions: Sequence[Prediction], layer: int, image: int) -> str:
    name = "the last prediction" if layer == len(predictions) - 1 else f"auxiliary prediction {layer}"
    parts = {
        "class logits": predictions[layer].class_logits[image],
        "mask logits": predictions[layer].mask_logits[image],
    }
    bad = [f"{part} ({int((~logits.isfinite()).sum())} of {logits.numel()})" for part, logits in parts.items()
           if not logits.isfinite().all()]  # fmt: skip
    what = " and ".join(bad) if bad else "mask logits, too large to add up,"
    return f"the network diverged: {what} of {name}, picture {image} of the batch, are not finite"
