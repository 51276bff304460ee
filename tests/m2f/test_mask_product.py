"""The mask logits of matched queries and their gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from m2f.mask_product import masks_of, matched_masks


def gradients(select, embedding: Tensor, features: Tensor, rows: Tensor) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """Of a loss that weighs the pixels of some rows, and of the same loss a second time."""
    inputs = embedding.clone().requires_grad_(), features.clone().requires_grad_()
    logits = masks_of(*inputs)
    found = select(logits, rows)
    loss = (found * torch.linspace(-1, 1, found.numel()).view_as(found)).sum()
    (loss + select(logits, rows[:1]).sum()).backward()
    return [loss.detach(), *(x.grad for x in inputs if x.grad is not None)]


def test_matched_masks_have_the_values_and_gradients_of_those_rows() -> None:
    """3 queries of 2 images: queries 2 and 0 of the first (rows 2, 0) and 1 of the second (row 4)."""
    generator = torch.Generator().manual_seed(0)
    embedding, features = torch.randn(2, 3, 4, generator=generator), torch.randn(2, 4, 5, 6, generator=generator)
    rows = torch.tensor([2, 4, 0])
    found = gradients(matched_masks, embedding, features, rows)
    wanted = gradients(lambda logits, row: logits.flatten(0, 1)[row], embedding, features, rows)
    assert len(found) == 3
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert found[1][1, 0].eq(0).all() and found[1][1, 1].ne(0).all()  # nobody asked for the second image's first query


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_in_float32_under_autocast_have_the_gradient_of_pytorchs_product(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(2, 3, 4, generator=generator).to(dtype)
    features = torch.randn(2, 4, 5, 6, generator=generator)
    found = []
    for product in (masks_of, lambda a, b: torch.einsum("bqc,bchw->bqhw", a, b)):
        inputs = embedding.clone().requires_grad_(), features.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            logits = product(*inputs)
        matched_masks(logits, torch.tensor([2, 4])).float().square().sum().backward()
        found.append([logits.detach(), *(x.grad for x in inputs)])
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs)


def test_a_picture_without_matched_queries_has_no_gradient() -> None:
    embedding = torch.ones(2, 1, 3, requires_grad=True)
    features = torch.ones(2, 3, 2, 2, requires_grad=True)
    matched_masks(masks_of(embedding, features), torch.tensor([1])).sum().backward()
    assert embedding.grad is not None and features.grad is not None
    # the second image: 4 pixels of features 1 for the embedding, embedding 1 for each pixel
    assert embedding.grad.tolist() == [[[0.0] * 3], [[4.0] * 3]]
    assert features.grad[0].eq(0).all() and features.grad[1].eq(1).all()


def test_logits_from_elsewhere_get_a_gradient_of_all_rows() -> None:
    logits = torch.zeros(1, 3, 2, 2, requires_grad=True)
    matched_masks(logits, torch.tensor([2])).sum().backward()
    assert logits.grad is not None and not logits.grad.is_sparse
    assert logits.grad[0, 2].eq(1).all() and logits.grad[0, :2].eq(0).all()
