from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from pycocotools import mask

from pipeline.data.images import masks

SIZE = (6, 8)


def decoded(counts: bytes, size: tuple[int, int] = SIZE) -> np.ndarray:
    found: np.ndarray = mask.decode({"size": list(size), "counts": counts})
    return found


@pytest.mark.parametrize("beyond", [0.5, 1, 1.0])
def test_a_polygon_up_to_a_pixel_outside_ends_at_the_border(beyond: float) -> None:
    polygon = [-beyond, -beyond, 8 + beyond, -beyond, 8 + beyond, 2, -beyond, 2]  # the upper two rows
    expected = np.zeros(SIZE)
    expected[:2] = 1
    np.testing.assert_array_equal(decoded(masks.run_lengths([polygon], SIZE)), expected)


def test_a_polygon_in_the_pixel_beside_the_picture_has_no_pixel() -> None:
    assert masks.mask_extent(masks.run_lengths([[8, 1, 9, 1, 9, 5, 8, 5]], SIZE), SIZE) == (0, (0, 0, 0, 0))


@pytest.mark.parametrize(
    ("polygon", "message"),
    [
        ([1, 1, 4, 1, 4, 3, 1], "has 7 numbers, the last 1; they must be pairs of x and y"),
        ([1, 1, 4], "has 3 numbers"),
        ([1, 1, 4, float("nan"), 4, 3], "has y nan, but its image is 6 x 8"),
        ([1, 1, float("inf"), 1, 4, 3], "has x inf, but"),
        ([1, 1, 2e8, 1, 4, 3], "has x 200000000.0, but its image is 6 x 8"),
        ([1, 1, 4, -(10**400), 4, 3], "has y -1000.*000, but"),
        ([1, 1, 9.01, 1, 4, 3], r"has x 9\.01, but"),
        ([1, -1.5, 4, 1, 4, 3], r"has y -1\.5, but"),
        ([1, 1, 4, float("nan")], "has y nan, but"),  # of two points
        ([1, 1, "4", 1, 4, 3], "holds '4', which is not a number"),
        ([1, 1, None, 1, 4, 3], "holds None, which is not a number"),
        ([1, 1, True, 1, 4, 3], "holds True, which is not a number"),
        ([[1, 1], [4, 1], [4, 3]], r"holds \[1, 1\], which is not a number"),
    ],
)
def test_a_polygon_that_is_not_what_was_meant_is_named(polygon: list[Any], message: str) -> None:
    right = [1, 1, 4, 1, 4, 3]
    with pytest.raises(ValueError, match=f"^polygon 1 of its segmentation {message}"):
        masks.run_lengths([right, polygon], SIZE)


def test_an_outline_that_would_take_all_memory_is_refused() -> None:
    size = (10_000, 10_000)
    zigzag = [0, 0, 10_000, 10_000] * 1000  # 2,000 edges of 10,000 pixels
    with pytest.raises(ValueError, match="has 2,000 points and an outline of more than 8,388,608 pixels"):
        masks.run_lengths([zigzag], size)
    circle = np.linspace(0, 2 * np.pi, 10_000)
    round_one = np.stack([5000 + 4000 * np.cos(circle), 5000 + 4000 * np.sin(circle)], 1).ravel().tolist()
    pixels = masks.mask_extent(masks.run_lengths([round_one], size), size).pixels
    assert pixels == pytest.approx(np.pi * 4000**2, rel=1e-3)


