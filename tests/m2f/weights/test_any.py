"""Whole checkpoints of any origin, recognised by their names."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from m2f import build_model
from m2f.weights import load_any, load_whole, to_detectron2, to_huggingface, to_reference
from m2f.weights.start import start_network, start_tensors
from tests.helpers.whole_networks import TINY, seeded_state

State = dict[str, Tensor]
STATE = seeded_state(TINY)


def write_mmengine(path: Path, state: State) -> Path:
    torch.save({"meta": {"epoch": 1}, "state_dict": state}, path / "model.pth")
    return path / "model.pth"


def write_pickle(path: Path, state: State) -> Path:
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    (path / "model_final.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
    return path / "model_final.pkl"


def write_safetensors(path: Path, state: State) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path / "model.safetensors")
    return path / "model.safetensors"


def write_shards(path: Path, state: State) -> Path:
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    shards = [{name: t.contiguous() for i, (name, t) in enumerate(state.items()) if i % 2 == part} for part in (0, 1)]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, path / file)
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path / "model.safetensors.index.json"


def write_folder(path: Path, state: State) -> Path:
    return write_shards(path, state).parent


def run_checkpoint(state: State) -> State:
    """As a training of this project saves it, with the optimiser's state beside."""
    return {f"model.{name}": tensor for name, tensor in state.items()} | {
        "optimizer.exp_avg.query_decoder.norm.bias": torch.zeros(64)
    }


@pytest.mark.parametrize(
    ("origin", "made", "write"),
    [
        ("mmsegmentation", to_reference(STATE, TINY), write_mmengine),
        ("mmdetection", to_reference(STATE, TINY, head="panoptic_head."), write_mmengine),
        ("the authors", to_detectron2(STATE, TINY), write_pickle),
        ("Hugging Face", to_huggingface(STATE, TINY), write_safetensors),
        ("Hugging Face", to_huggingface(STATE, TINY, published=True), write_shards),
        ("Hugging Face", to_huggingface(STATE, TINY, published=True), write_folder),
        ("this project", STATE, write_safetensors),
        ("this project", run_checkpoint(STATE), write_safetensors),
    ],
)
def test_the_same_weights_are_read_whatever_file_they_are_in(
    tmp_path: Path, origin: str, made: State, write: Callable[[Path, State], Path]
) -> None:
    path = write(tmp_path, made)
    tensors = load_any(path, TINY)
    assert tensors.keys() == STATE.keys()
    assert all(torch.equal(tensors[name], value) for name, value in STATE.items())
    assert load_whole(path, TINY).origin == origin


def test_another_networks_file_is_one_sentence(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path, {"conv1.weight": torch.zeros(1), "layer1.0.conv1.weight": torch.zeros(1)})
    with pytest.raises(
        ValueError, match=r"model.safetensors is no checkpoint of Mask2Former: its names \(conv1.weight, layer1.0.conv1"
    ):
        load_any(path, TINY)


def test_a_checkpoint_of_another_size_says_whose_names_do_not_fit(tmp_path: Path) -> None:
    path = write_pickle(tmp_path, to_detectron2(STATE, TINY))
    larger = dataclasses.replace(TINY, query_decoder=dataclasses.replace(TINY.query_decoder, queries=20))
    with pytest.raises(
        ValueError,
        match=r"model_final.pkl, a checkpoint of the authors: .* 2 of another shape "
        r"\(sem_seg_head.predictor.query_feat.weight is \(10, 64\), wanted \(20, 64\), ",
    ):
        load_any(path, larger)


@pytest.mark.parametrize(
    ("made", "lacking"),
    [
        (to_reference(STATE, TINY), "query_feat."),
        (to_detectron2(STATE, TINY), "query_feat."),
        (to_huggingface(STATE, TINY), "queries_features."),
        (to_huggingface(STATE, TINY), "self_attn.[qkv]_proj.bias"),
        (STATE, "query_feature."),
    ],
)
def test_what_is_missing_outside_the_class_head_is_listed_if_that_is_wanted(
    tmp_path: Path, made: State, lacking: str
) -> None:
    path = write_safetensors(tmp_path, {name: t for name, t in made.items() if not re.search(lacking, name)})
    with pytest.raises(ValueError, match="does not fit this model: . missing"):
        load_any(path, TINY)
    with pytest.warns(UserWarning, match=r"lacks \d entr.* of this network: query_decoder."):
        tensors = load_any(path, TINY, partial=True)
    missing = {name for name in STATE if name not in tensors}
    pattern = "self_attention.in_proj_bias" if "self_attn" in lacking else "query_decoder.query_feature.weight"
    assert missing and all(name.endswith(pattern) for name in missing)
    assert all(torch.equal(tensors[name], STATE[name]) for name in tensors)


