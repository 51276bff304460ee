from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from m2f.inference import (
    Size,
    bands,
    instances,
    panoptic_segments,
    score_bands,
    semantic_labels,
    semantic_scores,
    upsampled_rows,
)
from m2f.types import Prediction
from tests.helpers.predictions import answers, cut, on_gpu, upsampled
from tests.helpers.pretend_gpu import GpuTensor, PretendGpu


def plain_scores(
    prediction: Prediction, size: Size, valid_size: Size, padded_size: Size, resize: str = "scores"
) -> torch.Tensor:
    """The definition, with every mask at full resolution."""
    logits = upsampled(prediction, padded_size)
    if resize == "logits":
        logits = cut(logits, valid_size, size)
    scores = torch.einsum("bqc,bqhw->bchw", prediction.class_logits.softmax(-1)[..., :-1], logits.sigmoid())
    return scores if resize == "logits" else cut(scores, valid_size, size)


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
@pytest.mark.parametrize("resize", ["scores", "logits"])
def test_scores_made_in_bands_equal_the_plain_definition(size, valid_size, resize, band_elements):
    prediction = answers()
    scores = semantic_scores(prediction, size, valid_size, resize=resize)
    expected = plain_scores(prediction, size, valid_size or (64, 96), (64, 96), resize)
    assert scores.shape == (2, 5, *size)
    assert (scores - expected).abs().max() < 2e-6
    labels = semantic_labels(prediction, size, valid_size, resize=resize)
    assert labels.dtype == torch.uint8
    assert torch.equal(labels.long(), scores.argmax(1))


@pytest.mark.parametrize("padded_size", [(37, 53), (40, 53), (37, 56)])
@pytest.mark.parametrize(
    ("size", "valid_size"),
    [
        ((37, 53), None),
        ((74, 106), None),
        ((50, 40), (37, 53)),
        ((20, 90), (37, 53)),
        ((31, 47), (31, 47)),
        ((45, 80), (31, 47)),
        ((37, 53), (36, 1)),
    ],
)
@pytest.mark.parametrize("resize", ["scores", "logits"])
def test_scores_of_a_picture_whose_sides_are_no_multiples_of_4_equal_the_plain_definition(
    size, valid_size, padded_size, resize, band_elements
):
    prediction = answers(height=10, width=14)
    scores = semantic_scores(prediction, size, valid_size, padded_size=padded_size, resize=resize)
    expected = plain_scores(prediction, size, valid_size or padded_size, padded_size, resize)
    assert scores.shape == (2, 5, *size)
    assert (scores - expected).abs().max() < 2e-6
    labels = semantic_labels(prediction, size, valid_size, padded_size=padded_size, resize=resize)
    assert torch.equal(labels.long(), scores.argmax(1))


def test_resizing_scores_and_resizing_logits_are_those_worked_out_by_hand():
    # one sure query; upsampled, columns 10 and 11 of 24 have logits 0.5 and 1.5; the 6th of 12 is their middle
    prediction = Prediction(torch.tensor([[[99.0, 0.0]]]), torch.tensor([[[[0.0, 0, 0, 4, 4, 4]]]]))
    by_scores, by_logits = (semantic_scores(prediction, (1, 12), resize=resize) for resize in ("scores", "logits"))
    assert by_scores[0, 0, 0, 5].item() == pytest.approx((0.6224593 + 0.8175745) / 2, abs=1e-6)  # sigmoids of both
    assert by_logits[0, 0, 0, 5].item() == pytest.approx(0.7310586, abs=1e-6)  # sigmoid(1)


def test_masks_of_an_unpadded_picture_reach_its_edges():
    # two columns over 7 pixels have their centres at 1.75 and 5.25 and meet in the middle of the fourth pixel, at 3.5
    prediction = Prediction(torch.tensor([[[99.0, 0.0]]]), torch.tensor([[[[-70.0, 70.0]]]]))
    scores = semantic_scores(prediction, (4, 7), padded_size=(4, 7))[0, 0, 0]
    assert scores.round(decimals=4).tolist() == [0, 0, 0, 0.5, 1, 1, 1]


def test_a_long_picture_equals_the_plain_definition():
    prediction = answers(images=1, queries=3, height=512, width=4)  # 2048 rows: positions lose digits in float32
    scores = semantic_scores(prediction, (1500, 16), (2047, 16))
    assert (scores - plain_scores(prediction, (1500, 16), (2047, 16), (2048, 16))).abs().max() < 2e-6
    scores = semantic_scores(prediction, (1500, 16), padded_size=(2045, 16))
    assert (scores - plain_scores(prediction, (1500, 16), (2045, 16), (2045, 16))).abs().max() < 2e-6


def test_scores_are_those_worked_out_by_hand():
    # one query everywhere inside (sigmoid(0) = 1/2), probabilities 1/2, 1/4 and 1/4 for "no object"
    prediction = Prediction(torch.tensor([[[2.0, 1.0, 1.0]]]).log(), torch.zeros(1, 1, 2, 2))
    scores = semantic_scores(prediction, (3, 3), (5, 7))
    torch.testing.assert_close(scores, torch.tensor([0.25, 0.125]).view(1, 2, 1, 1).expand(1, 2, 3, 3))
    assert semantic_labels(prediction, (3, 3), (5, 7)).tolist() == [[[0] * 3] * 3]


