"""Masked attention of queries to pixels in Triton, forward and backward, without logits or scores of all pixels.

B images, Q queries, M pixels, C channels, K heads of D channels, W = ceil(M / 32) words. A first kernel multiplies the
queries' mask embeddings with the pixels' features and keeps one bit of each product: whether the query may look there.
The attention of all heads reads these bits, and so does its backward pass. Sums and weights are float32, whatever the
values' type; there are no atomics on them, so that every run has the same bits.

PRECISION is that of products: float32 as it is, unless PyTorch may take TF32; and TF32 for the 16-bit types, whose
values it holds exactly.

Triton's interpreter runs the same kernels on a CPU where TRITON_INTERPRET=1 was set before this module is imported.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_QUERIES = 16
"""Of a program: few, so that a hundred queries fill a GPU; tensor cores take no fewer."""
_PIXELS = 64
"""Of a step, and of a program of the keys' gradient."""
_CHANNELS = 32
"""Of a step of the mask's product."""
_WARPS = 8
"""Of a program of the attention: the registers of 4 would not hold its tiles."""


@triton.jit
def _tile(start, row, column, inside_row, inside_column, stride):
    """(rows, columns) float32 of a matrix whose rows are `stride` apart; 0 outside."""
    seen = inside_row[:, None] & inside_column[None, :]
    return tl.load(start + row[:, None] * stride + column[None, :], mask=seen, other=0.0).to(tl.float32)


