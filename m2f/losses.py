"""The training loss of a set of queries: classes, masks and dice, for every decoder layer (paper, sec. 3.3).

L predictions (decoder layers), B pictures, Q queries, T masks of a picture, P points, C classes,
M matched pairs of one prediction, R = L * M
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from m2f.config import LossConfig
from m2f.constants import to_device
from m2f.draws import mix
from m2f.kernels import cpu
from m2f.mask_product import matched_masks
from m2f.matcher import Divergence, match, without_autocast
from m2f.points import TrueMasks, sample_logits, uncertain_points
from m2f.types import Prediction, Target

__all__ = ["Divergence", "GroupTotals", "group_totals", "set_losses"]

_STREAM = 102
"""Tells the losses' draws from other uses of a picture's seed."""


class GroupTotals(NamedTuple):
    """What the losses of a group of pictures are divided by."""

    class_weight: float
    """Sum of the class loss's weights over the group's queries."""
    masks: int
    """Matched masks, a picture without any counted as one: the group's part in the divisor of the mask losses."""


def group_totals(
    mask_counts: Sequence[int], *, queries: int, config: LossConfig, labels: Sequence[Tensor] = ()
) -> GroupTotals:
    """Totals of a group from the number of true masks of each of its pictures, before any matching.

    A picture with T masks has min(T, queries) matched queries of weight 1, or of their classes' `class_weights`; the
    others weigh `no_object_weight`. Source of the count of at least one: mmdetection 3.3, MaskSamplingResult.
    `labels`: the classes of each picture's masks, (T,) int64 on the host, which `class_weights` need. Which of more
    masks than queries are matched is not known yet: their mean weight counts.
    """
    matched = [min(count, queries) for count in mask_counts]
    unmatched = len(matched) * queries - sum(matched)
    weight: float = sum(matched)
    if config.class_weights:
        means = [sum(config.class_weights[c] for c in of.tolist()) / max(len(of), 1) for of in labels]
        weight = sum(count * mean for count, mean in zip(matched, means, strict=True))
    return GroupTotals(weight + config.no_object_weight * unmatched, sum(max(count, 1) for count in matched))


def set_losses(
    prediction: Prediction,
    targets: Sequence[Target],
    *,
    num_masks: float | Tensor,
    config: LossConfig,
    seeds: Sequence[int],
    class_weight_totals: Sequence[float] | None = None,
) -> dict[str, Tensor]:
    """Weighted losses of one worker's pictures; their sum is the training loss.

    `targets`: one per picture, of the padded pictures' size or any other that shows the same picture.
    `num_masks`: divisor of the mask and dice losses, at least 1; may stay on the device. The recipe takes the mean
    mask count per group.
    `seeds`: one int per picture; with the layer and the mask's index they decide all sampled points.
    `class_weight_totals`: one per picture, the class loss's divisor for the picture's group
    (`group_totals`); None: these pictures are one group.

    Returns scalars, float32 also under autocast: "loss_class", "loss_mask" and "loss_dice" of the last
    prediction, "aux0.loss_class", ... of the auxiliary ones. The loss of several groups is the sum over groups.
    The class loss is a weighted mean over queries, mask and dice losses are sums over masks of means over points.

    Raises Divergence when a matching cost is not finite.
    """
    predictions = (*prediction.auxiliary, prediction)
    layers, last = len(predictions), len(predictions) - 1
    batch_size, queries, _ = prediction.class_logits.shape
    if not len(targets) == len(seeds) == batch_size:
        raise ValueError(f"{batch_size} images need as many targets and seeds, got {len(targets)} and {len(seeds)}")
    if class_weight_totals is None:
        labels = [target.labels for target in targets] if config.class_weights else ()
        totals = group_totals([len(target) for target in targets], queries=queries, config=config, labels=labels)
        class_weight_totals = [totals.class_weight] * batch_size
    elif len(class_weight_totals) != batch_size:
        raise ValueError(f"{batch_size} images need as many class_weight_totals, got {len(class_weight_totals)}")
    device = prediction.mask_logits.device

    pairs_LM3 = match(predictions, targets, config=config, seeds=seeds)
    with without_autocast(device):
        loss_class_L = _class_losses(predictions, targets, pairs_LM3, class_weight_totals, config)
        loss_mask_L, loss_dice_L = _mask_losses(predictions, targets, pairs_LM3, seeds, config)
        weighted_L3 = torch.stack(
            (
                config.class_weight * loss_class_L,
                config.mask_weight / num_masks * loss_mask_L,
                config.dice_weight / num_masks * loss_dice_L,
            ),
            dim=1,
        )
    losses = {}
    for layer in (last, *range(last)):
        prefix = "" if layer == last else f"aux{layer}."
        for name, loss in zip(("loss_class", "loss_mask", "loss_dice"), weighted_L3[layer].unbind(), strict=True):
            losses[prefix + name] = loss
    assert len(losses) == 3 * layers
    return losses


