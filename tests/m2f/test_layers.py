"""Layers that a CPU computes in a way of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from m2f import layers
from m2f.layers import FeedForward, Linear


def test_a_linear_layer_predicts_what_it_gives_in_training() -> None:
    """2 rows of 3 numbers: weight all 1 and bias (0.5, -1) give the sum plus the bias."""
    layer = Linear(3, 2)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.copy_(torch.tensor([0.5, -1.0]))
    x = torch.tensor([[[1.0, 2.0, 3.0], [0.0, -1.0, 1.0]]])
    assert layer(x).tolist() == [[[6.5, 5.0], [0.5, -1.0]]]
    with torch.inference_mode():
        assert layer(x).tolist() == [[[6.5, 5.0], [0.5, -1.0]]]
        assert x.tolist() == [[[1.0, 2.0, 3.0], [0.0, -1.0, 1.0]]]


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("rows_at_once", [2, 4, 100])
def test_feed_forward_some_rows_at_a_time_is_that_of_all_rows(
    gelu: bool, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 images of 5 rows: parts of 2, of 4 with 2 left over, and all at once."""
    monkeypatch.setattr(layers, "_ROWS_AT_ONCE", rows_at_once)
    torch.manual_seed(0)
    layer = FeedForward(3, 7, gelu=gelu).double()
    plain = nn.Sequential(layer[0], nn.GELU() if gelu else nn.ReLU(), layer[2])
    x, given = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    found = []
    for form in (layer, plain):
        layer.zero_grad()
        mine = x.clone().requires_grad_()
        output: Tensor = form(mine)
        output.backward(given)
        found.append([output.detach(), mine.grad, *(parameter.grad for parameter in layer.parameters())])
    for ours, theirs in zip(*found, strict=True):
        assert ours is not None and theirs is not None
        torch.testing.assert_close(ours, theirs)


def test_feed_forward_of_many_rows_keeps_only_its_input_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_ROWS_AT_ONCE", 4)
    kept: list[int] = []
    layer = FeedForward(3, 50)
    x = torch.zeros(8, 3, requires_grad=True)

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    assert max(kept) == 3 * 50  # the weights; between them were 8 x 50 numbers


def test_feed_forward_obeys_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert FeedForward(4, 8)(torch.zeros(2, 4)).dtype == torch.bfloat16