WHOLE = "they must be whole numbers from 0 to 48"


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (None, "neither a list of polygons nor run lengths with size and counts: None"),
        ([1, 1, 4, 1, 4, 3], r"neither a list of polygons nor run lengths with size and counts: \[1, 1, 4"),
        ({"size": [6, 8]}, "neither a list of polygons nor"),
        ({"size": 48, "counts": [48]}, "its run lengths are for 48 "),
        ({"size": [10**9, 10**9], "counts": [10**18]}, "are for 1000000000 x 1000000000 .*, its image is 6 x 8"),
        ({"size": [6, 8], "counts": [40]}, r"do not cover 6 x 8"),
        ({"size": [6, 8], "counts": []}, r"do not cover 6 x 8"),
        ({"size": [6, 8], "counts": [50, -2]}, f"its run lengths hold 50; {WHOLE}"),
        ({"size": [6, 8], "counts": [49, -1]}, f"its run lengths hold 49; {WHOLE}"),
        ({"size": [6, 8], "counts": [40, float("nan")]}, f"its run lengths hold nan; {WHOLE}"),
        ({"size": [6, 8], "counts": [40, 7.5]}, r"its run lengths hold 7\.5"),
        ({"size": [6, 8], "counts": [2**32, 48]}, f"its run lengths hold 4294967296; {WHOLE}"),
        ({"size": [6, 8], "counts": [40, "8"]}, f"its run lengths hold '8'; {WHOLE}"),
        ({"size": [6, 8], "counts": 10**12}, "have the counts 1000000000000; they must be a list, or text"),
        ({"size": [6, 8], "counts": None}, "have the counts None; they must be a list, or text"),
        ({"size": [6, 8], "counts": "é"}, "its compressed run lengths are not as pycocotools"),
        ({"size": [6, 8], "counts": "0"}, "its run lengths do not cover"),
    ],
)
def test_a_segmentation_of_no_known_form_is_named(segmentation: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        masks.run_lengths(segmentation, SIZE)


def test_run_lengths_as_a_list_and_compressed_are_the_same_mask() -> None:
    drawn = np.asfortranarray(np.random.default_rng(0).random(SIZE) < 0.4, np.uint8)
    compressed = mask.encode(drawn)["counts"]
    flat = drawn.ravel(order="F")
    ends = [*np.flatnonzero(np.diff(flat)) + 1, 48]
    runs = np.diff([0, *ends]).tolist()
    listed: dict[str, Any] = {"size": [6, 8], "counts": [0, *runs] if flat[0] else runs}
    assert masks.run_lengths(listed, SIZE) == compressed
    assert masks.run_lengths({**listed, "counts": [float(run) for run in listed["counts"]]}, SIZE) == compressed
    assert masks.run_lengths({"size": [6.0, 8], "counts": compressed.decode()}, SIZE) == compressed


def test_compressed_run_lengths_are_checked_as_pycocotools_reads_them() -> None:
    rng = np.random.default_rng(0)
    for share in (0, 0.001, 0.1, 0.5, 0.9, 1):
        drawn = np.asfortranarray(rng.random((300, 211)) < share, np.uint8)
        counts = mask.encode(drawn)["counts"]
        assert masks.mask_extent(counts, (300, 211)).pixels == drawn.sum()
        with pytest.raises(ValueError, match="do not cover"):
            masks.mask_extent(counts, (211, 299))
    for wrong in (b"\x00", b"\xff", b"o", b"0" + b"o" * 9 + b"0"):
        with pytest.raises(ValueError, match="compressed run lengths"):
            masks.mask_extent(wrong, (300, 211))


def test_the_extent_of_a_mask_is_that_of_its_pixels() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        drawn = np.zeros((7, 9), np.uint8, order="F")
        rows, columns = np.sort(rng.integers(0, 8, 2)), np.sort(rng.integers(0, 10, 2))
        drawn[rows[0] : rows[1], columns[0] : columns[1]] = (
            rng.random((rows[1] - rows[0], columns[1] - columns[0])) < 0.7
        )
        there = np.argwhere(drawn)
        (top, left), (bottom, right) = (there.min(0), there.max(0) + 1) if len(there) else ((0, 0), (0, 0))
        extent = masks.mask_extent(mask.encode(drawn)["counts"], (7, 9))
        assert extent == (len(there), (left, top, right, bottom))


def test_runs_of_no_pixel_do_not_widen_a_box() -> None:
    # down the columns of 6: nothing at pixel 3, then pixels 12 to 14, which are rows 0 to 2 of column 2
    counts = masks.run_lengths({"size": [6, 8], "counts": [3, 0, 9, 3, 33]}, SIZE)
    assert masks.mask_extent(counts, SIZE) == (3, (2, 0, 3, 3))


CHILD = """
import json, sys
from pipeline.data.images.masks import mask_extent, run_lengths
for segmentation in json.loads(sys.stdin.read()):
    try:
        mask_extent(run_lengths(segmentation, (6, 8)), (6, 8))
        print("mask")
    except ValueError as error:
        print("sentence")
"""


def test_no_segmentation_ends_a_process() -> None:
    rng = np.random.default_rng(2)
    odd = [float("nan"), float("inf"), -float("inf"), 2e8, -1, -0.5, 8.5, 2**31, 2**63, 10**40, 0, 3, 8, 1e-300]
    tried: list[Any] = []
    for _ in range(300):
        numbers = [odd[place] for place in rng.integers(0, len(odd), rng.integers(0, 9))]
        inside = rng.uniform(-1, 7, 2 * rng.integers(0, 6)).tolist()
        text = "".join(map(chr, rng.integers(40, 120, rng.integers(0, 9))))
        tried += [[numbers], [inside], [inside, numbers]]
        tried += [{"size": [6, 8], "counts": counts} for counts in (numbers, text, [*numbers[:1], 48])]
    ended = subprocess.run([sys.executable, "-c", CHILD], input=json.dumps(tried), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    said = ended.stdout.split()
    assert len(said) == len(tried)
    assert {"mask", "sentence"} == set(said)
