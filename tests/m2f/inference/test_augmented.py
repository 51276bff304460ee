"""Multi-scale and flip, with a stand-in network whose answers can be worked out, and with the tiny network."""

from __future__ import annotations

import weakref
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from m2f import Prediction, build_model
from m2f.inference import bands, semantic_scores
from m2f.inference.augmented import semantic_scores_ms_flip
from m2f.model import MEAN_RGB, STD_RGB, normalise, pad
from pipeline.params.load import load_params

TINY = load_params(Path(__file__).parents[3] / "params.yaml").rows["shapes_tiny"].model


class Pooled(nn.Module):
    """Two queries for two classes; their mask logits are the means of red and of green in every 4 x 4 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor, seeds: object = None, *, auxiliary: bool = True) -> Prediction:
        assert not auxiliary
        assert len(images) == 1
        self.seen.append(images)
        masks = F.avg_pool2d(images[:, :2], 4, ceil_mode=True, count_include_pad=False)
        return Prediction(torch.tensor([[[0.6, 0.1, 0.3], [0.2, 0.7, 0.1]]]).log(), masks)


class Width(nn.Module):
    """One sure query whose mask probability is everywhere the width of the picture in thousandths."""

    def forward(self, images: torch.Tensor, seeds: object = None, *, auxiliary: bool = True) -> Prediction:
        height, width = images.shape[2:]
        masks = torch.full((1, 1, height // 4, width // 4), width / 1000).logit()
        return Prediction(torch.tensor([[[99.0, 0.0]]]), masks)


def random_image(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Smooth noise."""
    coarse = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(seed)) * 255
    return F.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 255)[0].to(torch.uint8)


def test_the_mean_over_two_sizes_is_the_one_worked_out_by_hand() -> None:
    # 32 x 64 twice the size is 64 x 128; both are shown as they are and mirrored: (2 * 0.064 + 2 * 0.128) / 4
    scores = semantic_scores_ms_flip(Width(), random_image(32, 64), short_sides=[32, 64], long_side_max=128)
    assert scores.shape == (1, 32, 64)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.full((1, 32, 64), 0.096))


def test_one_size_of_a_network_that_knows_no_left_and_right_gives_its_plain_scores() -> None:
    image, model = random_image(64, 96), Pooled()
    scores = semantic_scores_ms_flip(model, image, short_sides=[64], long_side_max=96)
    (plain,) = semantic_scores(Pooled()(normalise(image[None]), auxiliary=False), (64, 96))
    torch.testing.assert_close(scores, plain, atol=1e-6, rtol=0)
    assert torch.equal(model.seen[1], model.seen[0].flip(-1))
    assert not torch.equal(model.seen[1], model.seen[0])


@pytest.mark.parametrize("band_elements", [1, 1 << 22])
@pytest.mark.parametrize("size", [None, (29, 61)])
@pytest.mark.parametrize("pad_multiple", [1, 32])
def test_scores_are_the_mean_of_every_views_own(size, pad_multiple, band_elements, monkeypatch) -> None:
    monkeypatch.setattr(bands, "_BAND_ELEMENTS", band_elements)
    image = random_image(40, 53)
    scores = semantic_scores_ms_flip(
        Pooled(), image, short_sides=[40, 50], long_side_max=100, pad_multiple=pad_multiple, size=size
    )
    views = []
    for height, width in ((40, 53), (50, 66)):  # 53 * 50 / 40 = 66.25
        scaled = F.interpolate(image[None].float(), size=(height, width), mode="bilinear").round().to(torch.uint8)
        for mirrored in (False, True):
            view = pad(normalise(scaled.flip(-1) if mirrored else scaled), pad_multiple)
            prediction = Pooled()(view, auxiliary=False)
            (plain,) = semantic_scores(prediction, size or (40, 53), (height, width), padded_size=view.shape[2:])
            views.append(plain.flip(-1) if mirrored else plain)
    assert (views[0] - views[1]).abs().max() > 1e-3  # padding comes in from the other side
    torch.testing.assert_close(scores, torch.stack(views).mean(0), atol=1e-6, rtol=0)


def test_two_sizes_give_the_mean_of_what_they_give_alone() -> None:
    image = random_image(40, 53)
    one, other, both = (
        semantic_scores_ms_flip(Pooled(), image, short_sides=sides, long_side_max=100)
        for sides in ([36], [48], [36, 48])
    )
    assert not torch.allclose(one, other, atol=1e-3)
    torch.testing.assert_close(both, (one + other) / 2, atol=1e-6, rtol=0)


