"""Masked attention in Triton: run by Triton's interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from m2f.kernels import gpu
from m2f.layers import Attention
from m2f.query_decoder import allowed_pixels
from tests.helpers.triton_kernels import A100, H100, Interpreter, resources


@pytest.fixture(scope="module")
def kernels() -> Iterator[Interpreter]:
    pytest.importorskip("triton", reason="Triton is not installed")
    kernels = Interpreter("m2f.kernels.triton_masked_attention")
    yield kernels
    kernels.end()


@dataclass
class Inputs:
    embedding: Tensor
    features: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    heads: int

    def attended(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    def plain(self, allowed: Tensor) -> Tensor:
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in self.attended())
        return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed[:, None]).transpose(1, 2).flatten(2)


def inputs(*, B: int, Q: int, M: int, C: int, heads: int, blind: tuple[int, ...] = ()) -> Inputs:
    """`blind`: queries of the first image that may look nowhere."""
    draw = torch.Generator().manual_seed(0)
    embedding, features = torch.randn(B, Q, C, generator=draw), torch.randn(B, C, M, generator=draw)
    features[:, 0] = 9.0
    embedding[:, :, 0] = 0.0
    embedding[0, list(blind), 0] = -20.0
    query, key, value = (torch.randn(B, length, C, generator=draw) for length in (Q, M, M))
    return Inputs(embedding, features, query, key, value, heads)


CASES = {
    "two images, two heads": inputs(B=2, Q=16, M=64, C=32, heads=2, blind=(3,)),
    "odd sizes, more than a tile": inputs(B=1, Q=19, M=101, C=21, heads=3, blind=(0, 18)),
    "one pixel": inputs(B=1, Q=2, M=1, C=4, heads=1, blind=(1,)),
}
EACH_CASE = pytest.mark.parametrize("given", CASES.values(), ids=CASES.keys())


def unpacked(words_BQW: Tensor, pixels: int) -> Tensor:
    bits = words_BQW[..., None] >> torch.arange(32, dtype=torch.int32) & 1
    return bits.flatten(2)[..., :pixels] == 1


def test_bit_31_of_a_word_is_the_32nd_pixel_and_a_probability_of_one_half_allows(kernels: Interpreter) -> None:
    features = torch.full((1, 1, 40), -1.0)
    features[0, 0, [0, 31, 33]] = torch.tensor([2.0, 0.5, 0.0])
    words, seen = kernels.call("mask", torch.ones(1, 1, 1), features)
    assert words.tolist() == [[[1 - 2**31, 2]]] and seen.tolist() == [[1]]


@EACH_CASE
def test_the_mask_is_that_of_the_plain_form(kernels: Interpreter, given: Inputs) -> None:
    words, seen = kernels.call("mask", given.embedding, given.features)
    logits = given.embedding @ given.features
    clear = logits.abs() > 1e-5  # rounding decides the others
    assert clear.float().mean() > 0.99
    assert torch.equal(unpacked(words, logits.shape[2])[clear], (logits > 0)[clear])
    assert torch.equal(seen == 1, (logits > 0).any(-1))


def attended(kernels: Interpreter, given: Inputs) -> tuple[Tensor, ...]:
    words, seen = kernels.call("mask", given.embedding, given.features)
    return words, seen, *kernels.call("forward", *given.attended(), words, seen, given.heads)


def allowed_of(words: Tensor, seen: Tensor, pixels: int) -> Tensor:
    return unpacked(words, pixels) | (seen == 0)[..., None]


def test_what_a_query_gets_by_hand(kernels: Interpreter) -> None:
    value = torch.tensor([1.0, 5.0, 100.0]).view(1, 3, 1)
    key = torch.tensor([0.0, math.log(3), 50.0]).view(1, 3, 1)
    features = torch.tensor([1.0, 1.0, -1.0]).view(1, 1, 3)
    embedding = torch.tensor([1.0, -1.0, 0.0]).view(1, 3, 1)  # the first two pixels, the third, all
    embedding = torch.cat((embedding, torch.tensor([0.0, 0.0, -1.0]).view(1, 3, 1)), dim=2)
    features = torch.cat((features, torch.ones(1, 1, 3)), dim=1)  # the last query: nowhere, which is everywhere
    given = Inputs(embedding, features, torch.ones(1, 3, 1), key, value, heads=1)
    words, seen, output, log_sums = attended(kernels, given)
    assert words.flatten().tolist() == [0b011, 0b100, 0] and seen.flatten().tolist() == [1, 1, 0]
    torch.testing.assert_close(output.flatten(), torch.tensor([(1 + 3 * 5) / 4, 100.0, 100.0]))
    torch.testing.assert_close(log_sums.flatten()[0], torch.tensor(math.log(4)))


@EACH_CASE
def test_the_output_is_that_of_the_plain_form_also_where_nothing_is_allowed(
    kernels: Interpreter, given: Inputs
) -> None:
    words, seen, output, _ = attended(kernels, given)
    torch.testing.assert_close(output, given.plain(allowed_of(words, seen, given.key.shape[1])), atol=2e-6, rtol=0)


@EACH_CASE
def test_gradients_are_those_of_the_plain_form_in_float64(kernels: Interpreter, given: Inputs) -> None:
    words, seen, output, log_sums = attended(kernels, given)
    exact = Inputs(
        given.embedding, given.features, *(x.double().requires_grad_() for x in given.attended()), given.heads
    )
    expected = exact.plain(allowed_of(words, seen, given.key.shape[1]))
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    expected.backward(gradient.double())
    made = kernels.call("backward", gradient, *given.attended(), words, seen, output, log_sums, given.heads)
    for found, tensor in zip(made, exact.attended(), strict=True):
        assert tensor.grad is not None
        torch.testing.assert_close(found.double(), tensor.grad, atol=5e-6, rtol=0)


def test_values_of_16_bits_are_added_in_float32(kernels: Interpreter) -> None:
    given = CASES["two images, two heads"]
    half = Inputs(given.embedding, given.features, *(x.bfloat16() for x in given.attended()), given.heads)
    words, seen, output, _ = attended(kernels, half)
    assert output.dtype == torch.bfloat16
    exact = Inputs(given.embedding, given.features, *(x.float() for x in half.attended()), given.heads)
    expected = exact.plain(allowed_of(words, seen, given.key.shape[1]))
    torch.testing.assert_close(output.float(), expected, atol=1e-6, rtol=2**-7)  # the last bit of bf16


POINTERS: Mapping[str, str] = {
    **dict.fromkeys(
        ("embedding", "features", "query", "key", "value", "output", "log_sums", "gradient", "to_query", "to_key",
         "to_value"), "*fp32"),
    **dict.fromkeys(("words", "seen"), "*i32"),
    "scale": "fp32",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize(("capability", "channels"), [(A100, 32), (A100, 64), (H100, 32)])
@pytest.mark.parametrize("kernel", ["_mask", "_forward", "_to_queries", "_to_keys"])
def test_the_kernels_compile_for_a_gpu_and_its_registers_hold_their_tiles(
    kernel: str, capability: int, channels: int, precision: str
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    module = importlib.import_module("m2f.kernels.triton_masked_attention")
    constants = {"QUERIES": module._QUERIES, "PIXELS": module._PIXELS, "PRECISION": precision}
    constants |= {"CHANNELS": module._CHANNELS} if kernel == "_mask" else {"D_2": channels}
    pointers = dict(POINTERS)
    if precision == "tf32":  # of bf16, but the sums
        pointers |= {name: "*bf16" for name, form in POINTERS.items() if form == "*fp32" and name != "log_sums"}
    warps = 4 if kernel == "_mask" else module._WARPS
    used = resources(getattr(module, kernel), pointers, constants, capability=capability, warps=warps)
    assert used["STACK"] == 0, used


def test_on_a_gpu_an_attention_keeps_one_bit_of_each_product(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(gpu, "_used", True)
    with FakeTensorMode(), torch.device("cuda"):
        attention = Attention(64, heads=2)
        allowed = allowed_pixels(torch.empty(1, 100, 64), torch.empty(1, 64, 4097), heads=2)
        assert isinstance(allowed, gpu.MaskWords)
        assert allowed.words_BQW.shape == (1, 100, 129) and allowed.words_BQW.dtype == torch.int32
        memory = torch.empty(1, 4097, 64)
        found = attention(torch.empty(1, 100, 64), memory, memory, allowed)
    assert found.shape == (1, 100, 64)


def test_heads_wider_than_the_kernels_take_keep_the_plain_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_used", True)
    with FakeTensorMode(), torch.device("cuda"):
        given = torch.empty(1, 5, 512), torch.empty(1, 512, 40)
        assert isinstance(allowed_pixels(*given, heads=4), Tensor)
        assert isinstance(allowed_pixels(*given, heads=8), gpu.MaskWords)


@pytest.mark.gpu
@EACH_CASE
def test_on_a_gpu_that_is_here_outputs_and_gradients_are_those_of_the_plain_form(given: Inputs) -> None:
    attention = Attention(given.query.shape[2], given.heads).cuda()
    embedding, features = given.embedding.cuda(), given.features.cuda()
    made = []
    for form in ("compiled", "plain"):
        gpu.use(form)  # type: ignore[arg-type]
        query, key, value = (x.cuda().requires_grad_() for x in given.attended())
        output = attention(query, key, value, allowed_pixels(embedding, features, heads=given.heads))
        made.append((output, *torch.autograd.grad(output.square().sum(), (query, key, value))))
    gpu.use("plain")
    torch.testing.assert_close(made[0], made[1], atol=1e-4, rtol=1e-4)