@pytest.mark.parametrize(("start", "stop"), [(0, 61), (0, 1), (3, 5), (4, 8), (17, 42), (57, 61), (60, 61)])
@pytest.mark.parametrize("padded_size", [(64, 96), (61, 95)])
def test_rows_of_upsampled_logits_equal_those_of_the_whole(start, stop, padded_size):
    prediction = answers()
    rows = upsampled_rows(prediction.mask_logits, start, stop, padded_size)
    torch.testing.assert_close(rows, upsampled(prediction, padded_size)[:, :, start:stop], atol=1e-5, rtol=0)


@pytest.mark.parametrize("padded_size", [(4, 4), (1, 1)])
def test_a_prediction_is_left_as_it_was(padded_size):
    prediction = answers(height=1, width=1)
    class_logits, mask_logits = prediction.class_logits.clone(), prediction.mask_logits.clone()
    semantic_scores(prediction, padded_size, padded_size=padded_size)
    semantic_scores(prediction, padded_size, padded_size=padded_size, resize="logits")
    panoptic_segments(prediction, padded_size, thing_ids=[0], padded_size=padded_size, score_threshold=0)
    instances(prediction, padded_size, padded_size=padded_size)
    assert torch.equal(prediction.mask_logits, mask_logits) and torch.equal(prediction.class_logits, class_logits)


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


@pytest.mark.parametrize(
    "labels_of",
    [
        semantic_labels,
        lambda p, size, **sizes: semantic_labels(p, size, resize="logits", **sizes),
        lambda p, size, **sizes: panoptic_segments(
            p, size, thing_ids=[0], score_threshold=0, overlap_threshold=0, **sizes
        ),
        instances,
    ],
    ids=["semantic", "semantic of resized logits", "panoptic", "instances"],
)
@pytest.mark.parametrize("padded_size", [None, (254, 127)])
def test_masks_are_never_made_at_full_resolution(labels_of, padded_size, monkeypatch):
    largest = 0
    resize = F.interpolate

    def watched(*args, **kwargs):
        nonlocal largest
        result = resize(*args, **kwargs)
        largest = max(largest, result.numel())
        return result

    monkeypatch.setattr(F, "interpolate", watched)
    monkeypatch.setattr(bands, "_BAND_ELEMENTS", 1 << 16)
    prediction = answers(images=1, queries=20, height=64, width=32)
    labels_of(prediction, (512, 200), padded_size=padded_size)
    whole = 20 * 256 * 128
    # a band of 65,536 floats and up to 4 more logit rows (16 rows of 20 x 128)
    assert 0 < largest <= 65_536 + 16 * 20 * 128 < whole / 4


@pytest.mark.parametrize(("size", "valid_size"), [((64, 96), (65, 96)), ((64, 96), (0, 96)), ((0, 96), (64, 96))])
def test_sizes_that_cannot_be_are_refused(size, valid_size):
    with pytest.raises(ValueError, match=r"cannot cut \(\d+, 96\) out of a padded image of \(64, 96\) and resize it"):
        semantic_scores(answers(), size, valid_size)
    with pytest.raises(ValueError, match="out of a padded image"):
        panoptic_segments(answers(), size, valid_size, thing_ids=[])
    with pytest.raises(ValueError, match="out of a padded image"):
        instances(answers(), size, valid_size)


def test_a_padded_size_that_does_not_fit_the_masks_and_an_unknown_resize_are_refused():
    sizes = {"size": (64, 96), "padded_size": (60, 96)}
    message = r"an image of \(60, 96\) does not have mask logits of \(16, 24\); padded_size is wrong"
    for make in (semantic_scores, semantic_labels, instances):
        with pytest.raises(ValueError, match=message):
            make(answers(), **sizes)
    with pytest.raises(ValueError, match=message):
        panoptic_segments(answers(), thing_ids=[], **sizes)
    with pytest.raises(ValueError, match=r"cannot cut \(64, 96\) out of a padded image of \(61, 96\)"):
        semantic_scores(answers(), (64, 96), (64, 96), padded_size=(61, 96))
    with pytest.raises(ValueError, match="resize is 'masks'; it must be one of scores, logits"):
        semantic_scores(answers(), (64, 96), resize="masks")


# On a GPU


@pytest.mark.parametrize("elements", [1, 1 << 22], ids=["bands of 4 rows", "one band"])
@pytest.mark.parametrize(("size", "valid_size"), [((64, 96), None), ((97, 131), (61, 83))])
def test_label_maps_never_make_the_host_wait_for_a_gpu(size, valid_size, elements, monkeypatch):
    monkeypatch.setattr(bands, "_GPU_BAND_ELEMENTS", elements)
    prediction = answers()
    for resize in ("scores", "logits"):
        with PretendGpu() as gpu:
            labels = semantic_labels(on_gpu(gpu, prediction), size, valid_size, resize=resize)
            assert isinstance(labels, GpuTensor) and gpu.waits == []
            assert torch.equal(labels.cpu(), semantic_labels(prediction, size, valid_size, resize=resize))


def test_bands_are_larger_on_a_gpu():
    # 20 queries of 256 x 128 resized to 512 x 200: a row takes 20 * 200 floats, so 4 bands of 16 MiB are 1 on a GPU
    prediction = answers(images=1, queries=80, height=64, width=32)
    here = [first for first, _ in score_bands(prediction, (512, 200), resize="logits")]
    with PretendGpu() as gpu:
        on_a_gpu = [first for first, _ in score_bands(on_gpu(gpu, prediction), (512, 200), resize="logits")]
    # a resized row takes 80 * 200 floats: 262 of them are 16 MiB
    assert (here, on_a_gpu) == ([0, 262], [0])
