"""Published backbones as this network's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from m2f import build_model
from m2f.weights import backbone_from_torchvision, load_backbone
from m2f.weights.backbones import channel_first, neighbour_first
from pipeline.params.load import load_params

ROW = load_params(Path(__file__).parents[3] / "params.yaml").rows["cityscapes_r50"]


def test_patch_mergings_channels_go_from_the_original_order_to_ours_and_back() -> None:
    # Original: the neighbours (row, column) 00, 10, 01, 11, each with channels 0 and 1. Ours: channel 0 of the
    # neighbours 00, 01, 10, 11, then channel 1 of them.
    original = torch.arange(8.0)
    assert channel_first(original).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]
    assert neighbour_first(channel_first(original)).tolist() == original.tolist()


def test_torchvisions_resnet_becomes_the_backbone() -> None:
    import torchvision

    theirs = torchvision.models.resnet50(weights=None)
    model = build_model(ROW.model)
    load_backbone(model, backbone_from_torchvision(theirs.state_dict()))
    images = torch.randn(1, 3, 64, 64)
    theirs.eval(), model.eval()
    with torch.inference_mode():
        deepest = model.backbone(images)[-1]
        assert torch.equal(theirs.fc(theirs.avgpool(deepest).flatten(1)), theirs(images))


def test_weights_of_another_backbone_are_refused() -> None:
    import torchvision

    with pytest.raises(ValueError, match="belong to another backbone: 0 entries missing, 306 unexpected"):
        load_backbone(
            build_model(ROW.model), backbone_from_torchvision(torchvision.models.resnet101(weights=None).state_dict())
        )
