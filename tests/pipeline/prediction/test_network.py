"""A device is the one that is asked for, or an error."""

from __future__ import annotations

import pytest
import torch

from pipeline.prediction.network import device_named


def test_a_device_that_is_not_here_is_refused_in_a_sentence() -> None:
    assert device_named("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"--device cuda:7 is not here: this machine has \d GPUs"):
        device_named("cuda:7")
    with pytest.raises(ValueError, match="--device abacus is no device; give cpu, cuda, or cuda:1"):
        device_named("abacus")
