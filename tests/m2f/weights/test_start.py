"""Training that starts from a whole network: what is kept, what begins anew, and what does not learn."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from m2f import build_model
from m2f.config import BackboneConfig
from m2f.weights import Loaded
from m2f.weights.start import freeze, start_network, start_tensors
from tests.helpers.whole_networks import TINY, seeded_state

HEAD = "query_decoder.class_head.bias"
STATE = seeded_state(TINY)
LOADED = Loaded(origin="the authors", tensors=STATE, missing=(), num_classes=3)
CLASSES = ("road", "car", "tree")


def test_a_network_of_the_same_classes_is_kept_whole() -> None:
    tensors, said = start_tensors(LOADED, CLASSES)
    model = build_model(TINY)
    start_network(model, tensors)
    assert all(torch.equal(value, STATE[name]) for name, value in model.state_dict().items())
    assert said == "backbone, pixel decoder, query decoder and class head"


def test_a_class_head_begins_anew_and_all_else_is_kept() -> None:
    tensors, said = start_tensors(LOADED, ("a", "b", "c", "d", "e"), rule="anew")
    model = build_model(dataclasses.replace(TINY, num_classes=5))
    before = model.state_dict()[HEAD].clone()
    start_network(model, tensors)
    after = model.state_dict()
    assert torch.equal(after[HEAD], before)
    assert all(torch.equal(after[name], value) for name, value in STATE.items() if "class_head" not in name)
    assert said.endswith("query decoder; the class head begins anew, with 5 classes instead of 3")


def test_classes_of_the_same_name_are_taken_over_wherever_they_stand() -> None:
    tensors, said = start_tensors(LOADED, ("sky", "tree", "road"), known=CLASSES, rule="match")
    model = build_model(TINY)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start_network(model, tensors)
    for name in (HEAD, "query_decoder.class_head.weight"):
        after = model.state_dict()[name]
        assert torch.equal(after[0], before[name][0])  # sky begins anew
        assert torch.equal(after[1], STATE[name][2]) and torch.equal(after[2], STATE[name][0])
        assert torch.equal(after[3], STATE[name][3])  # no object
    assert said.endswith(", no-object and 2 of 3 classes (tree, road); other classes begin anew")
    _, said = start_tensors(LOADED, ("tree", "road"), known=CLASSES, rule="match")  # nothing begins anew
    assert said.endswith(", no-object and 2 of 2 classes (tree, road)")


def test_class_names_that_are_not_as_many_as_the_files_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="the checkpoint has 3 classes, but class_names lists 2"):
        start_tensors(LOADED, CLASSES, known=("road", "car"), rule="match")


def test_what_a_partial_file_lacks_begins_anew_and_is_listed() -> None:
    lacking = "query_decoder.query_feature.weight"
    partial = {name: value for name, value in STATE.items() if name != lacking}
    tensors, said = start_tensors(dataclasses.replace(LOADED, tensors=partial, missing=(lacking,)), CLASSES)
    model = build_model(TINY)
    before = model.state_dict()[lacking].clone()
    start_network(model, tensors)
    assert torch.equal(model.state_dict()[lacking], before)
    assert said.endswith(f"; entries that it lacks begin anew: {lacking}")


def test_a_file_that_does_not_fit_is_refused() -> None:
    other = build_model(dataclasses.replace(TINY, num_classes=9))
    message = "belong to another network: 2 entries do not fit, first query_decoder.class_head.weight"
    with pytest.raises(ValueError, match=re.escape(message)):
        start_network(other, STATE)


def test_frozen_parts_have_no_gradients_and_their_batch_norm_stays_as_it_is() -> None:
    config = dataclasses.replace(TINY, backbone=BackboneConfig(name="r50", frozen_norm=False))
    model = build_model(config)
    model.train()
    freeze(model, ("backbone", "pixel_decoder"))
    learning = {name.partition(".")[0] for name, each in model.named_parameters() if each.requires_grad}
    assert learning == {"query_decoder"}
    before = {name: value.clone() for name, value in model.backbone.named_buffers()}
    model.backbone(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.named_buffers())
    assert model.training and not model.backbone.bn1.training


def test_without_parts_nothing_is_frozen() -> None:
    model = build_model(TINY)
    freeze(model, ())
    assert all(each.requires_grad for each in model.parameters())
