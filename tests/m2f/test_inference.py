from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from m2f import inference
from m2f.inference import Segments, instances, panoptic_segments, semantic_labels, semantic_scores, upsampled_rows
from m2f.types import Prediction

REFERENCE = Path(__file__).parents[1] / "reference"


def answers(images: int = 2, queries: int = 9, classes: int = 5, height: int = 16, width: int = 24) -> Prediction:
    generator = torch.Generator().manual_seed(0)
    return Prediction(
        2 * torch.randn(images, queries, classes + 1, generator=generator),
        4 * torch.randn(images, queries, height, width, generator=generator),
    )


Size = tuple[int, int]


def cut(maps: torch.Tensor, valid_size: Size, size: Size) -> torch.Tensor:
    """Cropped and resized."""
    return F.interpolate(maps[..., : valid_size[0], : valid_size[1]], size=size, mode="bilinear", align_corners=False)


def upsampled(prediction: Prediction, padded_size: Size) -> torch.Tensor:
    return F.interpolate(prediction.mask_logits, size=padded_size, mode="bilinear", align_corners=False)


def plain_scores(
    prediction: Prediction, size: Size, valid_size: Size, padded_size: Size, resize: str = "scores"
) -> torch.Tensor:
    """The definition, with every mask at full resolution."""
    logits = upsampled(prediction, padded_size)
    if resize == "logits":
        logits = cut(logits, valid_size, size)
    scores = torch.einsum("bqc,bqhw->bchw", prediction.class_logits.softmax(-1)[..., :-1], logits.sigmoid())
    return scores if resize == "logits" else cut(scores, valid_size, size)


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
    monkeypatch.setattr(inference, "_BAND_ELEMENTS", 1 << 16)
    prediction = answers(images=1, queries=20, height=64, width=32)
    labels_of(prediction, (512, 200), padded_size=padded_size)
    whole = 20 * 256 * 128
    # a band of 65,536 floats and up to 4 more logit rows (16 rows of 20 x 128)
    assert 0 < largest <= 65_536 + 16 * 20 * 128 < whole / 4


@pytest.mark.parametrize(("size", "valid_size"), [((64, 96), (65, 96)), ((64, 96), (0, 96)), ((0, 96), (64, 96))])
def test_sizes_that_cannot_be_are_refused(size, valid_size):
    with pytest.raises(ValueError, match=r"cannot cut \(\d+, 96\) out of a padded picture of \(64, 96\) and resize it"):
        semantic_scores(answers(), size, valid_size)
    with pytest.raises(ValueError, match="out of a padded picture"):
        panoptic_segments(answers(), size, valid_size, thing_ids=[])
    with pytest.raises(ValueError, match="out of a padded picture"):
        instances(answers(), size, valid_size)


def test_a_padded_size_that_does_not_fit_the_masks_and_an_unknown_resize_are_refused():
    sizes = {"size": (64, 96), "padded_size": (60, 96)}
    message = r"a picture of \(60, 96\) does not have mask logits of \(16, 24\); padded_size is wrong"
    for make in (semantic_scores, semantic_labels, instances):
        with pytest.raises(ValueError, match=message):
            make(answers(), **sizes)
    with pytest.raises(ValueError, match=message):
        panoptic_segments(answers(), thing_ids=[], **sizes)
    with pytest.raises(ValueError, match=r"cannot cut \(64, 96\) out of a padded picture of \(61, 96\)"):
        semantic_scores(answers(), (64, 96), (64, 96), padded_size=(61, 96))
    with pytest.raises(ValueError, match="resize is 'masks'; it must be one of scores, logits"):
        semantic_scores(answers(), (64, 96), resize="masks")


# Segments and instances


@pytest.fixture
def full_size(monkeypatch):
    """Mask logits are as large as the picture."""
    monkeypatch.setattr(inference, "STRIDE", 1)


def reference_answers(name: str) -> tuple[Prediction, tuple[int, int], tuple[int, int] | None, dict[str, np.ndarray]]:
    """Prediction, size and valid size of one of the reference's pictures, and what it makes of them."""
    with np.load(REFERENCE / f"{name}.npz") as arrays:
        expected = dict(arrays)
    logits = [torch.from_numpy(expected[key]).float()[None] for key in ("class_logits", "mask_logits")]
    height, width = expected["panoptic"].shape
    valid_size = tuple(expected["valid_hw"].tolist()) if "valid_hw" in expected else None
    return Prediction(*logits), (height, width), valid_size, expected


def category_map(segments: Segments, void: int) -> np.ndarray:
    """The reference's coding: category + 1000 * instance, counted from 1 over all things."""
    number = segments.is_thing.cumsum(0) * segments.is_thing
    codes = torch.cat((segments.labels + 1000 * number, torch.tensor([void])))
    return codes[segments.segments.long()].numpy()


