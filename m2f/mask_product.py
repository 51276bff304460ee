"""The mask logits of queries, and of those that were matched to a true mask, which alone have a gradient.

B pictures, Q queries, C channels, h x w pixels, M matched queries
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def masks_of(embedding_BQC: Tensor, features_BChw: Tensor) -> Tensor:
    """Mask logits, (B, Q, h, w): the product of every query's embedding with every pixel's features."""
    if embedding_BQC.device.type == "cpu" and not torch.compiler.is_compiling():
        if torch.is_autocast_enabled("cpu"):  # features may be float32 all the same (model.pixel_decoder.float32)
            dtype = torch.get_autocast_dtype("cpu")
            embedding_BQC, features_BChw = embedding_BQC.to(dtype), features_BChw.to(dtype)
        result: Tensor = _MaskProduct.apply(embedding_BQC, features_BChw)
        return result
    return torch.einsum("bqc,bchw->bqhw", embedding_BQC, features_BChw)


def matched_masks(logits_BQhw: Tensor, row_M: Tensor) -> Tensor:
    """The logits of some queries, (M, h, w); row b * Q + q is query q of picture b, and none comes twice."""
    if isinstance(logits_BQhw.grad_fn, _MaskProduct._backward_cls):
        result: Tensor = _Matched.apply(logits_BQhw, row_M)
        return result
    return logits_BQhw.flatten(0, 1).index_select(0, row_M)


class _Matched(torch.autograd.Function):
    """Its gradient has only the rows that are not 0, which `_MaskProduct` knows to use."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = logits.shape
        return logits.flatten(0, 1).index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        image, query = rows // ctx.shape[1], rows % ctx.shape[1]
        indices = torch.stack((image, query))
        return torch.sparse_coo_tensor(indices, gradient, ctx.shape, check_invariants=False), None


class _MaskProduct(torch.autograd.Function):
    """Only matched queries have a gradient, a tenth of them: the others' rows of zeros are left out of its products.

    On a CPU, where looking for them makes nobody wait.
    """

    @staticmethod
    def forward(ctx: Any, embedding: Tensor, features: Tensor) -> Tensor:
        ctx.save_for_backward(embedding, features)
        return torch.einsum("bqc,bchw->bqhw", embedding, features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        embedding, features = ctx.saved_tensors
        image_M, query_M, rows_Mhw = _rows_with_gradient(gradient)
        to_embedding, to_features = torch.zeros_like(embedding), torch.empty_like(features).flatten(2)
        for image, into_CM in enumerate(to_features):
            here = image_M == image
            query, rows_RM = query_M[here], rows_Mhw[here].flatten(1)
            to_embedding[image, query] = rows_RM @ features[image].flatten(1).T
            torch.mm(embedding[image, query].T, rows_RM, out=into_CM)
        return to_embedding, to_features.view_as(features)


def _rows_with_gradient(gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Picture (M,), query (M,) and gradient (M, h, w) of the queries that have one."""
    if gradient.is_sparse:
        gradient = gradient.coalesce()
        return *gradient.indices(), gradient.values()
    image_M, query_M = gradient.flatten(2).any(2).nonzero().T
    return image_M, query_M, gradient[image_M, query_M]
