"""Checkpoints of other projects: read without running code, renamed without loss."""

from __future__ import annotations

import os
import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from m2f import build_model
from m2f.weights import (
    backbone_from_torchvision,
    from_reference,
    load_backbone,
    read_checkpoint,
    reference_name,
    to_reference,
)
from pipeline.params.load import load_params
from tests.helpers.shared import shared

ROW = load_params(Path(__file__).parents[2] / "params.yaml").rows["cityscapes_r50"]


class Smuggler:
    """Unpickling this would make a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.target}",)


class EvalSmuggler(Smuggler):
    """The same by evaluating text."""

    def __reduce__(self) -> tuple[object, ...]:
        return eval, (f"__import__('pathlib').Path({str(self.target)!r}).touch()",)


def write_torch_zip(content: object, path: Path) -> None:
    torch.save(content, path)


def write_torch_legacy(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def write_plain_pickle(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


CONTAINERS = [write_torch_zip, write_torch_legacy, write_plain_pickle]
Writer = Callable[[object, Path], None]


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


# Files


@pytest.mark.parametrize("write", [write_torch_zip, write_torch_legacy])
def test_a_torch_file_gives_its_tensors_in_both_formats(tmp_path: Path, write: Writer) -> None:
    path = tmp_path / "model.pth"
    write({"state_dict": {"a": torch.arange(3.0)}, "meta": {"epoch": 1}}, path)
    assert read_checkpoint(path)["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("write", [write_torch_zip, write_torch_legacy])
def test_torchvisions_file_is_an_ordered_dict_with_metadata_and_gives_its_tensors(
    tmp_path: Path, write: Writer
) -> None:
    import torchvision

    path = tmp_path / "resnet18.pth"
    state = torchvision.models.resnet18(weights=None).state_dict()
    assert type(state) is OrderedDict and "_metadata" in vars(state)
    write(state, path)
    tensors = read_checkpoint(path)
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[name], value) for name, value in state.items())


@pytest.mark.parametrize("protocol", [2, 4])  # Python 2's files, and today's default
def test_a_detectron2_pickle_gives_its_arrays_as_tensors(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "model.pkl"
    arrays = {"stem.conv1.weight": np.arange(4, dtype=np.float32).reshape(2, 2), "steps": np.int64([7])}
    content = {"model": arrays, "__author__": "third party", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    tensors = read_checkpoint(path)
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "stem.conv1.weight": [[0, 1], [2, 3]],
        "steps": [7],
    }
    assert [tensor.dtype for tensor in tensors.values()] == [torch.float32, torch.int64]


@pytest.mark.parametrize("write", CONTAINERS)
@pytest.mark.parametrize(
    ("smuggler", "asked"), [(Smuggler, r"posix\.system"), (EvalSmuggler, r"(__builtin__\.|builtins\.)?eval")]
)
def test_a_file_that_smuggles_code_is_refused_and_nothing_runs(
    tmp_path: Path, write: Writer, smuggler: type[Smuggler], asked: str
) -> None:
    path, target = tmp_path / "model.pth", tmp_path / "ran"
    pickle.loads(pickle.dumps(smuggler(target)))
    assert target.exists()  # what a reader that trusts the file would do
    target.unlink()
    weights = np.zeros(1, dtype=np.float32)
    for content in (
        {"state_dict": {"a": weights}, "optimizer": smuggler(target)},
        {"model": {"a": weights, "w": smuggler(target)}},
        smuggler(target),
    ):
        write(content, path)
        with pytest.raises(ValueError, match=rf"model.pth was refused: it asks for {asked}"):
            read_checkpoint(path)
        assert not target.exists()


def test_what_passes_for_an_mmengine_class_is_neither_imported_nor_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # mmengine's names are let through, because real checkpoints hold them; what answers to them does nothing
    path, target = tmp_path / "model.pth", tmp_path / "ran"
    module = types.ModuleType("mmengine.logging")
    exec("import os\ndef run(command): os.system(command)", vars(module))
    monkeypatch.setitem(sys.modules, "mmengine", types.ModuleType("mmengine"))
    monkeypatch.setitem(sys.modules, "mmengine.logging", module)

    class Log:
        def __reduce__(self) -> tuple[object, ...]:
            return module.run, (f"touch {target}",)

    torch.save({"state_dict": {"a": torch.arange(3.0)}, "message_hub": Log()}, path)
    torch.load(path, weights_only=False)
    assert target.exists()  # what a reader that trusts the file would do
    target.unlink()
    assert read_checkpoint(path)["a"].tolist() == [0, 1, 2]
    assert not target.exists()


def test_safetensors_are_read_and_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(3.0)}, path)
    assert read_checkpoint(path)["a"].tolist() == [0, 1, 2]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="model.safetensors is not a complete safetensors file"):
        read_checkpoint(path)


@pytest.mark.parametrize("keep", [0, 10, 200])
def test_a_truncated_torch_file_is_one_sentence(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "model.pth"
    torch.save({"a": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model.pth is not a complete checkpoint"):
        read_checkpoint(path)


def test_a_missing_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere.pth does not exist"):
        read_checkpoint(tmp_path / "nowhere.pth")


def test_a_real_mmengine_file_is_read_though_it_pickles_its_own_classes() -> None:
    tensors = read_checkpoint(shared("reference/mmengine_checkpoint_small_tensors.pth"))
    assert len(tensors) > 400 and all(name.startswith(("backbone.", "decode_head.")) for name in tensors)


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
