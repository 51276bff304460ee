from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from m2f import build_model
from m2f.config import BackboneConfig, ModelConfig, PixelDecoderConfig, QueryDecoderConfig
from m2f.deformable_attention import plain_attend
from m2f.kernels import gpu
from m2f.kernels.build import use
from m2f.model import Mask2Former
from pipeline.compute.compiling import compile_training, keep_compiled_code

TRACED = "aot_eager"
"""PyTorch's own operations in the graph that torch.compile finds: quick to make, and without a C compiler."""

PIXEL_DECODER = PixelDecoderConfig(channels=32, layers=1, heads=2, points=2, feedforward=32)
QUERY_DECODER = QueryDecoderConfig(queries=4, layers=1, heads=2, feedforward=32)
BACKBONES = {
    "Swin with drop path": BackboneConfig(name="swin-tiny", drop_path_rate=0.5),
    "ResNet": BackboneConfig(name="tiny"),
}


@pytest.fixture(autouse=True)
def plain_kernels() -> Iterator[None]:
    use("plain")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    use("auto")


def network(backbone: BackboneConfig) -> Mask2Former:
    torch.manual_seed(0)
    return build_model(
        ModelConfig(backbone=backbone, pixel_decoder=PIXEL_DECODER, query_decoder=QUERY_DECODER, num_classes=2)
    )


def masks_and_gradient(model: Mask2Former, images: Tensor, seeds: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    masks = model(images, seeds=seeds).mask_logits
    masks.square().mean().backward()
    return masks.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def graphs() -> int:
    count: int = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return count


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "with checkpointed blocks"])
@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES.keys())
def test_a_compiled_training_is_one_graph_for_all_seeds_and_gives_the_same(
    backbone: BackboneConfig, checkpointing: bool
) -> None:
    compiled = network(backbone)
    if checkpointing:
        compiled.checkpoint_activations()
    plain = copy.deepcopy(compiled)
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    compile_training(compiled, torch.zeros_like(images), (0, 0), backend=TRACED)
    first = graphs()
    for seeds in ((1, 2), (3, 4), (5, 6)):
        found, expected = (masks_and_gradient(model, images, seeds) for model in (compiled, plain))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    compiled.eval(), plain.eval()
    other_size = torch.zeros(1, 3, 32, 64)
    assert torch.equal(compiled(other_size).mask_logits, plain(other_size).mask_logits)
    assert graphs() == first > 0  # none was made anew, and evaluation makes none


@pytest.mark.slow
def test_compiling_leaves_weights_and_running_statistics_as_they_are() -> None:
    model = network(BackboneConfig(name="r50"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compile_training(model, torch.rand(2, 3, 32, 32), (0, 0), backend="eager")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    model(torch.rand(2, 3, 32, 32), seeds=(0, 0))
    assert not torch.equal(before["backbone.bn1.running_mean"], model.backbone.get_buffer("bn1.running_mean"))


def test_a_network_that_cannot_be_compiled_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""))  # is changed
    monkeypatch.setenv("TRITON_CACHE_DIR", os.environ.get("TRITON_CACHE_DIR", ""))
    model = network(BACKBONES["ResNet"])
    reasons = ["there is no C compiler", "there is none again"]

    def fails(*_: Any) -> None:
        raise OSError(reasons.pop(0))

    with pytest.raises(RuntimeError, match=r"^torch\.compile fails here \(.*there is no C compiler"):
        compile_training(model, torch.zeros(1, 3, 64, 64), (0,), backend=fails)  # type: ignore[arg-type]
    assert model(torch.zeros(1, 3, 64, 64), seeds=(0,)).mask_logits.shape == (1, 4, 16, 16)


