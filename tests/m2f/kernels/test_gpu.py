"""The whole network with the kernels of a GPU, which Triton's interpreter runs, beside PyTorch's own operations."""

from __future__ import annotations

import pytest
import torch

from m2f.kernels import gpu
from tests.helpers.triton_kernels import Interpreter


@pytest.mark.long
def test_a_step_and_a_label_map_with_all_kernels_are_those_of_the_plain_form() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    interpreter = Interpreter("tests.helpers.interpreted_step")
    try:
        plain, plain_used = interpreter.call("step", False)
        found, used = interpreter.call("step", True)
    finally:
        interpreter.end()
    assert {"AttentionBackward", "MaskedAttentionBackward"} == set(used) - set(plain_used)
    assert found.keys() == plain.keys() and len(found) > 100
    labels, plain_labels = found.pop("labels"), plain.pop("labels")
    assert (labels != plain_labels).float().mean() < 0.01  # rounding decides between equal scores
    assert plain_labels.unique().numel() > 1
    for name, expected in plain.items():
        largest = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(
            found[name], expected, atol=2e-5 * largest, rtol=0, msg=lambda said, name=name: f"{name}: {said}"
        )


def test_kernels_are_used_as_if_they_could_be_had_only_where_it_is_said() -> None:
    tensor = torch.empty(1, device="meta")
    assert not gpu.takes(tensor)
    with gpu.as_if(True):
        assert gpu.takes(tensor) and not gpu.takes(tensor.double())
        with gpu.as_if(False):
            assert not gpu.takes(tensor)
        assert gpu.takes(tensor)
    assert not gpu.takes(tensor)


def test_an_image_in_which_a_kernel_cannot_count_takes_the_plain_form() -> None:
    with gpu.as_if(True):
        assert gpu.takes(torch.empty(3, 2**23, 8, 31, device="meta"))
        assert not gpu.takes(torch.empty(1, 2**23, 8, 32, device="meta"))  # 2^31 places


def test_a_kernel_that_cannot_be_compiled_says_where_its_code_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def damaged() -> None:
        raise RuntimeError("device kernel image\n is invalid")

    monkeypatch.setattr(gpu, "_tried", damaged)
    monkeypatch.setattr(gpu, "_missing", gpu._missing.__wrapped__)  # kept for the process
    monkeypatch.setenv("TRITON_CACHE_DIR", "/code")
    assert gpu.use("auto") == "plain"
    assert capsys.readouterr().err == (
        "a kernel in Triton cannot be compiled here (device kernel image is invalid; its code is kept in /code, which "
        "may be deleted): PyTorch's own operations are used, which are slower\n"
    )
