"""Swin: windows, shifts and merging by hand, drop path by picture, and the way from published files."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from m2f import build_model
from m2f.backbones import swin
from m2f.backbones.swin import (
    PatchMerging,
    Swin,
    SwinSize,
    WindowAttention,
    drop_path_scales,
    relative_position_bias,
    scaled,
    shift_mask,
)
from m2f.config import BackboneConfig, ModelConfig, PixelDecoderConfig, QueryDecoderConfig
from m2f.draws import mix, uniform
from m2f.weights import backbone_from_swin, load_backbone

TINY = ModelConfig(
    num_classes=3,
    backbone=BackboneConfig(name="swin-tiny", drop_path_rate=0.5),
    pixel_decoder=PixelDecoderConfig(channels=32, layers=1),
    query_decoder=QueryDecoderConfig(queries=5, layers=1),
)


def test_attention_in_a_window_adds_the_bias_of_the_relative_position() -> None:
    torch.manual_seed(0)
    attention = WindowAttention(4, heads=1, window=2).double()
    attention.relative_bias.data.copy_(torch.arange(9.0)[:, None])
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    query, key, value = attention.qkv(x[0, 0]).chunk(3, dim=-1)
    # pixels (0,0) (0,1) (1,0) (1,1); offset (dy, dx) has index (dy + 1) * 3 + dx + 1
    bias = torch.tensor([[4.0, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]], dtype=torch.float64)
    expected = attention.proj(((query @ key.T) / 2 + bias).softmax(-1) @ value)  # sqrt(4) = 2
    torch.testing.assert_close(attention(x, None)[0, 0], expected)


def test_only_pixels_that_were_neighbours_before_the_shift_see_each_other() -> None:
    # a 4 x 4 map in windows of 2, shifted by 1: the first window lies inside, the last one holds four corners
    mask = shift_mask(4, 4, 2, torch.device("cpu"))
    assert (mask[0] == 0).all()
    assert (mask[3] == torch.full((4, 4), -100.0).fill_diagonal_(0)).all()
    # the second window wrapped around in x only: columns apart, rows together
    assert mask[1].tolist() == [[0, -100, 0, -100], [-100, 0, -100, 0]] * 2


def test_merging_orders_its_four_neighbours_channel_first() -> None:
    merging = PatchMerging(2)
    seen: list[torch.Tensor] = []
    merging.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    # two channels of a 2 x 2 map: 1 2 / 3 4 and 10 20 / 30 40
    x = torch.tensor([[[1.0, 10], [2, 20]], [[3, 30], [4, 40]]])[None]
    merging(x)
    assert seen[0].flatten().tolist() == [1, 2, 3, 4, 10, 20, 30, 40]


def test_an_odd_map_is_merged_with_zeros_beyond_its_edges() -> None:
    merging = PatchMerging(1)
    seen: list[torch.Tensor] = []
    merging.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])[None, :, :, None]
    assert merging(x).shape == (1, 2, 2, 2)
    assert seen[0].tolist() == [[[[1, 2, 4, 5], [3, 0, 6, 0]], [[7, 8, 0, 0], [9, 0, 0, 0]]]]


def test_a_picture_of_any_size_is_filled_with_zeros_to_whole_patches_and_no_further() -> None:
    torch.manual_seed(0)
    backbone = Swin(SwinSize(8, (1, 2, 1, 2), (1, 1, 2, 2), 4), drop_path_rate=0.0).eval()
    images = torch.randn(1, 3, 37, 53)
    with torch.inference_mode():
        maps = backbone(images)
        filled = backbone(F.pad(images, (0, 3, 0, 3)))
        further = backbone(F.pad(images, (0, 11, 0, 27)))
    assert [tuple(m.shape[2:]) for m in maps] == [(10, 14), (5, 7), (3, 4), (2, 2)]
    for one, other in zip(maps, filled, strict=True):
        assert torch.equal(one, other)
    # a window at the edge holds zeros made after the norm here, and normalised patches of zeros there
    assert not torch.allclose(maps[0], further[0][..., :10, :14], atol=1e-4)


@pytest.mark.parametrize("size", [(32, 64), (96, 160)])
def test_maps_smaller_than_a_window_and_odd_ones_are_padded(size: tuple[int, int]) -> None:
    backbone = Swin(SwinSize(8, (1, 2, 1, 2), (1, 1, 2, 2), 7), drop_path_rate=0.0).eval()
    maps = backbone(torch.randn(1, 3, *size))
    assert [tuple(m.shape) for m in maps] == [
        (1, 8 * 2**i, size[0] // 2 ** (i + 2), size[1] // 2 ** (i + 2)) for i in range(4)
    ]


def test_drop_path_leaves_out_whole_pictures_and_keeps_the_mean() -> None:
    ones, rates = torch.ones(4000, 2, 3), torch.tensor([0.0, 0.25, 0.25])
    scales = drop_path_scales(rates, range(4000))
    assert (scales[0] == 1).all()
    out = scaled(ones, scales[1])
    values = out.flatten(1).unique(dim=1).squeeze(1)  # a picture is all kept or all left out
    assert sorted(set(values.tolist())) == pytest.approx([0.0, 1 / 0.75])
    assert values.mean().item() == pytest.approx(1.0, abs=0.04)  # standard error 0.009
    assert torch.equal(drop_path_scales(rates, range(7)), scales[:, :7])
    assert not torch.equal(scales[1], scales[2])


def test_every_branch_keeps_the_draws_that_it_had_when_they_were_made_one_at_a_time() -> None:
    rates, seeds = torch.tensor([0.0, 0.5, 0.3]), [5, 11, 2**40, 7]
    scales = drop_path_scales(rates, seeds)
    for branch, rate in enumerate((0.0, 0.5, 0.3)):
        kept = uniform([mix(seed, 201) for seed in seeds], branch, 1)[:, 0] >= rate
        assert torch.equal(scales[branch], kept.float() / (1 - rate))


def test_all_blocks_and_pictures_share_one_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    drawn = swin.uniform_of
    monkeypatch.setattr(swin, "uniform_of", lambda words, count: (calls.append(words.shape[1]), drawn(words, count))[1])
    backbone = build_model(TINY).backbone.train()
    backbone(torch.randn(3, 3, 64, 64), [1, 2, 3])
    assert calls == [2 * 8 * 3]  # two branches of 8 blocks, 3 pictures
    backbone.eval()(torch.randn(1, 3, 64, 64))
    assert len(calls) == 1


def test_code_compiled_for_some_seeds_serves_others() -> None:
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        compiled.append(1)
        return graph.forward

    torch.manual_seed(0)
    backbone = build_model(TINY).backbone.train()
    images = torch.randn(2, 3, 64, 64)
    maps = torch.compile(backbone.maps, backend=backend, fullgraph=True)
    for seeds in ([1, 2], [3, 4], [5, 6]):
        with torch.no_grad():
            for one, other in zip(maps(images, backbone.scales(seeds)), backbone(images, seeds), strict=True):
                assert torch.equal(one, other)
    assert compiled == [1]


@pytest.mark.parametrize("window", [2, 7, 12])
def test_the_bias_of_sliding_windows_is_the_indexed_one_and_so_is_its_gradient(window: int) -> None:
    y, x = torch.arange(window).repeat_interleave(window), torch.arange(window).repeat(window)
    dy, dx = (p[:, None] - p[None] + window - 1 for p in (y, x))
    tables = [torch.randn((2 * window - 1) ** 2, 3, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    for table in tables:
        table.requires_grad_()
    slid = relative_position_bias(tables[0], window)
    indexed = tables[1][dy * (2 * window - 1) + dx].permute(2, 0, 1)
    assert torch.equal(slid, indexed)
    gradient = torch.linspace(-1, 1, slid.numel()).view_as(slid)
    slid.backward(gradient)
    indexed.backward(gradient)
    torch.testing.assert_close(tables[0].grad, tables[1].grad, rtol=1e-5, atol=1e-5)


def test_a_pictures_drop_path_does_not_depend_on_its_batch() -> None:
    torch.manual_seed(0)
    model = build_model(TINY).train()
    images, seeds = torch.randn(4, 3, 64, 64), [11, 22, 33, 44]
    together = model.backbone(images, seeds)
    for i in range(4):
        alone = model.backbone(images[i : i + 1], seeds[i : i + 1])
        for one, all_ in zip(alone, together, strict=True):
            torch.testing.assert_close(one, all_[i : i + 1], atol=1e-5, rtol=1e-4)
    other = model.backbone(images, [1, 2, 3, 4])
    assert not torch.allclose(other[3], together[3])


def test_training_with_drop_path_needs_seeds_and_evaluating_does_not() -> None:
    model = build_model(TINY)
    images = torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match=r"needs one seed per image: model\(images, seeds=...\)"):
        model(images)
    model.eval()(images)
    build_model(TINY, drop_path_rate=0.0)(images)


def test_a_resnet_with_drop_path_is_refused() -> None:
    config = dataclasses.replace(TINY, backbone=BackboneConfig(name="r50", drop_path_rate=0.3))
    with pytest.raises(ValueError, match="drop_path_rate is 0.3, but r50 is a ResNet, which has no drop path"):
        build_model(config)


# Published files


def reference_names(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A classifier's state dict as mmsegmentation stores it."""
    from m2f.weights import reference_name

    state = {name: value for name, value in model.state_dict().items() if name.startswith("backbone.")}
    state = {reference_name(name): value for name, value in state.items() if ".norms." not in name}
    window = {"backbone.stages.0.blocks.0.attn.w_msa.relative_position_index": torch.zeros(16, 16, dtype=torch.int64)}
    return {**state, **window, "backbone.norm.weight": torch.ones(1)}