def test_views_keep_their_aspect_within_the_longest_side_and_are_padded() -> None:
    # 40 x 100 to 32 x 80; 64 x 160 would be too long: 48 x 120; 27 x 68 (67.5 rounded up)
    for pad_multiple, expected in ((1, [(32, 80), (48, 120), (27, 68)]), (32, [(32, 96), (64, 128), (32, 96)])):
        model = Pooled()
        semantic_scores_ms_flip(
            model, random_image(40, 100), short_sides=(32, 64, 27), long_side_max=120, pad_multiple=pad_multiple
        )
        assert [tuple(x.shape[2:]) for x in model.seen] == [s for s in expected for _ in range(2)]


@pytest.mark.parametrize("short_side", [30, 75, 160])
def test_views_are_whole_grey_levels_and_resized_as_at_a_single_scale(short_side: int) -> None:
    image, model = torch.randint(256, (3, 60, 80), dtype=torch.uint8), Pooled()
    semantic_scores_ms_flip(model, image, short_sides=[short_side], long_side_max=999, pad_multiple=1)
    levels = model.seen[0][0] * torch.tensor(STD_RGB).view(3, 1, 1) + torch.tensor(MEAN_RGB).view(3, 1, 1)
    assert (levels - levels.round()).abs().max() < 1e-3
    size = (short_side * 80 // 60, short_side)
    expected = cv2.resize(image.movedim(0, -1).numpy(), size, interpolation=cv2.INTER_LINEAR)
    assert np.abs(levels.round().movedim(0, -1).numpy() - expected).max() <= 1


def test_only_one_views_prediction_exists_at_a_time() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    class Watched(Pooled):
        def forward(self, *args, **kwargs) -> Prediction:
            assert not [ref for ref in alive if ref() is not None]
            self.seen.clear()
            prediction = super().forward(*args, **kwargs)
            alive.extend(weakref.ref(t) for t in prediction[:2])
            return prediction

    semantic_scores_ms_flip(Watched(), random_image(40, 53), short_sides=[32, 40, 48], long_side_max=100)
    assert len(alive) == 12


def test_a_mirrored_picture_has_mirrored_scores() -> None:
    torch.manual_seed(0)
    model = build_model(TINY).eval()
    image = random_image(64, 90)
    # twice the size: every grey level is a sum of sixteenths, so that mirrored views are equal to the last digit
    one, other = (
        semantic_scores_ms_flip(model, x, short_sides=[64, 128], long_side_max=180, size=(50, 70))
        for x in (image, image.flip(-1))
    )
    assert one.shape == (TINY.num_classes, 50, 70)
    assert not one.requires_grad
    assert (one - other).abs().max() > 1e-3
    torch.testing.assert_close(one, other.flip(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"short_sides": []}, "short_sides is empty; name at least one size"),
        ({"short_sides": [32, 0]}, r"short_sides \[32, 0\].* must all be at least 1"),
        ({"long_side_max": 0}, "long_side_max 0, .* must all be at least 1"),
        ({"pad_multiple": 0}, "pad_multiple 0 .* must all be at least 1"),
        ({"size": (0, 5)}, r"size \(0, 5\) must all be at least 1"),
        (
            {"image": torch.zeros(3, 32, 32)},
            r"\(3, 32, 32\) torch.float32; it must be \(3, height, width\) torch.uint8",
        ),
        ({"image": torch.zeros(32, 32, 3, dtype=torch.uint8)}, r"the image is \(32, 32, 3\)"),
        ({"image": torch.zeros(1, 3, 32, 32, dtype=torch.uint8)}, r"the image is \(1, 3, 32, 32\)"),
        ({"image": torch.zeros(3, 0, 32, dtype=torch.uint8)}, r"the image is \(3, 0, 32\)"),
    ],
)
def test_what_cannot_be_is_refused(changed, message) -> None:
    arguments = {"image": random_image(32, 32), "short_sides": [32], "long_side_max": 64, **changed}
    with pytest.raises(ValueError, match=message):
        semantic_scores_ms_flip(Pooled(), **arguments)


def test_it_is_imported_from_m2f_augmented_inference_too() -> None:
    from m2f import augmented_inference

    assert augmented_inference.semantic_scores_ms_flip is semantic_scores_ms_flip
