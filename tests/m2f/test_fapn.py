from __future__ import annotations

import pytest
import torch

from m2f import build_model
from m2f.config import BackboneConfig, ModelConfig, PixelDecoderConfig, QueryDecoderConfig
from m2f.fapn import Alignment, FeatureAlignedPyramid, Selection

CONFIG = PixelDecoderConfig(name="fapn", channels=32)


def test_maps_are_of_strides_32_16_and_8_and_mask_features_of_stride_4() -> None:
    decoder = FeatureAlignedPyramid(CONFIG, (8, 16, 24, 40))
    features = [torch.randn(2, channels, 96 // stride, 64 // stride)
                for channels, stride in ((8, 4), (16, 8), (24, 16), (40, 32))]  # fmt: skip
    masks, maps = decoder(features)
    assert masks.shape == (2, 32, 24, 16)
    assert [tuple(x.shape) for x in maps] == [(2, 32, 3, 2), (2, 32, 6, 4), (2, 32, 12, 8)]


def test_a_map_that_is_shifted_by_two_pixels_is_brought_back_by_offsets_of_two() -> None:
    """Of 32 channels, ones in column 5 of the coarse map. All offsets point two pixels to the right, so that the centre
    tap of an identity, at half its weight, finds them in column 3."""
    alignment = Alignment(32)
    with torch.no_grad():
        alignment.weight.zero_()
        alignment.weight[range(32), range(32), 1, 1] = 1.0
        # torchvision's order: for every group and tap a row's and a column's offset
        alignment.offsets.bias.view(3, -1)[:2].view(-1, 2)[:, 1] = 2.0  # type: ignore[union-attr]
    coarse = torch.zeros(1, 32, 6, 8)
    coarse[..., 5] = 1.0
    aligned = alignment(torch.zeros(1, 32, 6, 8), coarse)
    expected = torch.zeros(6, 8)
    expected[:, 3] = 0.5  # the weights begin at sigmoid(0)
    torch.testing.assert_close(aligned[0, 7], expected)


def test_selection_doubles_a_channel_of_full_importance_before_it_projects() -> None:
    selection = Selection(2, 32)
    x = torch.ones(1, 2, 2, 2)
    with torch.no_grad():
        selection.importance.weight.copy_(torch.tensor([[100.0, 0.0], [-100.0, 0.0]]).view(2, 2, 1, 1))
        selection.projection.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(16, 1).view(32, 2, 1, 1))
        selection.norm = torch.nn.Identity()  # type: ignore[assignment]
        found = selection(x)[0, :, 0, 0]
    assert found.tolist() == pytest.approx([2.0, 1.0] * 16)  # 1 + 1 * sigmoid(100), 1 + 1 * sigmoid(-100)


def test_every_parameter_learns_and_offsets_do_after_a_step() -> None:
    torch.manual_seed(0)
    model = build_model(
        ModelConfig(
            backbone=BackboneConfig(name="swin-tiny"), pixel_decoder=CONFIG,
            query_decoder=QueryDecoderConfig(queries=4, layers=3), num_classes=2,
        )
    ).train()  # fmt: skip
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        prediction = model(images)
        sum(each.mask_logits.square().mean() for each in (prediction, *prediction.auxiliary)).backward()  # type: ignore[union-attr]
        optimizer.step()
    without = [n for n, p in model.pixel_decoder.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert without == []


def test_checkpointed_steps_give_the_same_bits() -> None:
    torch.manual_seed(0)
    decoder = FeatureAlignedPyramid(CONFIG, (8, 16, 24, 40)).train()
    features = [torch.randn(1, channels, 64 // stride, 64 // stride)
                for channels, stride in ((8, 4), (16, 8), (24, 16), (40, 32))]  # fmt: skip
    found = []
    for decoder.checkpointing in (False, True):
        decoder.zero_grad()
        decoder(features)[0].square().mean().backward()
        found.append([p.grad.clone() for p in decoder.parameters() if p.grad is not None])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_unknown_channels_are_an_error() -> None:
    with pytest.raises(ValueError, match="channels is 48; it must be a multiple of 32"):
        FeatureAlignedPyramid(PixelDecoderConfig(name="fapn", channels=48), (8, 16, 24, 40))


def test_with_the_largest_swin_it_has_about_the_papers_217_million_parameters() -> None:
    """Worked out: the first convolution takes 1536 * 256 * 9; each of three steps selects, aligns and convolves."""
    config = ModelConfig(
        backbone=BackboneConfig(name="swin-l"), pixel_decoder=PixelDecoderConfig(name="fapn"), num_classes=150
    )
    with torch.device("meta"):
        model = build_model(config)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert counts["pixel_decoder"] == 10_678_920
    step = 2 * 256 * 256 + 2 * 256 + 256 * 216 * 9 + 216 + 256 * 256 * 9 + 256 + 256 * 256 * 9 + 2 * 256
    selections = sum(c * c + c * 256 + 2 * 256 for c in (192, 384, 768))
    assert counts["pixel_decoder"] == 1536 * 256 * 9 + 2 * 256 + 3 * step + selections + 256 * 256 * 9 + 256
    assert sum(counts.values()) == 220_377_555  # 1.6 % more than the paper's
