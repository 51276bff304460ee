from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

from pipeline.compute.precision import LossScale, allow_tf32, in_precision

Choice = Literal["off", "convolutions", "all"]


def switches() -> dict[str, Any]:
    """What readers of PyTorch's older switches and of its newer ones find; reading raises where they disagree."""
    backends: Any = torch.backends
    return {
        "older": (backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32),
        "newer": (backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision),
        "recurrent": backends.cudnn.rnn.fp32_precision,
        "global": torch.get_float32_matmul_precision(),
    }


@pytest.mark.parametrize(
    ("choice", "convolutions", "products"),
    [("off", False, False), ("convolutions", True, False), ("all", True, True)],
)
@pytest.mark.parametrize("before", ["off", "convolutions", "all"])
def test_readers_of_the_older_and_of_the_newer_switches_find_the_same(
    choice: Choice, convolutions: bool, products: bool, before: Choice
) -> None:
    allow_tf32(before)
    allow_tf32(choice)
    words = {False: "ieee", True: "tf32"}
    assert switches() == {
        "older": (convolutions, products),
        "newer": (words[convolutions], words[products]),
        "recurrent": words[convolutions],
        "global": "high" if products else "highest",
    }


def test_switches_that_somebody_has_set_apart_agree_again() -> None:
    backends: Any = torch.backends
    backends.cudnn.conv.fp32_precision = "ieee"
    backends.cuda.matmul.fp32_precision = "tf32"
    with pytest.raises(RuntimeError):
        switches()
    allow_tf32("convolutions")
    assert switches()["older"] == (True, False)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("float32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_a_product_is_of_the_precisions_type(precision: str, dtype: torch.dtype) -> None:
    with in_precision(precision, torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_a_step_that_overflows_is_left_out_and_halves_the_scale() -> None:
    scale = LossScale(torch.device("cpu"))
    assert scale.scaled(torch.tensor(2.0)).item() == 2 * 65536
    norm, to_check, left_out = scale.norm(torch.tensor(3.0 * 65536))
    assert (norm.item(), to_check.item(), left_out.item()) == (3.0, 3.0, 0.0)
    assert scale.factor(torch.tensor(0.5)).item() == 0.5 / 65536
    norm, to_check, left_out = scale.norm(torch.tensor(float("inf")))
    assert (norm.item(), to_check.item(), left_out.item()) == (0.0, 0.0, 1.0)  # a lower scale may help
    scale.update(left_out)
    assert scale.state() == [32768.0, 0.0]


def test_the_scale_doubles_after_2000_good_steps_and_an_overflow_begins_the_count_anew() -> None:
    scale, good, bad = LossScale(torch.device("cpu")), torch.tensor(0.0), torch.tensor(1.0)
    scale.load([4.0, 1998.0])
    scale.update(good)
    assert scale.state() == [4.0, 1999.0]
    scale.update(good)
    assert scale.state() == [8.0, 0.0]
    scale.update(good)
    scale.update(bad)
    assert scale.state() == [4.0, 0.0]


def test_a_gradient_that_is_not_finite_at_the_lowest_scale_is_to_be_found() -> None:
    scale = LossScale(torch.device("cpu"))
    scale.load([1.0, 0.0])
    assert scale.norm(torch.tensor(float("nan")))[1].isnan()
    scale.update(torch.tensor(1.0))
    assert scale.state() == [1.0, 0.0]
