"""Label maps in Triton: run by Triton's interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from m2f.inference.semantic import Resized, semantic_labels, semantic_scores
from m2f.kernels import gpu
from m2f.types import Prediction
from tests.helpers.triton_kernels import A100, Interpreter, resources

Size = tuple[int, int]


@pytest.fixture(scope="module")
def kernels() -> Iterator[Interpreter]:
    pytest.importorskip("triton", reason="Triton is not installed")
    kernels = Interpreter("m2f.kernels.triton_labels")
    yield kernels
    kernels.end()


def prediction(*, B: int, Q: int, C: int, h: int, w: int) -> Prediction:
    draw = torch.Generator().manual_seed(0)
    return Prediction(2 * torch.randn(B, Q, C + 1, generator=draw), 3 * torch.randn(B, Q, h, w, generator=draw))


CASES: dict[str, tuple[Prediction, Size, Size, Size]] = {
    "of the network's size, two images": (prediction(B=2, Q=5, C=3, h=4, w=6), (16, 24), (16, 24), (16, 24)),
    "smaller, of an odd size, more queries and classes than a tile": (
        prediction(B=1, Q=37, C=40, h=4, w=5), (9, 13), (14, 17), (15, 18),
    ),
    "larger than a tile": (prediction(B=1, Q=7, C=3, h=3, w=3), (21, 45), (10, 12), (12, 12)),
}  # fmt: skip


@pytest.mark.parametrize("resize", ["scores", "logits"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_labels_are_those_of_the_plain_form(
    kernels: Interpreter, case: tuple[Prediction, Size, Size, Size], resize: Resized
) -> None:
    given, size, valid, padded = case
    probability = given.class_logits.softmax(-1)[..., :-1].contiguous()
    sizes = (size, valid, padded)
    found = kernels.call("labels", given.mask_logits, probability, *sizes, resize == "logits", torch.uint8)
    scores = semantic_scores(given, size, valid, padded_size=padded, resize=resize)
    assert found.dtype == torch.uint8 and found.shape == (len(given.class_logits), *size)
    first, second = scores.topk(2, dim=1).values.unbind(1)
    clear = first - second > 1e-6  # rounding decides between equal scores
    assert clear.float().mean() > 0.99
    assert torch.equal(found[clear].long(), scores.argmax(1)[clear])


def test_of_equal_scores_the_first_class_is_taken(kernels: Interpreter) -> None:
    masks = torch.full((1, 2, 1, 1), 20.0)
    probability = torch.tensor([[[0.25, 0.5, 0.5], [0.25, 0.5, 0.5]]])
    size = (4, 4)
    found = kernels.call("labels", masks, probability, size, size, size, False, torch.uint8)
    assert found.unique().tolist() == [1]


def test_scores_that_are_no_numbers_have_a_class_as_in_the_plain_form(kernels: Interpreter) -> None:
    given = prediction(B=1, Q=4, C=3, h=4, w=4)
    given.mask_logits[0, 1, :2] = float("nan")
    given.class_logits[0, 2, 1] = float("nan")
    for classes in (given.class_logits, given.class_logits.nan_to_num()):
        seen = Prediction(classes, given.mask_logits)
        size, probability = (16, 16), classes.softmax(-1)[..., :-1].contiguous()
        found = kernels.call("labels", given.mask_logits, probability, size, size, size, False, torch.uint8)
        no_number = semantic_scores(seen, size).isnan().any(1)
        assert no_number.any() and torch.equal(found[no_number], semantic_labels(seen, size)[no_number])


FLOATS = dict.fromkeys(("y_upsample", "x_upsample", "y_resize", "x_resize"), "fp32")


@pytest.mark.slow
@pytest.mark.parametrize(("classes", "registers"), [(32, 168), (256, 255)])
def test_the_kernel_compiles_for_a_gpu_and_its_registers_hold_its_tiles(classes: int, registers: int) -> None:
    triton_labels = pytest.importorskip("m2f.kernels.triton_labels", reason="Triton is not installed")
    pointers = {**FLOATS, "logits": "*fp32", "probability": "*fp32", "labels": "*u8"}
    for resized in (0, 1):
        constants = {"QUERIES": 32, "PIXELS": 32, "CLASSES": classes, "RESIZED": resized, "OF_LOGITS": 0}
        used = resources(triton_labels._label, pointers, constants, capability=A100, warps=triton_labels.warps(classes))
        assert used["STACK"] == 0 and used["REG"] <= registers


@pytest.mark.parametrize(("classes", "kernels"), [(19, True), (300, False)])
def test_on_a_gpu_a_label_map_is_one_operation_and_no_scores_of_the_images_size(
    classes: int, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(gpu, "_used", True)
    with FakeTensorMode() as mode:
        given = Prediction(
            torch.empty(1, 100, classes + 1, device="cuda"), torch.empty(1, 100, 256, 512, device="cuda")
        )
        seen = list[int]()
        monkeypatch.setattr(mode, "dispatch", watched(mode.dispatch, seen))
        found = semantic_labels(given, (1024, 2048))
    assert found.shape == (1, 1024, 2048) and found.device.type == "cuda"
    assert (max(seen) <= found.numel()) == kernels  # the label map itself is the largest tensor


def watched(dispatch, sizes):  # type: ignore[no-untyped-def]
    """A dispatch that notes how many elements the tensors have that operations give."""

    def watching(function, *arguments, **named):  # type: ignore[no-untyped-def]
        result = dispatch(function, *arguments, **named)
        sizes.extend(each.numel() for each in (result if isinstance(result, (tuple, list)) else [result])
                     if isinstance(each, torch.Tensor))  # fmt: skip
        return result

    return watching


@pytest.mark.gpu
def test_on_a_gpu_that_is_here_labels_are_those_of_the_plain_form() -> None:
    for given, size, valid, padded in CASES.values():
        given = Prediction(given.class_logits.cuda(), given.mask_logits.cuda())
        made = []
        for form in ("compiled", "plain"):
            gpu.use(form)  # type: ignore[arg-type]
            made.append(semantic_labels(given, size, valid, padded_size=padded))
        assert (made[0] != made[1]).float().mean() < 0.01
    gpu.use("plain")