@pytest.mark.slow
def test_the_attention_of_a_gpu_is_one_operation_of_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel cannot run here: on a CPU the operation is given the plain form."""
    kernels = pytest.importorskip("m2f.kernels.triton_attention", reason="Triton is not installed")
    calls = []

    def plain(value: Tensor, sizes: list[int], *others: Tensor) -> Tensor:
        calls.append("forward")
        return plain_attend(value, tuple(zip(sizes[::2], sizes[1::2], strict=True)), *others).contiguous()

    def gradients(gradient: Tensor, value: Tensor, sizes: list[int], *others: Any) -> tuple[Tensor, ...]:
        calls.append("backward")
        positions, offsets, logits, _ = others
        shapes = tuple(zip(sizes[::2], sizes[1::2], strict=True))

        def of_plain() -> tuple[Tensor, ...]:
            inputs = [tensor.detach().requires_grad_() for tensor in (value, offsets, logits)]
            output = plain_attend(inputs[0], shapes, positions, *inputs[1:])
            return tuple(each.contiguous() for each in torch.autograd.grad(output, inputs, gradient))

        with ThreadPoolExecutor(1) as thread:  # in the operation's own thread there is no autograd
            return thread.submit(of_plain).result()

    model = network(BACKBONES["ResNet"])
    images, seeds = torch.rand(1, 3, 64, 96), (0,)
    monkeypatch.setattr(gpu, "takes", lambda value: True)
    monkeypatch.setattr(gpu, "takes_masks", lambda *_: False)  # the masked attention is not compiled
    for operation, function in ((kernels.forward, plain), (kernels.backward, gradients)):
        monkeypatch.setattr(operation, "_backend_fns", {**operation._backend_fns})
        operation.register_kernel("cpu")(function)
    expected = masks_and_gradient(model, images, seeds)
    compile_training(model, torch.zeros_like(images), seeds, backend=TRACED)
    calls.clear()
    torch.testing.assert_close(masks_and_gradient(model, images, seeds), expected, atol=1e-5, rtol=1e-4)
    assert calls == ["forward", "backward"]


@pytest.fixture
def no_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(variable, "")  # so that what is set now is undone
        monkeypatch.delenv(variable)


@pytest.mark.usefixtures("no_caches")
def test_compiled_code_is_kept_in_the_storage_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M2F_STORAGE", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    keep_compiled_code()
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert folder.parent.parent == tmp_path / "compiled" and folder.name == "inductor"
    assert folder.parent.name.endswith(f"-torch-{torch.__version__.replace('+', '-')}-{os.getuid()}")
    assert folder.parent.stat().st_mode & 0o777 == 0o700
    assert os.environ["TRITON_CACHE_DIR"] == "elsewhere"


@pytest.mark.usefixtures("no_caches")
def test_no_code_is_kept_where_others_write_or_nobody_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M2F_STORAGE", str(tmp_path / "root"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    keep_compiled_code()
    Path(os.environ.pop("TORCHINDUCTOR_CACHE_DIR")).parent.chmod(0o770)
    os.environ.pop("TRITON_CACHE_DIR")
    keep_compiled_code()
    (of_the_user,) = (tmp_path / "cache").iterdir()
    assert Path(os.environ.pop("TORCHINDUCTOR_CACHE_DIR")).parent == of_the_user
    assert Path(os.environ.pop("TRITON_CACHE_DIR")).parent == of_the_user

    of_the_user.rmdir()
    of_the_user.touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    keep_compiled_code()
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parent.name.startswith("m2f-compiled-")


def test_code_that_was_kept_and_is_damaged_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kept"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "kept"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        if os.environ["TORCHINDUCTOR_CACHE_DIR"] == os.environ["TRITON_CACHE_DIR"]:
            raise OSError("Ran out of input")
        return graph.forward

    model = network(BACKBONES["ResNet"])
    compile_training(model, torch.zeros(1, 3, 64, 64), (0,), backend=backend)  # type: ignore[arg-type]
    assert model._compiled is not None
    assert f"without the code kept in {tmp_path / 'kept'} and" in capsys.readouterr().err
