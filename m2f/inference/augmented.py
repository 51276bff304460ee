"""Semantic scores averaged over views of a picture: several sizes, each as it is and mirrored ("ms+flip").

The original authors' test-time augmentation (Mask2Former, test_time_augmentation.py): the mean of the views' plain
scores, at the size asked for. mmsegmentation's own (seg_tta.py) is deliberately not followed: it scales the picture by
fixed ratios and averages a softmax of the scores, which are no logits. The authors resize with antialiasing (PIL);
here views are made as for a single scale, without.

C classes, h x w picture, H x W = size asked for
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2f.constants import to_device
from m2f.inference.bands import Size
from m2f.inference.semantic import score_bands
from m2f.model import normalise, pad
from m2f.types import Prediction


@torch.no_grad()
def semantic_scores_ms_flip(
    model: nn.Module,
    image: Tensor,
    *,
    short_sides: Sequence[int],
    long_side_max: int,
    pad_multiple: int = 32,
    size: Size | None = None,
) -> Tensor:
    """Mean over all views of `semantic_scores`, (C, *size) float32 on the model's device.

    `model`: a network in evaluation mode, called with one view at a time. `image`: the original RGB picture,
    (3, h, w) uint8. For every one of `short_sides` it is scaled to that short side, or to less where the long
    side would exceed `long_side_max` (pixels), keeping its aspect: bilinear and rounded to uint8. It is shown
    as it is and mirrored, padded right and bottom to a multiple of `pad_multiple` (1: not at all).
    `size`: (height, width) of the scores, default the picture's own. Besides the sum of the scores only one
    view's prediction exists at a time.

    ValueError when there is no short side, a number is below 1 or the picture is not as said.
    """
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3 or not image.numel():
        raise ValueError(f"the image is {tuple(image.shape)} {image.dtype}; it must be (3, height, width) torch.uint8")
    if not short_sides:
        raise ValueError("short_sides is empty; name at least one size to look at the image in")
    size = (image.shape[1], image.shape[2]) if size is None else size
    if min(*short_sides, long_side_max, pad_multiple, *size) < 1:
        raise ValueError(
            f"short_sides {list(short_sides)}, long_side_max {long_side_max}, pad_multiple {pad_multiple} "
            f"and size {tuple(size)} must all be at least 1"
        )
    device = next((p.device for p in model.parameters()), image.device)
    image = image if image.device == device else to_device(image, device)
    total: Tensor | None = None
    for short_side in short_sides:
        view = _scaled(image, short_side, long_side_max)
        for mirrored in (False, True):
            total = _with_scores_of(model, view, total, size, mirrored=mirrored, pad_multiple=pad_multiple)
    assert total is not None
    return total.div_(2 * len(short_sides))


def _scaled(image: Tensor, short_side: int, long_side_max: int) -> Tensor:
    """The picture, (3, h, w) uint8, with that short side; sides are rounded half up, as at a single scale."""
    sides = image.shape[1:]
    scale = min(short_side / min(sides), long_side_max / max(sides))
    height, width = (max(1, int(side * scale + 0.5)) for side in sides)
    scaled = F.interpolate(image[None].float(), size=(height, width), mode="bilinear", align_corners=False)
    return scaled[0].round_().to(torch.uint8)


def _with_scores_of(
    model: nn.Module, view: Tensor, total: Tensor | None, size: Size, *, mirrored: bool, pad_multiple: int
) -> Tensor:
    """`total`, (C, *size), with the scores of a view, (3, h, w), added in place; None is nothing yet."""
    network_input = pad(normalise((view.flip(-1) if mirrored else view)[None]), pad_multiple)
    prediction: Prediction = model(network_input, auxiliary=False)
    if total is None:
        total = torch.zeros(prediction.class_logits.shape[2] - 1, *size, device=prediction.mask_logits.device)
    valid_size = (view.shape[1], view.shape[2])
    padded_size = (network_input.shape[2], network_input.shape[3])
    for first, scores_1CYw in score_bands(prediction, size, valid_size, padded_size=padded_size):
        scores_CYw = scores_1CYw[0].flip(-1) if mirrored else scores_1CYw[0]
        total[:, first : first + scores_CYw.shape[1]] += scores_CYw
    return total