@triton.jit
def _mask(
    embedding, features, words, seen, Q, C, M, W,
    QUERIES: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    query = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    image = tl.program_id(2).to(tl.int64)
    logits = tl.zeros((QUERIES, PIXELS), tl.float32)
    for first in range(0, C, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        left = _tile(embedding + image * Q * C, query, channel, query < Q, channel < C, C)
        right = _tile(features + image * C * M, channel, pixel, channel < C, pixel < M, M)
        logits += tl.dot(left, right, input_precision=PRECISION)
    allowed = ((tl.sigmoid(logits) >= 0.5) & (pixel < M)[None, :]).to(tl.int32)
    bits = tl.reshape(allowed << (tl.arange(0, PIXELS) % 32)[None, :], (QUERIES, PIXELS // 32, 32))
    word = tl.program_id(0) * (PIXELS // 32) + tl.arange(0, PIXELS // 32)
    to = words + (image * Q + query)[:, None] * W + word[None, :]
    tl.store(to, tl.sum(bits, axis=2), mask=(query < Q)[:, None] & (word < W)[None, :])
    tl.atomic_max(seen + image * Q + query, tl.max(allowed, axis=1), mask=query < Q, sem="relaxed")


@triton.jit
def _allowed(words, row, everything, pixel, inside, M, W):
    """(QUERIES, PIXELS): where queries may look; `everything`: those for which the mask allows nothing."""
    known = inside[:, None] & (pixel < M)[None, :]
    word = tl.load(words + row[:, None] * W + (pixel // 32)[None, :], mask=known, other=0)
    return known & ((((word >> (pixel % 32)[None, :]) & 1) == 1) | everything[:, None])


@triton.jit
def _forward(
    query, key, value, words, seen, output, log_sums, Q, M, W, K, D, scale,
    QUERIES: tl.constexpr, PIXELS: tl.constexpr, D_2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    inside, channel = place < Q, tl.arange(0, D_2)
    row = image * Q + place
    everything = tl.load(seen + row, mask=inside, other=0) == 0
    queries = _tile(query + head * D, row, channel, inside, channel < D, K * D) * scale
    largest = tl.full((QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    mixed = tl.zeros((QUERIES, D_2), tl.float32)
    for first in range(0, M, PIXELS):
        pixel = first + tl.arange(0, PIXELS)
        keys = _tile(key + head * D, image * M + pixel, channel, pixel < M, channel < D, K * D)
        values = _tile(value + head * D, image * M + pixel, channel, pixel < M, channel < D, K * D)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        scores = tl.where(_allowed(words, row, everything, pixel, inside, M, W), scores, -float("inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        finite = tl.where(larger == -float("inf"), 0.0, larger)  # no pixel so far
        power = tl.exp(scores - finite[:, None])
        kept = tl.exp(largest - finite)
        total = total * kept + tl.sum(power, axis=1)
        mixed = mixed * kept[:, None] + tl.dot(power, values, input_precision=PRECISION)
        largest = larger
    total = tl.where(inside, total, 1.0)
    to = output + row[:, None] * (K * D) + head * D + channel[None, :]
    mixed = (mixed / total[:, None]).to(output.dtype.element_ty)
    tl.store(to, mixed, mask=inside[:, None] & (channel < D)[None, :])
    tl.store(log_sums + row * K + head, largest + tl.log(total), mask=inside)


@triton.jit
def _to_queries(
    query, key, value, words, seen, output, log_sums, gradient, to_query, Q, M, W, K, D, scale,
    QUERIES: tl.constexpr, PIXELS: tl.constexpr, D_2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    inside, channel = place < Q, tl.arange(0, D_2)
    row = image * Q + place
    everything = tl.load(seen + row, mask=inside, other=0) == 0
    queries = _tile(query + head * D, row, channel, inside, channel < D, K * D)
    outputs = _tile(output + head * D, row, channel, inside, channel < D, K * D)
    upstream = _tile(gradient + head * D, row, channel, inside, channel < D, K * D)
    log_sum = tl.load(log_sums + row * K + head, mask=inside, other=0.0)
    mean = tl.sum(upstream * outputs, axis=1)
    total = tl.zeros((QUERIES, D_2), tl.float32)
    for first in range(0, M, PIXELS):
        pixel = first + tl.arange(0, PIXELS)
        keys = _tile(key + head * D, image * M + pixel, channel, pixel < M, channel < D, K * D)
        values = _tile(value + head * D, image * M + pixel, channel, pixel < M, channel < D, K * D)
        allowed = _allowed(words, row, everything, pixel, inside, M, W)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        weights = tl.where(allowed, tl.exp(scores - log_sum[:, None]), 0.0)
        agreement = tl.dot(upstream, tl.trans(values), input_precision=PRECISION)
        to_scores = weights * (agreement - mean[:, None]) * scale
        total += tl.dot(to_scores, keys, input_precision=PRECISION)
    to = to_query + row[:, None] * (K * D) + head * D + channel[None, :]
    tl.store(to, total.to(to_query.dtype.element_ty), mask=inside[:, None] & (channel < D)[None, :])


@triton.jit
def _to_keys(
    query, key, value, words, seen, output, log_sums, gradient, to_key, to_value, Q, M, W, K, D, scale,
    QUERIES: tl.constexpr, PIXELS: tl.constexpr, D_2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, D_2)
    keys = _tile(key + head * D, image * M + pixel, channel, pixel < M, channel < D, K * D)
    values = _tile(value + head * D, image * M + pixel, channel, pixel < M, channel < D, K * D)
    keys_total = tl.zeros((PIXELS, D_2), tl.float32)
    values_total = tl.zeros((PIXELS, D_2), tl.float32)
    for first in range(0, Q, QUERIES):
        place = first + tl.arange(0, QUERIES)
        inside = place < Q
        row = image * Q + place
        everything = tl.load(seen + row, mask=inside, other=0) == 0
        queries = _tile(query + head * D, row, channel, inside, channel < D, K * D)
        outputs = _tile(output + head * D, row, channel, inside, channel < D, K * D)
        upstream = _tile(gradient + head * D, row, channel, inside, channel < D, K * D)
        log_sum = tl.load(log_sums + row * K + head, mask=inside, other=0.0)
        allowed = tl.trans(_allowed(words, row, everything, pixel, inside, M, W))
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale
        weights = tl.where(allowed, tl.exp(scores - log_sum[None, :]), 0.0)
        values_total += tl.dot(weights, upstream, input_precision=PRECISION)
        agreement = tl.dot(values, tl.trans(upstream), input_precision=PRECISION)
        mean = tl.sum(upstream * outputs, axis=1)
        to_scores = weights * (agreement - mean[None, :]) * scale
        keys_total += tl.dot(to_scores, queries, input_precision=PRECISION)
    to = (image * M + pixel)[:, None] * (K * D) + head * D + channel[None, :]
    known = (pixel < M)[:, None] & (channel < D)[None, :]
    tl.store(to_key + to, keys_total.to(to_key.dtype.element_ty), mask=known)
    tl.store(to_value + to, values_total.to(to_value.dtype.element_ty), mask=known)


class MaskedAttention(torch.autograd.Function):
    """What every query gets, (B, Q, K * D) of the values' type; words and seen are those of `mask`."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, words: Tensor, seen: Tensor, heads: int) -> Tensor:
        query, key, value = (tensor.contiguous() for tensor in (query, key, value))
        output, log_sums = forward(query, key, value, words, seen, heads)
        ctx.save_for_backward(query, key, value, words, seen, output, log_sums)
        ctx.heads = heads
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *backward(gradient.contiguous(), *ctx.saved_tensors, ctx.heads), None, None, None


@torch.library.custom_op("m2f::mask_words", mutates_args=())
def mask(embedding_BQC: Tensor, features_BCM: Tensor) -> tuple[Tensor, Tensor]:
    """Of two tensors without gaps: bit m % 32 of word m // 32 is 1 where a query may look at pixel m, (B, Q, W) int32;
    and 1 for a query that may look anywhere, else 0, (B, Q) int32."""
    B, Q, C = embedding_BQC.shape
    M = features_BCM.shape[2]
    words, seen = _mask_shapes(embedding_BQC, features_BCM)
    seen.zero_()
    precision = _precision(embedding_BQC, features_BCM)
    _mask[triton.cdiv(M, _PIXELS), triton.cdiv(Q, _QUERIES), B](
        embedding_BQC, features_BCM, words, seen, Q, C, M, words.shape[2],
        QUERIES=_QUERIES, PIXELS=_PIXELS, CHANNELS=_CHANNELS, PRECISION=precision,
    )  # fmt: skip
    return words, seen


@mask.register_fake
def _mask_shapes(embedding_BQC: Tensor, features_BCM: Tensor) -> tuple[Tensor, Tensor]:
    B, Q, _ = embedding_BQC.shape
    words = embedding_BQC.new_empty(B, Q, (features_BCM.shape[2] + 31) // 32, dtype=torch.int32)
    return words, embedding_BQC.new_empty(B, Q, dtype=torch.int32)


@torch.library.custom_op("m2f::masked_attention", mutates_args=())
def forward(
    query: Tensor, key: Tensor, value: Tensor, words: Tensor, seen: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    """The attention of (B, Q, K * D) to (B, M, K * D), all without gaps, and (B, Q, K) logarithms of the weights' sums,
    for the backward pass."""
    output, log_sums = _forward_shapes(query, key, value, words, seen, heads)
    sizes, options = _shape(query, key, words, heads)
    grid = (triton.cdiv(query.shape[1], _QUERIES), heads, len(query))
    _forward[grid](query, key, value, words, seen, output, log_sums, *sizes, **options)
    return output, log_sums


@forward.register_fake
def _forward_shapes(
    query: Tensor, key: Tensor, value: Tensor, words: Tensor, seen: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(*query.shape[:2], heads, dtype=torch.float32)


@torch.library.custom_op("m2f::masked_attention_backward", mutates_args=())
def backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    words: Tensor,
    seen: Tensor,
    output: Tensor,
    log_sums: Tensor,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    given = (query, key, value, words, seen, output, log_sums, gradient)
    to_query, to_key, to_value = (torch.empty_like(tensor) for tensor in (query, key, value))
    sizes, options = _shape(query, key, words, heads)
    _to_queries[triton.cdiv(query.shape[1], _QUERIES), heads, len(query)](*given, to_query, *sizes, **options)
    _to_keys[triton.cdiv(key.shape[1], _PIXELS), heads, len(query)](*given, to_key, to_value, *sizes, **options)
    return to_query, to_key, to_value


@backward.register_fake
def _backward_shapes(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    words: Tensor,
    seen: Tensor,
    output: Tensor,
    log_sums: Tensor,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _shape(query: Tensor, key: Tensor, words: Tensor, heads: int) -> tuple[tuple[int | float, ...], dict[str, Any]]:
    """Sizes that the attention's kernels take, and their constants."""
    D = query.shape[2] // heads
    sizes = (query.shape[1], key.shape[1], words.shape[2], heads, D, D**-0.5)
    constants = {"QUERIES": _QUERIES, "PIXELS": _PIXELS, "D_2": max(16, triton.next_power_of_2(D))}
    return sizes, {**constants, "PRECISION": _precision(query, key), "num_warps": _WARPS}


def _precision(*tensors: Tensor) -> str:
    if torch.backends.cuda.matmul.fp32_precision == "tf32":  # as PyTorch's own products
        return "tf32"
    return "ieee" if any(tensor.dtype == torch.float32 for tensor in tensors) else "tf32"
