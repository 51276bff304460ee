from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from m2f import inference
from m2f.inference import semantic_labels, semantic_scores, upsampled_rows
from m2f.types import Prediction


def answers(pictures: int = 2, queries: int = 9, classes: int = 5, height: int = 16, width: int = 24) -> Prediction:
    generator = torch.Generator().manual_seed(0)
    return Prediction(
        2 * torch.randn(pictures, queries, classes + 1, generator=generator),
        4 * torch.randn(pictures, queries, height, width, generator=generator),
    )


def plain_scores(prediction: Prediction, size: tuple[int, int], valid_size: tuple[int, int]) -> torch.Tensor:
    """The definition, with every mask at full resolution."""
    masks = F.interpolate(prediction.mask_logits, scale_factor=4, mode="bilinear", align_corners=False).sigmoid()
    scores = torch.einsum("bqc,bqhw->bchw", prediction.class_logits.softmax(-1)[..., :-1], masks)
    scores = scores[..., : valid_size[0], : valid_size[1]]
    return F.interpolate(scores, size=size, mode="bilinear", align_corners=False)


@pytest.fixture(params=[1, 20_000, 1 << 22], ids=["bands of 4 rows", "bands of some rows", "one band"])
def band_elements(request, monkeypatch):
    monkeypatch.setattr(inference, "_BAND_ELEMENTS", request.param)


@pytest.mark.parametrize(
    ("size", "valid_size"),
    [
        ((64, 96), None),
        ((64, 96), (64, 96)),
        ((61, 83), (61, 83)),
        ((122, 166), (61, 83)),
        ((97, 131), (61, 83)),
        ((20, 30), (61, 83)),
        ((61, 200), (61, 83)),
        ((200, 83), (61, 83)),
        ((1, 1), (64, 90)),
        ((7, 5), (1, 1)),
    ],
)
def test_scores_made_in_bands_equal_the_plain_definition(size, valid_size, band_elements):
    prediction = answers()
    scores = semantic_scores(prediction, size, valid_size)
    expected = plain_scores(prediction, size, valid_size or (64, 96))
    assert scores.shape == (2, 5, *size)
    assert (scores - expected).abs().max() < 2e-6
    labels = semantic_labels(prediction, size, valid_size)
    assert labels.dtype == torch.uint8
    assert torch.equal(labels.long(), scores.argmax(1))


def test_a_long_picture_equals_the_plain_definition():
    prediction = answers(pictures=1, queries=3, height=512, width=4)  # 2048 rows: positions lose digits in float32
    scores = semantic_scores(prediction, (1500, 16), (2047, 16))
    assert (scores - plain_scores(prediction, (1500, 16), (2047, 16))).abs().max() < 2e-6


def test_scores_are_those_worked_out_by_hand():
    # one query everywhere inside (sigmoid(0) = 1/2), probabilities 1/2, 1/4 and 1/4 for "no object"
    prediction = Prediction(torch.tensor([[[2.0, 1.0, 1.0]]]).log(), torch.zeros(1, 1, 2, 2))
    scores = semantic_scores(prediction, (3, 3), (5, 7))
    torch.testing.assert_close(scores, torch.tensor([0.25, 0.125]).view(1, 2, 1, 1).expand(1, 2, 3, 3))
    assert semantic_labels(prediction, (3, 3), (5, 7)).tolist() == [[[0] * 3] * 3]


@pytest.mark.parametrize(("start", "stop"), [(0, 64), (0, 1), (3, 5), (4, 8), (17, 42), (60, 64), (63, 64)])
def test_rows_of_upsampled_logits_equal_those_of_the_whole(start, stop):
    logits = answers().mask_logits
    whole = F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False)
    torch.testing.assert_close(upsampled_rows(logits, start, stop), whole[:, :, start:stop], atol=4e-6, rtol=0)


def test_many_classes_get_labels_that_hold_them():
    class_logits = torch.zeros(1, 1, 302)
    class_logits[..., 299] = 9
    assert semantic_labels(Prediction(class_logits, torch.zeros(1, 1, 1, 1)), (2, 2)).unique().tolist() == [299]


def test_scores_are_float32_under_autocast_and_carry_no_gradient():
    prediction = answers()
    prediction.mask_logits.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = semantic_scores(prediction, (50, 70), (61, 83))
    assert torch.equal(scores, semantic_scores(prediction, (50, 70), (61, 83)))
    assert scores.dtype == torch.float32
    assert not scores.requires_grad


def test_masks_are_never_made_at_full_resolution(monkeypatch):
    largest = 0
    resize = F.interpolate

    def watched(*args, **kwargs):
        nonlocal largest
        result = resize(*args, **kwargs)
        largest = max(largest, result.numel())
        return result

    monkeypatch.setattr(F, "interpolate", watched)
    monkeypatch.setattr(inference, "_BAND_ELEMENTS", 1 << 16)
    prediction = answers(pictures=1, queries=20, height=64, width=32)
    semantic_labels(prediction, (512, 200))
    whole = 20 * 256 * 128
    # a band of 65,536 floats and up to 4 more logit rows (16 rows of 20 x 128)
    assert 0 < largest <= 65_536 + 16 * 20 * 128 < whole / 4


@pytest.mark.parametrize(("size", "valid_size"), [((64, 96), (65, 96)), ((64, 96), (0, 96)), ((0, 96), (64, 96))])
def test_sizes_that_cannot_be_are_refused(size, valid_size):
    with pytest.raises(ValueError, match=r"cannot cut \(\d+, 96\) out of a padded picture of \(64, 96\) and resize it"):
        semantic_scores(answers(), size, valid_size)
