"""The authors' checkpoints: the names in their repository, there and back."""

from __future__ import annotations

import pytest
import torch

from m2f.weights import from_detectron2, to_detectron2
from tests.helpers.whole_networks import TINY, authors_shapes, config, seeded_state


@pytest.mark.parametrize(
    ("backbone", "classes", "queries"),
    [("r50", 133, 100), ("r101", 19, 100), ("swin-t", 150, 100), ("swin-l", 80, 200)],
)
def test_every_name_and_shape_of_the_authors_is_one_of_ours(backbone: str, classes: int, queries: int) -> None:
    row = config(backbone, classes=classes, queries=queries)
    shapes = authors_shapes(backbone, classes=classes, queries=queries)
    theirs = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    theirs["criterion.empty_weight"] = torch.empty(classes + 1, device="meta")
    ours = from_detectron2(theirs, row)  # a ValueError lists what is missing, left over or of another shape
    made = {name: tuple(tensor.shape) for name, tensor in to_detectron2(ours, row).items()}
    assert made == {name: shape for name, shape in shapes.items() if not name.endswith("relative_position_index")}


def test_a_network_comes_back_from_the_authors_names_bit_for_bit() -> None:
    state = seeded_state(TINY)
    back = from_detectron2(to_detectron2(state, TINY), TINY)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_patch_merging_is_put_into_our_order_of_neighbours() -> None:
    state = seeded_state(TINY)
    theirs = to_detectron2(state, TINY)["backbone.layers.0.downsample.norm.weight"]
    ours = state["backbone.merges.0.norm.weight"]
    # Theirs: the neighbours 00, 10, 01, 11 of 32 channels each. Ours: each channel's neighbours 00, 01, 10, 11.
    channel = 5
    assert [theirs[k * 32 + channel] for k in range(4)] == [ours[channel * 4 + k] for k in (0, 2, 1, 3)]


def test_names_of_the_authors_first_version_are_understood() -> None:
    state = to_detectron2(seeded_state(TINY), TINY)
    old = {
        name.replace("pixel_decoder.", "").replace("predictor.query_feat.", "predictor.static_query."): value
        for name, value in state.items()
    }
    assert old.keys() != state.keys()
    expected = from_detectron2(state, TINY)
    assert all(torch.equal(value, expected[name]) for name, value in from_detectron2(old, TINY).items())


def test_what_does_not_fit_is_listed_by_the_authors_names() -> None:
    state = to_detectron2(seeded_state(TINY), TINY)
    del state["sem_seg_head.predictor.query_embed.weight"]
    state["backbone.norm4.weight"] = torch.zeros(1)
    state["sem_seg_head.predictor.class_embed.bias"] = torch.zeros(7)
    with pytest.raises(
        ValueError,
        match=r"1 missing \(sem_seg_head.predictor.query_embed.weight\); 1 unexpected \(backbone.norm4.weight\); "
        r"1 of another shape \(sem_seg_head.predictor.class_embed.bias is \(7,\), wanted \(4,\)\)",
    ):
        from_detectron2(state, TINY)