def _class_losses(
    predictions: Sequence[Prediction],
    targets: Sequence[Target],
    pairs_LM3: Tensor,
    class_weight_totals: Sequence[float],
    config: LossConfig,
) -> Tensor:
    """Weighted cross entropy over all queries, each picture's share divided by its group's total, (L,)."""
    logits_LBQC1 = torch.stack([p.class_logits.float() for p in predictions])
    device, no_object = logits_LBQC1.device, logits_LBQC1.shape[-1] - 1
    layers, batch_size, queries = logits_LBQC1.shape[:3]

    counts = torch.tensor([len(target) for target in targets])
    image_LM, query_LM, mask_LM = pairs_LM3.unbind(-1)
    layer_L1 = torch.arange(layers)[:, None]
    slot_LM = (layer_L1 * batch_size + image_LM) * queries + query_LM
    label_LM = (counts.cumsum(0) - counts)[image_LM] + mask_LM
    slots_LM, labels_LM = to_device(torch.stack((slot_LM, label_LM)), device)
    classes = torch.full((layers * batch_size * queries,), no_object, device=device)
    classes[slots_LM] = torch.cat([target.labels for target in targets])[labels_LM]

    weight_C1 = torch.ones(no_object + 1, device=device)
    if config.class_weights:
        weight_C1[:no_object] = to_device(torch.tensor(config.class_weights), device)
    weight_C1[no_object] = config.no_object_weight
    loss = F.cross_entropy(logits_LBQC1.flatten(0, 2), classes, weight=weight_C1, reduction="none")
    totals_B = to_device(torch.tensor(class_weight_totals, dtype=torch.float32), device)
    return (loss.view(layers, batch_size, queries).sum(2) / totals_B).sum(1)


def _mask_losses(
    predictions: Sequence[Prediction],
    targets: Sequence[Target],
    pairs_LM3: Tensor,
    seeds: Sequence[int],
    config: LossConfig,
) -> tuple[Tensor, Tensor]:
    """Binary cross entropy (mean over points) and dice, each summed over the matched masks, (L,) and (L,)."""
    layers, matched, _ = pairs_LM3.shape
    queries = predictions[0].mask_logits.shape[1]
    device = predictions[0].mask_logits.device
    image_LM, query_LM, mask_LM = pairs_LM3.unbind(-1)
    row_LM, image_R, mask_R = (
        x.view_as(image_LM) for x in to_device(torch.stack((image_LM * queries + query_LM, image_LM, mask_LM)), device)
    )
    logits_Rhw = torch.cat(
        [matched_masks(p.mask_logits, row_M) for p, row_M in zip(predictions, row_LM, strict=True)]
    ).float()

    mask_seeds_R = [
        mix(seeds[image], _STREAM, layer, mask)
        for layer, pairs_M3 in enumerate(pairs_LM3.tolist())
        for image, _, mask in pairs_M3
    ]
    points_RP2 = uncertain_points(
        logits_Rhw.detach(),
        mask_seeds_R,
        points=config.points,
        oversample=config.oversample,
        importance=config.importance,
    )
    true_RP = TrueMasks.of(targets).at_own_points(image_R.flatten(), mask_R.flatten(), points_RP2)
    if cpu.takes(logits_Rhw, points_RP2, true_RP):
        loss_mask_R, loss_dice_R = cpu.mask_losses(logits_Rhw, points_RP2, true_RP)
    else:
        loss_mask_R, loss_dice_R = point_losses(sample_logits(logits_Rhw.unsqueeze(1), points_RP2).squeeze(1), true_RP)
    return loss_mask_R.view(layers, matched).sum(1), loss_dice_R.view(layers, matched).sum(1)


def point_losses(logits_RP: Tensor, true_RP: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross entropy (mean over points) and dice of R pairs of masks at the same points, (R,) and (R,)."""
    loss_mask_R = F.binary_cross_entropy_with_logits(logits_RP, true_RP, reduction="none").mean(1)
    inside_RP = logits_RP.sigmoid()
    overlap_R = (inside_RP * true_RP).sum(1)
    return loss_mask_R, 1 - (2 * overlap_R + 1) / (inside_RP.sum(1) + true_RP.sum(1) + 1)
