"""Hugging Face's checkpoints: its network and ours give the same with the same weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from m2f import build_model
from m2f.backbones.swin import SWINS
from m2f.config import BackboneConfig, ModelConfig
from m2f.weights import from_huggingface, load_any, to_huggingface
from tests.helpers.whole_networks import TINY, config, seeded_state

transformers = pytest.importorskip("transformers")


def theirs(of: ModelConfig) -> Any:
    """Hugging Face's network of the same sizes, with random weights."""
    stages = ["stage1", "stage2", "stage3", "stage4"]
    if size := SWINS.get(of.backbone.name):
        backbone = transformers.SwinConfig(
            embed_dim=size.channels,
            depths=list(size.depths),
            num_heads=list(size.heads),
            window_size=size.window,
            out_features=stages,
        )
    else:
        backbone = transformers.ResNetConfig(out_features=stages)
    settings = transformers.Mask2FormerConfig(
        backbone_config=backbone,
        num_labels=of.num_classes,
        num_queries=of.query_decoder.queries,
        decoder_layers=of.query_decoder.layers + 1,
        dim_feedforward=of.query_decoder.feedforward,
        num_attention_heads=of.query_decoder.heads,
        hidden_dim=of.pixel_decoder.channels,
        feature_size=of.pixel_decoder.channels,
        mask_feature_size=of.pixel_decoder.channels,
        encoder_layers=of.pixel_decoder.layers,
        encoder_feedforward_dim=of.pixel_decoder.feedforward,
    )
    return transformers.Mask2FormerForUniversalSegmentation(settings).eval()


def assert_same_outputs(of: ModelConfig, size: int) -> None:
    """Weights go from ours to theirs and from theirs to ours; classes, masks and all earlier layers' are equal.

    In float64: a mask's pixel at 0.5 that rounding moves is attended in one and not in the other.
    """
    network, other = build_model(of).eval().double(), theirs(of).double()
    other.load_state_dict(to_huggingface(seeded_state(of), of), strict=True)
    network.load_state_dict(from_huggingface(other.state_dict(), of), strict=True)
    images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)).double()
    with torch.inference_mode():
        ours, given = network(images), other(pixel_values=images, output_auxiliary_logits=True)
    assert ours.mask_logits.std() > 0.1  # or equality would say nothing
    torch.testing.assert_close(ours.class_logits, given.class_queries_logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.mask_logits, given.masks_queries_logits, atol=1e-4, rtol=0)
    assert len(given.auxiliary_logits) == len(ours.auxiliary)
    for mine, layer in zip(ours.auxiliary, given.auxiliary_logits, strict=True):
        torch.testing.assert_close(mine.mask_logits, layer["masks_queries_logits"], atol=1e-4, rtol=0)


# Sides above 32 times the window: transformers makes windows smaller for maps that are no larger.


def test_a_small_swin_gives_the_same_in_both() -> None:
    assert_same_outputs(TINY, size=160)


# Swin-L with two of its nine decoder layers: the position encodings are of float32 in both, and in a later layer their
# rounding moves a mask's pixel over 0.5.


@pytest.mark.parametrize(
    ("backbone", "queries", "layers", "size"),
    [
        pytest.param("swin-t", 100, 9, 256, marks=pytest.mark.long),
        pytest.param("r50", 100, 9, 256, marks=pytest.mark.long),
        pytest.param("swin-l", 200, 2, 416, marks=pytest.mark.full),
    ],
)
def test_published_networks_give_the_same_in_both(backbone: str, queries: int, layers: int, size: int) -> None:
    row = config(backbone, queries=queries)
    decoder = dataclasses.replace(row.query_decoder, layers=layers)
    assert_same_outputs(dataclasses.replace(row, query_decoder=decoder), size)


@pytest.mark.parametrize(("backbone", "published"), [("swin-tiny", False), ("swin-tiny", True), ("r50", False)])
def test_a_network_comes_back_from_both_sorts_of_names_bit_for_bit(backbone: str, published: bool) -> None:
    row = dataclasses.replace(TINY, backbone=BackboneConfig(name=backbone))
    state = seeded_state(row)
    back = from_huggingface(to_huggingface(state, row, published=published), row)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_a_folder_of_published_names_is_what_transformers_writes_and_reads(tmp_path: Path) -> None:
    state = seeded_state(TINY)
    made = to_huggingface(state, TINY, published=True)
    network = theirs(TINY)
    network.load_state_dict(to_huggingface(state, TINY))
    network.save_pretrained(tmp_path / "theirs")
    assert all(torch.equal(value, state[name]) for name, value in load_any(tmp_path / "theirs", TINY).items())
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_bytes((tmp_path / "theirs" / "config.json").read_bytes())
    save_file(
        {name: value.contiguous() for name, value in made.items()},
        tmp_path / "ours" / "model.safetensors",
        {"format": "pt"},
    )
    loaded = type(network).from_pretrained(tmp_path / "ours").state_dict()
    assert all(
        torch.equal(loaded[name], value)
        for name, value in network.state_dict().items()
        if ".swin.layernorm." not in name
    )


def test_what_does_not_fit_is_listed_by_the_published_names() -> None:
    state = to_huggingface(seeded_state(TINY), TINY)
    del state["model.transformer_module.decoder.layers.0.self_attn.k_proj.bias"]
    state["model.extra"] = torch.zeros(1)
    state["class_predictor.bias"] = torch.zeros(7)
    with pytest.raises(
        ValueError,
        match=r"1 missing \(model.transformer_module.decoder.layers.0.self_attn.k_proj.bias\); "
        r"1 unexpected \(model.extra\); 1 of another shape \(class_predictor.bias is \(7,\), wanted \(4,\)\)",
    ):
        from_huggingface(state, TINY)