def original_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same in the original repository's names and patch merging, whose input is x[::2, ::2], x[1::2, ::2],
    x[::2, 1::2], x[1::2, 1::2] one after the other."""
    renamed = {}
    for name, value in state.items():
        name = name.removeprefix("backbone.").replace("stages.", "layers.").replace("attn.w_msa.", "attn.")
        name = name.replace("ffn.layers.0.0.", "mlp.fc1.").replace("ffn.layers.1.", "mlp.fc2.")
        name = name.replace("patch_embed.projection", "patch_embed.proj")
        if "downsample" in name:  # channel c, row r, column k at 4 c + 2 r + k, wanted at (2 k + r) C + c
            channels = value.shape[-1] // 4
            order = [4 * c + 2 * r + k for k in range(2) for r in range(2) for c in range(channels)]
            value = value[..., order]
        renamed[name] = value
    return {**renamed, "head.weight": torch.ones(2, 2), "layers.0.blocks.1.attn_mask": torch.zeros(1)}


@pytest.mark.parametrize("original", [False, True], ids=["mmsegmentation's names", "the original names"])
def test_a_published_classifier_becomes_the_backbone(original: bool) -> None:
    torch.manual_seed(1)
    theirs = build_model(TINY).eval()
    state = reference_names(theirs)
    torch.manual_seed(2)
    ours = build_model(TINY).eval()
    load_backbone(ours, backbone_from_swin(original_names(state) if original else state))
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        for one, other in zip(ours.backbone(images), theirs.backbone(images), strict=True):
            assert torch.equal(one, other)


def test_tables_of_another_window_are_resized() -> None:
    model = build_model(TINY)
    tensors = backbone_from_swin(reference_names(model))
    name = "backbone.stages.0.0.attention.relative_bias"
    table = torch.randn(13 * 13, 1)  # window 7 instead of 4
    load_backbone(model, {**tensors, name: table})
    expected = F.interpolate(table.T.reshape(1, 1, 13, 13), size=(7, 7), mode="bicubic").reshape(49, 1)
    assert torch.equal(model.state_dict()[name], expected)


def test_a_tensor_of_something_else_is_named() -> None:
    state = reference_names(build_model(TINY))
    with pytest.raises(ValueError, match="absolute_pos_embed is no tensor of a Swin classifier"):
        backbone_from_swin({**state, "absolute_pos_embed": torch.zeros(1)})
