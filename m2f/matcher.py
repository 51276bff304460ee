"""Which query answers for which true mask: Hungarian matching (paper, sec. 3.3; DETR, sec. 3.1).

L predictions (decoder layers), B pictures, Q queries, T most masks of a picture, P points, C classes,
M matched pairs of one prediction
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from m2f.config import LossConfig
from m2f.draws import mix
from m2f.kernels import cpu
from m2f.points import TrueMasks, sample_logits, uniform_points
from m2f.types import Prediction, Target

_STREAM = 101
"""Tells the matcher's draws from other uses of a picture's seed."""


class Divergence(FloatingPointError):
    """The network no longer gives finite numbers. A retry would give the same."""


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Where operations keep the precision of their inputs. Some devices (meta) know no other."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


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
    with without_autocast(device):
        true_masks = TrueMasks.of(targets)
        labels_BT = torch.nn.utils.rnn.pad_sequence([target.labels for target in targets], batch_first=True)
        keys = [mix(seed, _STREAM, layer) for layer in range(len(predictions)) for seed in seeds]
        points_LBP2 = uniform_points(keys, points=config.points, device=device).unflatten(0, (-1, len(seeds)))
        masks_LBTP = true_masks.at_shared_points(points_LBP2)
        entropy_LBQT, dice_LBQT = _sampled_mask_costs(predictions, points_LBP2, masks_LBTP)
        class_logits_LBQC1 = torch.stack([prediction.class_logits for prediction in predictions])
        costs_LBQT = _weighted(class_logits_LBQC1, labels_BT, entropy_LBQT, dice_LBQT, config)
        costs = costs_LBQT.cpu().numpy()
    pairs = []
    for layer in range(len(predictions)):
        for image, count in enumerate(counts):
            cost_QT = costs[layer, image, :, :count]
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
    return _weighted(class_logits_BQC1, labels_BT, *_mask_costs(mask_logits_BQP.float(), masks_BTP), config)


def _weighted(
    class_logits_BQC1: Tensor, labels_BT: Tensor, entropy_BQT: Tensor, dice_BQT: Tensor, config: LossConfig
) -> Tensor:
    """All may have leading dimensions, but for the labels."""
    probability_BQC1 = class_logits_BQC1.float().softmax(-1)
    class_cost_BQT = -probability_BQC1.gather(-1, labels_BT.unsqueeze(1).expand(entropy_BQT.shape))
    return config.class_weight * class_cost_BQT + config.mask_weight * entropy_BQT + config.dice_weight * dice_BQT


def _mask_costs(logits_BQP: Tensor, masks_BTP: Tensor) -> tuple[Tensor, Tensor]:
    """Mean binary cross entropy and dice cost of every query and mask, twice (..., B, Q, T)."""
    masks_BPT = masks_BTP.transpose(-1, -2)
    # -t log(s) - (1 - t) log(1 - s) with s = sigmoid(x) is softplus(x) - t x: one product instead of two
    entropy = (F.softplus(logits_BQP).sum(-1, keepdim=True) - logits_BQP @ masks_BPT) / logits_BQP.shape[-1]
    inside_BQP = logits_BQP.sigmoid()
    area = inside_BQP.sum(-1, keepdim=True) + masks_BTP.sum(-1).unsqueeze(-2)
    return entropy, 1 - (2 * (inside_BQP @ masks_BPT) + 1) / (area + 1)


def _sampled_mask_costs(
    predictions: Sequence[Prediction], points_LBP2: Tensor, masks_LBTP: Tensor
) -> tuple[Tensor, Tensor]:
    """`_mask_costs` of every prediction's logits at its points, twice (L, B, Q, T)."""
    logits = [prediction.mask_logits.float() for prediction in predictions]
    if points_LBP2.device.type != "cpu":
        sampled_LBQP = torch.stack([sample_logits(*layer) for layer in zip(logits, points_LBP2, strict=True)])
        return _mask_costs(sampled_LBQP, masks_LBTP)
    # one layer after the other stays in the processor's cache
    layers = [_layer_mask_costs(*layer) for layer in zip(logits, points_LBP2, masks_LBTP, strict=True)]
    entropies, dices = zip(*layers, strict=True)
    return torch.stack(entropies), torch.stack(dices)


def _layer_mask_costs(logits_BQhw: Tensor, points_BP2: Tensor, masks_BTP: Tensor) -> tuple[Tensor, Tensor]:
    if cpu.takes(logits_BQhw, points_BP2, masks_BTP):
        return cpu.mask_costs(logits_BQhw, points_BP2, masks_BTP)
    return _mask_costs(sample_logits(logits_BQhw, points_BP2), masks_BTP)


def _explain(predictions: Sequence[Prediction], layer: int, image: int) -> str:
    name = "the last prediction" if layer == len(predictions) - 1 else f"auxiliary prediction {layer}"
    parts = {
        "class logits": predictions[layer].class_logits[image],
        "mask logits": predictions[layer].mask_logits[image],
    }
    bad = [f"{part} ({int((~logits.isfinite()).sum())} of {logits.numel()})" for part, logits in parts.items()
           if not logits.isfinite().all()]  # fmt: skip
    what = " and ".join(bad) if bad else "mask logits, too large to add up,"
    return f"the network diverged: {what} of {name}, image {image} of the batch, are not finite"
