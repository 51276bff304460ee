from __future__ import annotations

import cv2
import numpy as np
import pytest

from pipeline.data.images.resize import resize_image, resized_size
from tests.helpers.images import mirror


@pytest.mark.parametrize(
    ("size", "short_side", "long_side_max", "expected"),
    [
        ((360, 480), 512, 2048, (512, 683)),  # 480 * 512 / 360 = 682.67
        ((480, 360), 512, 2048, (683, 512)),
        ((100, 500), 200, 800, (160, 800)),  # 500 * 2 = 1000 > 800, so the scale is 1.6
        ((3, 5), 5, 100, (5, 8)),  # 5 * 5 / 3 = 8.33
        ((2, 5), 1, 100, (1, 3)),  # 2.5 is rounded up
        ((1, 500), 8, 100, (1, 100)),  # never less than one pixel
    ],
)
def test_the_short_side_is_scaled_and_the_long_side_is_capped(
    size: tuple[int, int], short_side: int, long_side_max: int, expected: tuple[int, int]
) -> None:
    assert resized_size(*size, short_side=short_side, long_side_max=long_side_max) == expected


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("pattern", ["noise", "chessboard"])
def test_a_resized_part_is_that_part_of_the_resized_picture(pattern: str, mirrored: bool) -> None:
    # black beside white everywhere: where samples lie 1 / 100 pixel aside, grey is 2.55 levels off
    random = np.random.default_rng(0)
    exact = 0
    for trial in range(600):
        height, width = random.integers(1, 120, 2).tolist()
        size = tuple(random.integers(1, 260, 2).tolist())
        if trial % 2:
            scale = random.uniform(0.2, 3)
            size = max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
        black = np.add.outer(np.arange(height), np.arange(width)) % 2
        if pattern == "noise":
            black = random.integers(0, 2, (height, width))
        image = np.repeat((black * 255).astype(np.uint8)[..., None], 3, 2)
        image.setflags(write=False)  # like a memory map
        top, left = random.integers(0, size[0]), random.integers(0, size[1])
        part = slice(top, top + random.integers(1, 80)), slice(left, left + random.integers(1, 80))
        whole = cv2.resize(mirror(image, mirrored), size[::-1], interpolation=cv2.INTER_LINEAR)[part]
        shown = resize_image(image, size, part, mirrored=mirrored)
        assert shown.shape == whole.shape
        difference = np.abs(shown.astype(int) - whole).max()
        assert difference <= 2, (height, width, size, part)
        exact += difference == 0
    assert exact > 400


@pytest.mark.parametrize("short_side", [512, 614, 716, 819, 921, 1024, 1126, 1228, 1331, 1433, 1536, 1638, 1945, 2048])
def test_the_recipes_sizes_of_cityscapes_are_cropped_as_the_whole(short_side: int) -> None:
    random = np.random.default_rng(short_side)
    image = cv2.resize(random.integers(0, 256, (256, 512, 3), np.uint8), (2048, 1024), interpolation=cv2.INTER_CUBIC)
    size = (short_side, 2 * short_side)
    whole = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    for _ in range(3):
        top, left = random.integers(0, size[0] - 511), random.integers(0, size[1] - 1023)
        part = slice(top, top + 512), slice(left, left + 1024)
        shown = resize_image(image, size, part)
        assert shown.shape == (512, 1024, 3)
        assert np.abs(shown.astype(int) - whole[part]).max() <= 2


def test_nothing_but_the_parts_rows_and_columns_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    # what lies around them is replaced, and so is what new memory holds, and the part is the same to the bit
    random = np.random.default_rng(0)
    for _ in range(100):
        height, width = random.integers(60, 120, 2).tolist()
        image = random.integers(0, 256, (height, width, 3), np.uint8)
        scale = random.uniform(0.5, 2)
        size = int(height * scale), int(width * scale)
        part = slice(10, 30), slice(15, 40)
        first = [max(0, int((kept.start + 0.5) / scale - 0.5) - 2) for kept in part]
        last = [int((kept.stop + 0.5) / scale + 0.5) + 2 for kept in part]
        other = random.integers(0, 256, image.shape, np.uint8)
        inside = slice(first[0], last[0]), slice(first[1], last[1])
        other[inside] = image[inside]
        shown = []
        for content, filling in ((image, 0), (other, 255)):
            monkeypatch.setattr(np, "empty", lambda shape, dtype, filling=filling: np.full(shape, filling, dtype))
            shown.append(resize_image(content, size, part))
            monkeypatch.undo()
        np.testing.assert_array_equal(*shown)
