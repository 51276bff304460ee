"""Numbers of the host are copied to a device once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from m2f import Target, build_model
from m2f.constants import constant
from m2f.kernels import build
from m2f.losses import set_losses
from m2f.model import normalise
from pipeline.params.load import load_params

TINY = load_params(Path(__file__).parents[2] / "params.yaml").rows["shapes_tiny"].model


def test_a_constant_holds_its_numbers_and_is_made_once() -> None:
    like = torch.zeros(2)
    made = constant(((1.5, 2), (3, 4)), like)
    assert made.tolist() == [[1.5, 2.0], [3.0, 4.0]] and made.dtype == torch.float32
    assert constant(((1.5, 2), (3, 4)), like) is made
    assert constant(((1.5, 2), (3, 4)), like, torch.float64) is not made
    assert constant(((1.5, 2), (3, 4)), torch.zeros(2, device="meta")).device.type == "meta"


def test_a_constant_that_inference_made_first_serves_training() -> None:
    with torch.inference_mode():
        divisor = constant((2.0, 4.0), torch.zeros(1))
    x = torch.ones(2, requires_grad=True)
    (x / divisor).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0.5, 0.25]


def test_fake_tensors_neither_get_nor_leave_real_constants() -> None:
    real = constant((7.0, 8.0), torch.zeros(1))
    with FakeTensorMode():
        fake = constant((7.0, 8.0), torch.zeros(1, device="cuda"))
        assert isinstance(fake, FakeTensor) and fake.device.type == "cuda"
        assert isinstance(constant((9.0,), torch.zeros(1)), FakeTensor)
    assert constant((7.0, 8.0), torch.zeros(1)) is real
    assert not isinstance(constant((9.0,), torch.zeros(1)), FakeTensor)


def test_the_second_pass_of_the_network_makes_no_tensor_of_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_wanted", "plain")  # the compiled loops take the levels' sizes, on the host
    model = build_model(TINY)
    images = torch.zeros(1, 3, 64, 96, dtype=torch.uint8)
    made: list[object] = []
    plain = torch.tensor
    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, lambda *a, **k: (made.append(a[0]), plain(*a, **k))[1])
    model(normalise(images))
    made.clear()
    prediction = model(normalise(images))
    assert not made
    target = Target.from_segments(plain([0, 1]), plain([[0, 1]]))
    set_losses(prediction, [target], num_masks=2.0, config=TINY.loss, seeds=[1])
    # on the host, before they are copied: keys of the matcher's and of the losses' draws, mask counts, divisors
    assert len(made) == 4
