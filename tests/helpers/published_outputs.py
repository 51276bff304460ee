"""A network beside the outputs that the published implementation gave for the same weights and the same picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from m2f import Prediction
from m2f.model import Mask2Former


def assert_published(model: Mask2Former, images: Tensor, values: Mapping[str, Any]) -> Prediction:
    """Hold a network to recorded outputs (tests/reference/forward/); its prediction in float64. Leaves it in float64.

    A pixel whose mask is at the threshold of the attention falls on either side in float32, as the order of additions
    has it, and so as the number of threads: then outputs differ by 1e-2 (ade20k_swin-t on one thread). In float64 the
    same pixels fall as they did in the recorded run, and what is left is the rounding of that run, which was in
    float32. Over the eight recorded rows it is at most 7.6e-6 for class logits and statistics, and 4.3e-6 of the
    largest mask logit.

    In float32 the masks of all layers must decide as in float64, but for such pixels and what follows from them:
    1e-4 of all pixels, ten times the most that was measured (8 of 1.28 million, ade20k_swin-t on one thread).
    """
    with torch.inference_mode():
        single = model(images)
        model, images = model.double(), images.double()
        features = model.backbone(images)
        prediction = model(images)
    for feature, (mean, std, largest) in zip(features, values["feature_stats"], strict=True):
        assert feature.mean().item() == pytest.approx(mean, abs=1e-6)
        assert feature.std().item() == pytest.approx(std, abs=1e-6)
        assert feature.abs().max().item() == pytest.approx(largest, abs=1e-5)
    layers = (*prediction.auxiliary, prediction)
    for each, stats in zip(layers, values["layer_stats"], strict=True):
        own = [each.class_logits.mean(), each.class_logits.std(), each.mask_logits.mean(), each.mask_logits.std()]
        np.testing.assert_allclose([x.item() for x in own], stats, rtol=0, atol=1e-5)
    assert prediction.class_logits.dtype == prediction.mask_logits.dtype == torch.float64
    np.testing.assert_allclose(prediction.class_logits[0].numpy(), values["class_logits"], rtol=0, atol=1e-5)
    masks = values["mask_logits_every_9th_query"]
    np.testing.assert_allclose(
        prediction.mask_logits[0, ::9].numpy(), masks, rtol=0, atol=1e-5 * float(np.abs(masks).max())
    )
    pairs = zip((*single.auxiliary, single), layers, strict=True)
    unequal = [((one.mask_logits >= 0) != (two.mask_logits >= 0)).double().mean().item() for one, two in pairs]
    assert np.mean(unequal) < 1e-4
    return prediction
