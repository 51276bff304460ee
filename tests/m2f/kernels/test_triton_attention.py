"""Deformable attention in Triton: run by Triton's interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from m2f.deformable_attention import attend, plain_attend
from m2f.kernels import gpu
from tests.helpers.triton_kernels import A100, H100, Interpreter, resources

Sizes = tuple[tuple[int, int], ...]


@pytest.fixture(scope="module")
def kernels() -> Iterator[Interpreter]:
    pytest.importorskip("triton", reason="Triton is not installed")
    # few programs, which take their time in the interpreter
    kernels = Interpreter("m2f.kernels.triton_attention", _ROWS=64, _GATHERED_ROWS=256)
    yield kernels
    kernels.end()


@dataclass
class Inputs:
    sizes: Sizes
    value: Tensor
    positions: Tensor
    offsets: Tensor
    logits: Tensor

    def all(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.value, self.positions, self.offsets, self.logits

    def plain(self, dtype: torch.dtype = torch.float32) -> Tensor:
        value, *others = (tensor.to(dtype) for tensor in self.all())
        return plain_attend(value, self.sizes, *others)

    def flat(self) -> tuple[int, ...]:
        return tuple(side for size in self.sizes for side in size)


def inputs(sizes: Sizes, *, B: int, N: int, K: int, D: int, P: int, far: float = 2.0) -> Inputs:
    draw = torch.Generator().manual_seed(0)
    S, L = sum(h * w for h, w in sizes), len(sizes)
    return Inputs(
        sizes,
        torch.randn(B, S, K, D, generator=draw),
        torch.rand(N, 2, generator=draw),
        far * torch.randn(B, N, K, L, P, 2, generator=draw),
        torch.randn(B, N, K, L, P, generator=draw),
    )


CASES = {
    "three levels, two images": inputs(((2, 3), (3, 5), (4, 8)), B=2, N=47, K=1, D=32, P=4),
    "odd sizes": inputs(((1, 1), (7, 2)), B=1, N=33, K=3, D=5, P=3),
    "most points outside": inputs(((3, 4),), B=1, N=20, K=2, D=4, P=1, far=20.0),
}
EACH_CASE = pytest.mark.parametrize("given", CASES.values(), ids=CASES.keys())


def forward(kernels: Interpreter, given: Inputs) -> Tensor:
    return kernels.call("forward", given.value, given.flat(), *given.all()[1:])


def backward(kernels: Interpreter, given: Inputs, gradient: Tensor, *, ordered: bool) -> tuple[Tensor, Tensor, Tensor]:
    return kernels.call("backward", gradient, given.value, given.flat(), *given.all()[1:], ordered)


def test_a_sample_between_pixels_is_their_mean_and_outside_counts_as_zero(kernels: Interpreter) -> None:
    given = Inputs(
        ((2, 2),),
        torch.tensor([1.0, 2.0, 3.0, 6.0]).view(1, 4, 1, 1),
        torch.zeros(1, 2),
        torch.tensor([1.0, 1.0, 9.0, 9.0]).view(1, 1, 1, 1, 2, 2),  # the middle of the map, and far from it
        torch.full((1, 1, 1, 1, 2), 7.0),  # each of half the weight
    )
    assert forward(kernels, given).item() == 1.5


@EACH_CASE
def test_the_output_is_that_of_the_plain_form(kernels: Interpreter, given: Inputs) -> None:
    torch.testing.assert_close(forward(kernels, given), given.plain(), atol=2e-6, rtol=0)


@EACH_CASE
@pytest.mark.parametrize("ordered", [False, True], ids=["atomics", "gathered"])
def test_gradients_are_those_of_the_plain_form_in_float64(kernels: Interpreter, given: Inputs, ordered: bool) -> None:
    exact = Inputs(given.sizes, *(tensor.double().requires_grad_() for tensor in given.all()))
    output = exact.plain(torch.float64)
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    output.backward(gradient.double())
    made = backward(kernels, given, gradient, ordered=ordered)
    for found, tensor in zip(made, (exact.value, exact.offsets, exact.logits), strict=True):
        assert tensor.grad is not None
        torch.testing.assert_close(found.double(), tensor.grad, atol=2e-5, rtol=0)


def test_a_level_without_pixels_adds_nothing(kernels: Interpreter) -> None:
    given = CASES["odd sizes"]
    offsets, logits = (torch.cat((t[:, :, :, :1], t), dim=3) for t in (given.offsets, given.logits))
    logits[:, :, :, 0] = -1e9  # of no weight
    wider = Inputs(((0, 4), *given.sizes), given.value, given.positions, offsets, logits)
    torch.testing.assert_close(forward(kernels, wider), forward(kernels, given), atol=1e-6, rtol=0)
    logits[:, :, :, 0] = 1e9  # of all weight
    assert forward(kernels, wider).abs().max() == 0


def test_an_offset_that_is_not_finite_touches_its_own_query_only(kernels: Interpreter) -> None:
    given = CASES["odd sizes"]
    offsets = given.offsets.clone()
    offsets[0, 3, 1, 0, 0] = torch.tensor([float("nan"), float("inf")])
    found = forward(kernels, Inputs(given.sizes, given.value, given.positions, offsets, given.logits))
    differs = (found != forward(kernels, given)).view(33, 3, 5).any(-1)
    assert found.isfinite().all() and differs.nonzero().tolist() in ([[3, 1]], [])


def test_values_of_16_bits_are_added_in_float32(kernels: Interpreter) -> None:
    given = CASES["odd sizes"]
    half = Inputs(given.sizes, given.value.bfloat16(), *given.all()[1:])
    found = forward(kernels, half)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(
        found, half.plain().bfloat16(), atol=0, rtol=2**-7
    )  # the last bit: the interpreter cuts off
    made = backward(kernels, half, found, ordered=False)
    assert [tensor.dtype for tensor in made] == [torch.bfloat16, torch.float32, torch.float32]


def test_the_gathered_gradient_has_the_same_bits_again(kernels: Interpreter) -> None:
    given = CASES["three levels, two images"]
    gradient = torch.randn(2, 47, 32, generator=torch.Generator().manual_seed(1))
    one, other = (backward(kernels, given, gradient, ordered=True) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


# On a GPU that is not here

POINTERS = {
    **dict.fromkeys(("positions", "offsets", "logits", "to_value", "to_offsets", "to_logits", "shares"), "*fp32"),
    **dict.fromkeys(("targets", "order", "starts"), "*i64"),
    "sizes": "*i32",
}
RECIPE = {"L": 3, "P": 4, "POINTS_2": 16, "D_2": 32}
"""Constants of all published rows."""


@pytest.mark.slow
@pytest.mark.parametrize("values", ["fp32", "bf16"])
@pytest.mark.parametrize("capability", [A100, H100])
def test_kernels_compile_for_a_gpu_and_its_registers_hold_their_tiles(values: str, capability: int) -> None:
    triton_attention = pytest.importorskip("m2f.kernels.triton_attention", reason="Triton is not installed")
    pointers = {**POINTERS, "value": f"*{values}", "output": f"*{values}", "gradient": f"*{values}"}
    recipe = {**RECIPE, "ROWS": triton_attention._ROWS}
    gathering = {"CONTRIBUTIONS": 48, "D_2": 32, "ROWS": triton_attention._GATHERED_ROWS}
    for kernel, constants in (
        (triton_attention._forward, recipe),
        (triton_attention._backward, {**recipe, "GATHERED": 0}),
        (triton_attention._backward, {**recipe, "GATHERED": 1}),
        (triton_attention._gather, gathering),
    ):
        used = resources(kernel, pointers, constants, capability=capability)
        assert used["STACK"] == 0 and used["REG"] <= 168, (kernel.__name__, used)  # of 65,536: 12 warps at least


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(gpu, "_used", True)


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_attention_is_one_operation_each_way(dtype: torch.dtype) -> None:
    given = CASES["three levels, two images"]
    called = list[str]()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), named=None):  # type: ignore[no-untyped-def]
            called.append(str(function))
            return function(*arguments, **(named or {}))

    triton_attention = importlib.import_module("m2f.kernels.triton_attention")
    with torch.no_grad(), FakeTensorMode(), Watch():
        value, positions, offsets, logits = (torch.empty(t.shape, device="cuda") for t in given.all())
        value = value.to(dtype)
        output = attend(value, given.sizes, positions, offsets.to(dtype), logits.to(dtype))
        assert output.shape == (2, 47, 32) and output.dtype == dtype and output.device.type == "cuda"
        made = triton_attention.backward(output, value, given.flat(), positions, offsets, logits, False)
        assert [tensor.shape for tensor in made] == [value.shape, offsets.shape, logits.shape]
    assert [name for name in called if name.startswith("m2f.")] == [
        "m2f.deformable_attention.default",
        "m2f.deformable_attention_backward.default",
    ]
    assert not [name for name in called if "grid_sampler" in name]


def test_without_a_gpu_auto_is_the_plain_form_and_compiled_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu._missing.cache_clear()
    assert gpu.use("auto") == "plain" and gpu.use("auto") == "plain" and gpu.use("plain") == "plain"
    assert capsys.readouterr().err == "there is no GPU: PyTorch's own operations are used, which are slower\n"
    with pytest.raises(ValueError, match="kernels is compiled, but there is no GPU; set it to plain, or to auto"):
        gpu.use("compiled")
    gpu._missing.cache_clear()


@pytest.mark.gpu
def test_on_a_gpu_that_is_here_output_and_gradients_are_those_of_the_plain_form() -> None:
    assert gpu.use("compiled") == "compiled"
    for given in CASES.values():
        made = []
        for form in ("compiled", "plain"):
            gpu.use(form)  # type: ignore[arg-type]
            value, positions, offsets, logits = (tensor.cuda().requires_grad_() for tensor in given.all())
            output = attend(value, given.sizes, positions.detach(), offsets, logits)
            output.square().sum().backward()
            made.append((output, value.grad, offsets.grad, logits.grad))
        for found, expected in zip(*made, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    gpu.use("plain")
