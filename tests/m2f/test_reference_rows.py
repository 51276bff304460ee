"""All 24 rows with a recorded reference model, built of the published recipes: names, counts, rates and outputs."""

from __future__ import annotations

import functools
import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from m2f import build_model
from m2f.backbones.swin import relative_position_bias
from m2f.config import BackboneConfig, ModelConfig, OptimizerConfig, QueryDecoderConfig
from m2f.model import Mask2Former, normalise, pad
from m2f.optim import parameter_groups
from m2f.weights import from_reference, reference_name, to_reference
from tests.helpers.published_outputs import assert_published
from tests.reference.seeded_weights import seeded_state_dict

REFERENCE = Path(__file__).parent.parent / "reference"
NAMES = {
    path.stem: {name: (tuple(shape), dtype) for name, (shape, dtype) in json.loads(path.read_text()).items()}
    for path in sorted((REFERENCE / "names").glob("*.json"))
}
"""Every state-dict entry of the reference's models: row -> name -> (shape, dtype)."""
COCO = [row for row in NAMES if row.startswith("coco_")]


def head(row: str) -> str:
    """mmdetection's and mmsegmentation's name for everything but the backbone."""
    return "panoptic_head." if row in COCO else "decode_head."


def recipe(row: str) -> ModelConfig:
    """The row's network as its published recipe describes it, not as params.yaml does."""
    name = row.split("_")[-1].removesuffix("-in22k")
    coco = row in COCO
    rows = json.loads((REFERENCE / ("rows_coco.json" if coco else "rows.json")).read_text())
    facts = rows["rows"][row]
    backbone = (
        BackboneConfig(name=name, drop_path_rate=0.3)
        if name.startswith("swin")
        else BackboneConfig(name=name, frozen_norm=True, batch_statistics=not coco)
    )
    return ModelConfig(
        num_classes=facts["things"] + facts["stuff"] if coco else facts["num_classes"],
        backbone=backbone,
        query_decoder=QueryDecoderConfig(queries=facts["queries"] if coco else rows["common"]["head"]["queries"]),
    )


@functools.cache
def weightless(row: str) -> Mask2Former:
    """The row's network without memory for its weights."""
    with torch.device("meta"):
        return build_model(recipe(row))


def seeded_model(row: str) -> Mask2Former:
    model = build_model(recipe(row))
    model.load_state_dict(from_reference(seeded_state_dict(row, REFERENCE), recipe(row)))
    return model


def entries(state: dict[str, Tensor]) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (tuple(tensor.shape), str(tensor.dtype)[6:]) for name, tensor in state.items()}


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


# Names


def test_there_are_24_rows_11_of_them_on_coco() -> None:
    assert (len(NAMES), len(COCO)) == (24, 11)


@pytest.fixture(scope="module")
def noise() -> Tensor:
    """More numbers than the largest entry and the largest offset together need."""
    return torch.randn(10_000_000, generator=torch.Generator().manual_seed(0))


def filled(meta: dict[str, Tensor], noise: Tensor) -> dict[str, Tensor]:
    """Different numbers for every entry, all of them views of `noise`, so that the largest network costs nothing."""
    state = {}
    for name, tensor in meta.items():
        draw = zlib.crc32(name.encode()) % 50_021
        if tensor.is_floating_point():
            state[name] = noise[draw : draw + tensor.numel()].view(tensor.shape).to(tensor.dtype)
        else:
            state[name] = torch.full(tensor.shape, draw, dtype=tensor.dtype)
    return state


@pytest.mark.parametrize("row", NAMES)
def test_the_way_to_the_reference_and_back_keeps_every_entry(row: str, noise: Tensor) -> None:
    state = filled(weightless(row).state_dict(), noise)
    theirs = to_reference(state, recipe(row), head=head(row))
    assert entries(theirs) == NAMES[row]
    back = from_reference(theirs, recipe(row))
    assert_same_bits(back, state)
    assert_same_bits(to_reference(back, recipe(row), head=head(row)), theirs)


@pytest.mark.parametrize(("row", "window"), [("coco_panoptic_swin-t", 7), ("coco_panoptic_swin-b", 12)])
def test_swins_index_buffers_are_those_the_network_uses(row: str, window: int, noise: Tensor) -> None:
    theirs = to_reference(filled(weightless(row).state_dict(), noise), recipe(row))
    stored = [value for name, value in theirs.items() if name.endswith(".relative_position_index")]
    places = torch.arange((2 * window - 1) ** 2)  # of the bias that every pair of pixels takes
    used = relative_position_bias(places[:, None], window)[0]
    assert all(torch.equal(index, used) for index in stored)
    assert len({index.data_ptr() for index in stored}) == len(stored)  # safetensors refuses shared memory


@pytest.mark.parametrize("row", NAMES)
def test_a_row_has_as_many_parameters_as_the_reference(row: str) -> None:
    statistics = ("running_mean", "running_var")
    expected = sum(
        math.prod(shape)
        for name, (shape, dtype) in NAMES[row].items()
        if dtype.startswith("float") and not name.endswith(statistics)
    )
    assert sum(parameter.numel() for parameter in weightless(row).parameters()) == expected


# Training


@pytest.mark.parametrize("row", COCO)
def test_every_parameter_has_the_published_learning_rate_weight_decay_and_freezing(row: str) -> None:
    expected = json.loads((REFERENCE / "optim" / f"{row}.json").read_text())
    model = weightless(row)
    names = {id(parameter): reference_name(name, head=head(row)) for name, parameter in model.named_parameters()}
    own = {
        names[id(parameter)]: [group["lr"], group["weight_decay"]]
        for group in parameter_groups(model, OptimizerConfig())
        for parameter in group["params"]
    }
    assert own == {name: pytest.approx(setting) for name, setting in expected["groups"].items()}
    frozen = {names[id(parameter)] for parameter in model.parameters() if not parameter.requires_grad}
    assert frozen == set(expected["frozen"])


def test_coco_resnets_train_on_the_running_statistics_and_leave_them_alone() -> None:
    model = build_model(recipe("coco_panoptic_r50")).train()
    norm = model.backbone.layer1[0].bn1
    with torch.no_grad():
        norm.running_mean.fill_(3.0)
        norm.running_var.fill_(4.0)
        norm.weight.fill_(2.0)
        norm.bias.fill_(1.0)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    # (x - 3) / sqrt(4) * 2 + 1 = x - 2, whatever else is in the batch
    x = torch.randn(2, 64, 3, 3) + 10
    torch.testing.assert_close(norm(x), x - 2, atol=1e-4, rtol=1e-5)
    model.backbone(torch.randn(2, 3, 64, 64))
    assert_same_bits(norm.state_dict(), before)
    # the semantic rows normalise the batch itself: mean 0 and variance 1, times 2 plus 1
    semantic = build_model(recipe("ade20k_r50")).train().backbone.layer1[0].bn1
    semantic.load_state_dict(before)
    assert semantic(x).mean().item() == pytest.approx(1.0, abs=1e-4)
    assert semantic.num_batches_tracked == before["num_batches_tracked"] + 1


# Outputs


@pytest.mark.parametrize("row", ["coco_panoptic_r50", "coco_instance_swin-t"])
def test_the_forward_pass_equals_the_published_implementation(row: str) -> None:
    values = np.load(REFERENCE / "forward" / f"{row}.npz")
    image_rgb = values["image_bgr"][..., ::-1].copy()
    images = pad(normalise(torch.from_numpy(image_rgb).movedim(-1, -3)[None]))
    assert_published(seeded_model(row).eval(), images, values)
