from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

from pipeline.compute.precision import allow_tf32

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
