from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from m2f.inference import Segments, bands, instances, panoptic_segments
from m2f.types import Prediction
from tests.helpers.predictions import answers, cut, on_gpu, upsampled
from tests.helpers.pretend_gpu import GpuTensor, PretendGpu

REFERENCE = Path(__file__).parents[2] / "reference"


@pytest.fixture
def full_size(monkeypatch):
    """Mask logits are as large as the picture."""
    monkeypatch.setattr(bands, "STRIDE", 1)


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


# On a GPU


@pytest.mark.parametrize("elements", [1, 1 << 22], ids=["bands of 4 rows", "one band"])
def test_segments_of_a_picture_make_the_host_wait_for_a_gpu_twice_and_instances_once(elements, monkeypatch):
    monkeypatch.setattr(bands, "_GPU_BAND_ELEMENTS", elements)
    prediction = answers(images=1)
    things, sizes = [0, 2], {"size": (97, 131), "valid_size": (61, 83)}
    thresholds = {"score_threshold": 0.4, "overlap_threshold": 0.3}
    (expected,) = panoptic_segments(prediction, thing_ids=things, **thresholds, **sizes)
    (best,) = instances(prediction, thing_ids=things, max_instances=20, **sizes)
    assert len(expected.labels) > 1 and 0 < len(best.labels) < 20
    with PretendGpu() as gpu:
        there = on_gpu(gpu, prediction)
        # which queries compete, and how many pixels each has: whatever the number of bands and of queries
        (found,), waits = gpu.waits_of(lambda: panoptic_segments(there, thing_ids=things, **thresholds, **sizes))
        assert waits == ["copy to the host"] * 2
        (likely,), waits = gpu.waits_of(lambda: instances(there, thing_ids=things, max_instances=20, **sizes))
        assert waits == ["copy to the host"]
        for ours, theirs, names in (
            (found, expected, ("segments", "labels", "is_thing", "scores")),
            (likely, best, ("scores", "labels", "masks", "boxes")),
        ):
            for name in names:
                tensor = getattr(ours, name)
                assert isinstance(tensor, GpuTensor) and tensor.dtype == getattr(theirs, name).dtype
                assert tensor.tolist() == getattr(theirs, name).tolist(), name


def test_a_picture_without_a_sure_query_is_void_on_a_gpu_too():
    prediction = answers(images=1)
    with PretendGpu() as gpu:
        (found,) = panoptic_segments(on_gpu(gpu, prediction), (8, 9), thing_ids=[0], score_threshold=1.0)
        assert found.segments.tolist() == [[-1] * 9] * 8
        assert found.labels.tolist() == []
