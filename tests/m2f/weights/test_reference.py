"""The reference's names of tensors, there and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from m2f import build_model
from m2f.weights import from_reference, reference_name, to_reference
from pipeline.params.load import load_params

ROW = load_params(Path(__file__).parents[3] / "params.yaml").rows["cityscapes_r50"]


@pytest.fixture(scope="module")
def reference_state() -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        own = build_model(ROW.model).state_dict()
    return {
        reference_name(n): torch.full(t.shape, float(i % 7))
        for i, (n, t) in enumerate(own.items())
        if t.is_floating_point()
    }


def test_a_reference_checkpoint_without_counters_fits_strictly(reference_state: dict[str, torch.Tensor]) -> None:
    converted = from_reference(reference_state, ROW.model)
    model = build_model(ROW.model)
    model.load_state_dict(converted, strict=True)
    assert torch.equal(model.query_decoder.class_head.weight, reference_state["decode_head.cls_embed.weight"])


def test_mmdetections_head_name_is_understood(reference_state: dict[str, torch.Tensor]) -> None:
    renamed = {name.replace("decode_head.", "panoptic_head."): value for name, value in reference_state.items()}
    assert from_reference(renamed, ROW.model).keys() == build_model(ROW.model).state_dict().keys()


def test_what_does_not_fit_is_listed_by_kind(reference_state: dict[str, torch.Tensor]) -> None:
    state = dict(reference_state)
    del state["decode_head.query_feat.weight"]
    state["decode_head.extra"] = torch.zeros(1)
    state["decode_head.cls_embed.bias"] = torch.zeros(3)
    with pytest.raises(
        ValueError,
        match=r"1 missing \(decode_head.query_feat.weight\); 1 unexpected \(decode_head.extra\); "
        r"1 of another shape \(decode_head.cls_embed.bias is \(3,\), wanted \(20,\)\)",
    ):
        from_reference(state, ROW.model)


def test_the_way_back_lists_what_does_not_fit_and_knows_two_heads(reference_state: dict[str, torch.Tensor]) -> None:
    state = from_reference(reference_state, ROW.model)
    with pytest.raises(ValueError, match=r"head is 'sem_seg_head\.'; known: decode_head\., panoptic_head\."):
        to_reference(state, ROW.model, head="sem_seg_head.")
    del state["query_decoder.norm.bias"]
    state["extra"] = torch.zeros(1)
    state["query_decoder.class_head.bias"] = torch.zeros(3)
    with pytest.raises(
        ValueError,
        match=r"1 missing \(query_decoder.norm.bias\); 1 unexpected \(extra\); "
        r"1 of another shape \(query_decoder.class_head.bias is \(3,\), wanted \(20,\)\)",
    ):
        to_reference(state, ROW.model)