@pytest.mark.parametrize("name", ["postprocess", "postprocess_resized"])
def test_segments_and_instances_equal_the_reference_implementations(name, band_elements, request):
    if name == "postprocess":
        request.getfixturevalue("full_size")
    prediction, size, valid_size, expected = reference_answers(name)
    (segments,) = panoptic_segments(prediction, size, valid_size, thing_ids=range(80))
    assert np.array_equal(category_map(segments, void=133), expected["panoptic"])
    (found,) = instances(prediction, size, valid_size, thing_ids=range(80))
    assert found.scores.numpy() == pytest.approx(expected["instance_scores"], abs=1e-6)
    assert np.array_equal(found.labels, expected["instance_labels"])
    assert np.array_equal(found.masks.sum((1, 2)), expected["instance_areas"])
    if "instance_boxes_xyxy" in expected:
        assert np.array_equal(found.boxes, expected["instance_boxes_xyxy"])


@pytest.mark.parametrize(
    ("size", "valid_size", "padded_size"),
    [
        ((64, 96), (64, 96), (64, 96)),
        ((61, 83), (61, 83), (64, 96)),
        ((97, 131), (61, 83), (64, 96)),
        ((20, 200), (61, 83), (64, 96)),
        ((61, 93), (61, 93), (61, 93)),
        ((97, 131), (61, 93), (61, 93)),
        ((40, 131), (59, 83), (62, 93)),
    ],
)
def test_segments_and_instances_made_in_bands_equal_the_plain_definition(size, valid_size, padded_size, band_elements):
    prediction = answers()
    sizes = {"size": size, "valid_size": valid_size, "padded_size": padded_size}
    both = panoptic_segments(prediction, thing_ids=[0, 2], score_threshold=0.4, overlap_threshold=0.3, **sizes)
    found = instances(prediction, thing_ids=[0, 2, 4], max_instances=20, **sizes)
    for b, masks in enumerate(cut(upsampled(prediction, padded_size), valid_size, size).sigmoid()):
        probabilities = prediction.class_logits[b].softmax(-1)
        scores, labels = probabilities.max(-1)
        winner = (scores * (scores > 0.4) * (labels < 5))[:, None, None].mul(masks).argmax(0)
        expected, things = torch.full(size, 99), 0
        for q in range(9):
            if scores[q] > 0.4 and labels[q] < 5 and (winner == q).sum() >= 0.3 * (masks[q] >= 0.5).sum():
                things += labels[q].item() in (0, 2)
                expected[(winner == q) & (masks[q] >= 0.5)] = labels[q] + 1000 * things * (labels[q].item() in (0, 2))
        assert len(both[b].labels) > 1
        assert np.array_equal(category_map(both[b], void=99), expected)

        best = probabilities[:, :-1].flatten().topk(20)
        pairs = [(p, int(i) // 5, int(i) % 5) for p, i in zip(*best, strict=True) if int(i) % 5 in (0, 2, 4)]
        quality = [masks[q][masks[q] > 0.5].mean() for _, q, _ in pairs]
        order = sorted(range(len(pairs)), key=lambda n: -pairs[n][0] * quality[n])
        assert found[b].labels.tolist() == [pairs[n][2] for n in order]
        torch.testing.assert_close(found[b].scores, torch.stack([pairs[n][0] * quality[n] for n in order]))
        assert torch.equal(found[b].masks, torch.stack([masks[pairs[n][1]] > 0.5 for n in order]))


def one_row(*queries: tuple[list[float], list[float]]) -> tuple[Prediction, tuple[int, int]]:
    """Queries by their class probabilities, "no object" last, and mask probabilities in a picture of one row."""
    classes, masks = (torch.tensor(values) for values in zip(*queries, strict=True))
    return Prediction(classes.log()[None], masks.logit()[None, :, None]), (1, masks.shape[1])


# classes of the rows below: 0 is a thing, 1 and 2 are stuff
SURE = {0: [0.9, 0.04, 0.03, 0.03], 1: [0.03, 0.9, 0.04, 0.03], 2: [0.03, 0.04, 0.9, 0.03]}


def test_things_stay_apart_and_stuff_of_one_class_is_one_segment(full_size):
    prediction, size = one_row(
        (SURE[1], [0.9, 0.1, 0.1, 0.1]),
        (SURE[0], [0.1, 0.9, 0.1, 0.1]),
        ([0.02, 0.95, 0.02, 0.01], [0.1, 0.1, 0.9, 0.1]),
        (SURE[0], [0.1, 0.1, 0.1, 0.9]),
    )
    (found,) = panoptic_segments(prediction, size, thing_ids=[0])
    assert found.segments.tolist() == [[0, 1, 0, 2]]
    assert found.segments.dtype == torch.int32
    assert found.labels.tolist() == [1, 0, 0]
    assert found.is_thing.tolist() == [False, True, True]
    assert found.scores.tolist() == pytest.approx([0.95, 0.9, 0.9])


def test_unsure_queries_and_no_object_do_not_compete(full_size):
    prediction, size = one_row(
        ([0.79, 0.07, 0.07, 0.07], [0.99, 0.99]),
        ([0.01, 0.01, 0.01, 0.97], [0.99, 0.99]),
        (SURE[2], [0.6, 0.6]),
    )
    (found,) = panoptic_segments(prediction, size, thing_ids=[0])
    assert (found.segments.tolist(), found.labels.tolist()) == ([[0, 0]], [2])


def test_a_segment_that_wins_too_little_of_its_mask_leaves_its_pixels_void(full_size):
    # the second query wins 1 of the 2 pixels of its mask; the first has 4 of 4
    prediction, size = one_row((SURE[1], [0.9, 0.9, 0.9, 0.9, 0.1]), (SURE[0], [0.1, 0.1, 0.1, 0.8, 0.8]))
    assert panoptic_segments(prediction, size, thing_ids=[0])[0].segments.tolist() == [[0, 0, 0, 0, -1]]
    assert panoptic_segments(prediction, size, thing_ids=[0], overlap_threshold=0.5)[0].segments.tolist() == [
        [0, 0, 0, 0, 1]
    ]


def test_pixels_won_with_a_mask_probability_below_a_half_are_void(full_size):
    prediction, size = one_row((SURE[1], [0.9, 0.5, 0.4, 0.1]), (SURE[0], [0.1, 0.1, 0.1, 0.4]))
    (found,) = panoptic_segments(prediction, size, thing_ids=[0])
    assert (found.segments.tolist(), found.labels.tolist()) == ([[0, 0, -1, -1]], [1])


def test_a_picture_without_a_sure_query_is_void(full_size):
    prediction, size = one_row(([0.25] * 4, [0.9, 0.9]))
    (found,) = panoptic_segments(prediction, size, thing_ids=[0])
    assert found.segments.tolist() == [[-1, -1]]
    assert [len(t) for t in (found.labels, found.is_thing, found.scores)] == [0, 0, 0]


def test_instances_are_those_worked_out_by_hand(full_size):
    prediction, size = one_row(
        ([0.5, 0.3, 0.1, 0.1], [0.9, 0.7, 0.1, 0.5]),  # mask of two pixels, mean 0.8
        ([0.6, 0.2, 0.1, 0.1], [0.1, 0.1, 0.6, 0.4]),  # mask of one, 0.6
        ([0.2, 0.2, 0.2, 0.4], [0.4, 0.4, 0.4, 0.4]),  # an empty mask
    )
    (found,) = instances(prediction, size, max_instances=4)
    # the likeliest four pairs: 0.6 (query 1, class 0), 0.5 (0, 0), 0.3 (0, 1), and the first of those with 0.2
    assert found.scores.tolist() == pytest.approx([0.5 * 0.8, 0.6 * 0.6, 0.3 * 0.8, 0.2 * 0.6])
    assert found.labels.tolist() == [0, 0, 1, 1]
    first, second = [[True, True, False, False]], [[False, False, True, False]]
    assert found.masks.tolist() == [first, second, first, second]
    assert found.boxes.tolist() == [[0, 0, 2, 1], [2, 0, 3, 1], [0, 0, 2, 1], [2, 0, 3, 1]]

    # stuff takes its places among the four and is left out; an empty mask has score and box 0
    (things,) = instances(prediction, size, thing_ids=[0], max_instances=4)
    assert things.scores.tolist() == pytest.approx([0.5 * 0.8, 0.6 * 0.6])
    (everything,) = instances(prediction, size, max_instances=100)
    assert len(everything.scores) == 9
    assert everything.scores[-3:].tolist() == [0, 0, 0]
    assert everything.boxes[-3:].tolist() == [[0] * 4] * 3
    (nothing,) = instances(prediction, size, thing_ids=[])
    assert (nothing.masks.shape, nothing.boxes.shape) == ((0, 1, 4), (0, 4))


def test_things_that_are_no_class_are_refused():
    with pytest.raises(ValueError, match="thing_ids names 5, which is outside the classes 0 to 4"):
        panoptic_segments(answers(), (64, 96), thing_ids=range(80))
    with pytest.raises(ValueError, match="thing_ids names -1, which is outside the classes 0 to 4"):
        instances(answers(), (64, 96), thing_ids=[-1, 2])
