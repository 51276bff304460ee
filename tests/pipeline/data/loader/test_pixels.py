"""The loops of pixels.c beside OpenCV."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from m2f.kernels.build import source_digest
from pipeline.data.loader import pixels
from pipeline.data.loader.augmentation import Distortion
from pipeline.data.loader.pixels import distort_planes, label_counts

NEEDS_LOOPS = pytest.mark.skipif(
    pixels._loops() is None, reason="needs a C compiler, and an OpenCV that rounds as this processor's loops do"
)


def planes(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image.transpose(2, 0, 1))


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def opencv(image: np.ndarray, *, saturation: float | None = None, hue: int | None = None) -> np.ndarray:
    """The recipe's colour steps written with whole arrays."""
    if saturation is not None:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 1] = np.clip(hsv[..., 1].astype(np.float32) * np.float32(saturation), 0, 255).astype(np.uint8)
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if hue is not None:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(int) + hue) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return image


def test_the_digest_of_the_loops_is_that_of_the_file() -> None:
    assert source_digest(pixels.SOURCE) == pixels.LOOPS


def test_loops_whose_digest_is_another_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "LOOPS", "0" * 64)
    assert pixels._loops.__wrapped__() is None


@NEEDS_LOOPS
@pytest.mark.parametrize("drawn", [{"hue": 0}, {"hue": -18}, {"saturation": 0.5}, {"saturation": 1.5, "hue": 17}])
def test_all_colours_come_out_as_opencv_takes_them(drawn: dict[str, float]) -> None:
    # every fifth red with every green and blue: 52 * 256 rows of 256
    red, green, blue = np.meshgrid(np.arange(0, 256, 5), np.arange(256), np.arange(256), indexing="ij")
    image = np.stack([red, green, blue], axis=-1).astype(np.uint8).reshape(-1, 256, 3)
    found = planes(image)
    assert distort_planes(found, saturation=drawn.get("saturation"), hue=drawn.get("hue"))
    assert (found == planes(opencv(image, **drawn))).all()
    assert (found != planes(image)).any()


@NEEDS_LOOPS
def test_a_part_of_a_larger_plane_is_changed_alone() -> None:
    image = noise(9, 192)
    found = planes(image)
    assert distort_planes(found[:, 2:7, 64:128], saturation=None, hue=9)
    image[2:7, 64:128] = opencv(image[2:7, 64:128].copy(), hue=9)
    assert (found == planes(image)).all()


def test_rows_whose_last_pixels_opencv_rounds_otherwise_are_left_to_it() -> None:
    found = planes(noise(4, 70))
    before = found.copy()
    assert not distort_planes(found, saturation=1.2, hue=None)
    assert (found == before).all()


@pytest.mark.parametrize("width", [64, 70])
@pytest.mark.parametrize("contrast_first", [True, False])
@pytest.mark.parametrize("left_out", [(), ("brightness",), ("contrast",), ("saturation", "hue"), ("hue", "contrast")])
def test_a_distortion_in_place_is_that_of_the_picture(
    width: int, contrast_first: bool, left_out: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = {"brightness": -11.5, "contrast": 1.3, "saturation": 0.7, "hue": 5} | dict.fromkeys(left_out)
    distortion, image = Distortion(**drawn, contrast_first=contrast_first), noise(6, width)  # type: ignore[arg-type]
    expected = planes(distortion.of_image(image))
    whole, part = planes(image), planes(noise(8, width + 3))
    part[:, :6, :width] = whole
    rest = part[:, 6:].copy()
    distortion.in_place(whole)
    distortion.in_place(part[:, :6, :width])
    assert (whole == expected).all() and (part[:, :6, :width] == expected).all() and (part[:, 6:] == rest).all()
    monkeypatch.setattr(pixels, "_loops", lambda: None)
    without = planes(image)
    distortion.in_place(without)
    assert (without == expected).all()


@NEEDS_LOOPS
@pytest.mark.parametrize("ids", [
    np.array([[3] * 8 + [3] * 8 + [4, 3, 3, 3, 3, 3, 3, 3] + [255]]),  # two runs of eight, a mixed eight, one more
    np.arange(7)[None],  # shorter than eight
    np.random.default_rng(1).integers(0, 256, (13, 83)),
    np.repeat(np.arange(40), 29).reshape(20, 58),
])  # fmt: skip
def test_values_are_counted_as_numpy_counts_them(ids: np.ndarray) -> None:
    stored = ids.astype(np.uint8)
    assert label_counts(stored).tolist() == np.bincount(ids.ravel(), minlength=256)[:255].tolist()
    part = ids[:, 1:-1].ravel()
    assert label_counts(stored[:, 1:-1]).tolist() == np.bincount(part, minlength=256)[:255].tolist()


@pytest.mark.parametrize("with_loops", [True, False])
def test_pixels_of_nothing_are_not_counted(with_loops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_loops:
        monkeypatch.setattr(pixels, "_loops", lambda: None)
    ids = np.array([[0, 2, 2], [255, 255, 254]], np.uint8)
    counts = label_counts(ids)
    assert counts.dtype == np.int64 and len(counts) == 255
    assert {place: int(counts[place]) for place in np.flatnonzero(counts)} == {0: 1, 2: 2, 254: 1}
    assert len(label_counts(ids.astype(np.uint16))) == 65535  # of 16 bits OpenCV counts
