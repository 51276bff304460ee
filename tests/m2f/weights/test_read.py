"""Checkpoints of other projects, read without running code."""

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

from m2f.weights import read_checkpoint
from tests.helpers.shared import shared


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


def test_a_plain_pickle_of_torch_tensors_gives_them(tmp_path: Path) -> None:
    path = tmp_path / "model.pkl"
    state = {"a": torch.arange(3.0), "b": torch.nn.Parameter(torch.ones(2, 2)), "c": torch.tensor(7)}
    path.write_bytes(pickle.dumps({"model": state, "__author__": "third party"}))
    assert {name: value.tolist() for name, value in read_checkpoint(path).items()} == {
        "a": [0, 1, 2],
        "b": [[1, 1], [1, 1]],
        "c": 7,
    }


def test_code_inside_a_pickled_tensors_values_is_not_run(tmp_path: Path) -> None:
    # The values of a tensor in a plain pickle are a torch file of their own, which could smuggle code too.
    import io

    path, target, inner = tmp_path / "model.pkl", tmp_path / "ran", io.BytesIO()
    torch.save(Smuggler(target), inner, _use_new_zipfile_serialization=False)

    class Values:
        def __reduce__(self) -> tuple[object, ...]:
            return torch.storage._load_from_bytes, (inner.getvalue(),)

    path.write_bytes(pickle.dumps({"model": {"a": Values()}}))
    with pytest.raises(ValueError, match="model.pkl is not a complete checkpoint"):
        read_checkpoint(path)
    assert not target.exists()