def test_a_missing_class_head_or_another_shape_is_an_error_even_then(tmp_path: Path) -> None:
    headless = {name: tensor for name, tensor in STATE.items() if "class_head" not in name}
    with pytest.raises(ValueError, match=r"2 missing \(query_decoder.class_head.weight"):
        load_any(write_safetensors(tmp_path, headless), TINY, partial=True)
    misshaped = STATE | {"query_decoder.query_feature.weight": torch.zeros(4, 64)}
    with pytest.raises(ValueError, match=r"1 of another shape \(query_decoder.query_feature.weight"):
        load_any(write_safetensors(tmp_path, misshaped), TINY, partial=True)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda bias: bias.index_fill(0, torch.tensor([1]), torch.nan), "class_head.bias has 1 values that are nan or"),
        (lambda bias: bias / 0, "class_head.bias has 4 values that are nan or infinite; take an earlier checkpoint"),
        (lambda bias: bias.double() + 1e300, "class_head.bias has 4 values that are nan or infinite"),
        (lambda bias: bias.int(), r"class_head.bias holds torch.int32, which no weights are; save it in floating"),
        (lambda bias: bias.half(), ""),
        (lambda bias: bias.double(), ""),
    ],
)
def test_weights_that_are_no_finite_numbers_are_refused(
    tmp_path: Path, change: Callable[[Tensor], Tensor], sentence: str
) -> None:
    name = "query_decoder.class_head.bias"
    path = write_safetensors(tmp_path, STATE | {name: change(STATE[name])})
    if not sentence:
        assert torch.allclose(load_any(path, TINY)[name].float(), STATE[name], atol=1e-3)
        return
    with pytest.raises(ValueError, match=sentence):
        load_any(path, TINY)


PYRAMID = dataclasses.replace(TINY, pixel_decoder=dataclasses.replace(TINY.pixel_decoder, name="fapn"))
"""The same network but for its pixel decoder."""


@pytest.mark.parametrize(
    "made",
    [to_reference(STATE, TINY), to_detectron2(STATE, TINY), to_huggingface(STATE, TINY, published=True), STATE],
    ids=["mmsegmentation", "the authors", "Hugging Face", "this project"],
)
def test_of_a_checkpoint_with_another_pixel_decoder_all_else_is_taken_over(tmp_path: Path, made: State) -> None:
    path = write_safetensors(tmp_path, made)
    with pytest.raises(ValueError, match="has another pixel decoder than fapn; `partial` takes over all else"):
        load_any(path, PYRAMID)
    loaded = load_whole(path, PYRAMID, partial=True)
    shared = {name: tensor for name, tensor in STATE.items() if not name.startswith("pixel_decoder.")}
    assert loaded.tensors.keys() == shared.keys()
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in shared.items())
    own = build_model(PYRAMID)
    assert {*loaded.missing} | {*shared} == {*own.state_dict()}
    tensors, said = start_tensors(loaded, "abc")
    assert said == "backbone, query decoder and class head; the pixel decoder, another one, begins anew"
    start_network(own, tensors)
    assert torch.equal(own.state_dict()["query_decoder.class_head.bias"], STATE["query_decoder.class_head.bias"])


def test_a_pyramid_of_this_project_is_read_whole(tmp_path: Path) -> None:
    state = seeded_state(PYRAMID)
    loaded = load_whole(write_safetensors(tmp_path, run_checkpoint(state)), PYRAMID)
    assert loaded.missing == () and loaded.tensors.keys() == state.keys()


def test_a_head_of_other_classes_is_read_where_the_caller_can_use_it(tmp_path: Path) -> None:
    path = write_pickle(tmp_path, to_detectron2(STATE, TINY))
    row = dataclasses.replace(TINY, num_classes=8)
    with pytest.raises(ValueError, match=r"class_embed.weight is \(4, 64\), wanted \(9, 64\)"):
        load_any(path, row)
    loaded = load_whole(path, row, any_classes=True)
    assert loaded.num_classes == 3 and loaded.tensors["query_decoder.class_head.bias"].shape == (4,)


SETTINGS = {
    "model_type": "mask2former",
    "num_queries": 10,
    "decoder_layers": 4,
    "encoder_layers": 1,
    "hidden_dim": 64,
    "id2label": {"0": "a", "1": "b", "2": "c"},
    "backbone_config": {"model_type": "swin", "embed_dim": 32, "depths": [2, 2, 2, 2], "window_size": 4},
}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({}, ""),
        ({"num_queries": 200}, "config.json has num_queries 200, and the row's network has 10"),
        ({"id2label": {"0": "a"}}, "config.json has num_labels 1, and the row's network has 3"),
        ({"decoder_layers": 10}, "config.json has decoder_layers 10, and the row's network has 4"),
        ({"backbone_config": {"model_type": "resnet"}}, "backbone_config.model_type resnet, .* has swin"),
        ({"backbone_config": {"model_type": "swin", "window_size": 7}}, "backbone_config.window_size 7, .* has 4"),
        ({"model_type": "maskformer"}, "config.json describes a maskformer, not a mask2former"),
    ],
)
def test_settings_beside_a_file_of_hugging_faces_must_describe_the_rows_network(
    tmp_path: Path, change: dict[str, object], sentence: str
) -> None:
    path = write_safetensors(tmp_path, to_huggingface(STATE, TINY))
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS | change))
    if not sentence:
        assert load_any(path, TINY).keys() == STATE.keys()
        return
    with pytest.raises(ValueError, match=sentence):
        load_any(path, TINY)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "", 3])
def test_an_index_that_names_files_elsewhere_is_refused(tmp_path: Path, file: object) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(ValueError, match="is no index of a checkpoint's files"):
        load_any(tmp_path, TINY)


def test_a_folder_without_a_checkpoint_says_what_it_should_hold(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds none of model\.safetensors, "):
        load_any(tmp_path, TINY)
