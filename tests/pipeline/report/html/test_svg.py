from __future__ import annotations

import re
from itertools import combinations

import pytest

from pipeline.params.load import load_params
from pipeline.params.schema import Params
from pipeline.report.html.svg import Mark, Point, line_chart, log_ticks, scatter, small_strip, strip, thinned, ticks
from tests.helpers.shared import PROJECT


@pytest.fixture(scope="module")
def params() -> Params:
    """The project's."""
    return load_params(PROJECT / "params.yaml")


def test_ticks_are_round_and_enclose_the_values() -> None:
    assert ticks(0.0, 600.0) == [0, 200, 400, 600]
    assert ticks(68.9, 71.2) == [68.5, 69, 69.5, 70, 70.5, 71, 71.5]
    assert ticks(5.0, 5.0) == [4.4, 4.6, 4.8, 5.0, 5.2, 5.4, 5.6]


def test_a_long_curve_keeps_its_last_point_and_the_means_of_pieces() -> None:
    # 7 points, 4 wanted: three pieces of two, and the last.
    points = [(float(x), 10.0 * x) for x in range(7)]
    assert thinned(points, 4) == [(0.5, 5.0), (2.5, 25.0), (4.5, 45.0), (6.0, 60.0)]
    assert thinned(points, 7) == points


def test_labels_of_close_points_do_not_collide(params: Params) -> None:
    # The published points of ADE20K: r101 and swin-t lie 0.85 pictures/s and 0.06 mIoU apart.
    rows = {name: row.published for name, row in params.rows.items() if name.startswith("ade20k")}
    points = [
        Point(
            name=name.rpartition("_")[2],
            published=Mark(speed=figures["inf_fps"], value=figures["miou"]),
            ours=Mark(speed=figures["inf_fps"] + 0.4, value=figures["miou"] + 0.2),
        )
        for name, figures in rows.items()
    ]
    chart = scatter(points, x_label="pictures/s", label="")
    boxes = [
        (float(x), float(x) + 6.6 * len(text), float(y) - 11, float(y) + 3)
        for x, y, text in re.findall(r'<text class="name" x="([\d.]+)" y="([\d.]+)" text-anchor="start">(.*?)<', chart)
    ]
    assert len(boxes) == 7
    for a, b in combinations(boxes, 2):
        assert a[1] <= b[0] or b[1] <= a[0] or a[3] <= b[2] or b[3] <= a[2]
    assert all(left >= 0 and right <= 400 for left, right, _, _ in boxes)


def test_dots_of_equal_seeds_are_stacked() -> None:
    chart = strip({0: 50.0, 1: 50.0, 2: 60.0}, dict.fromkeys(range(3), "#000"), label="")
    assert re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', chart) == ["62.0", "54.0", "62.0"]


def test_a_seed_beyond_the_axis_is_drawn_at_its_end() -> None:
    chart = small_strip([-9.0, 0.0], -4.5, reach=5.0, margin=1.0, label="")
    assert re.findall(r'<circle class="seed" cx="([\d.]+)"', chart) == ["6.0", "60.0"]


def test_ticks_of_losses_are_1_2_and_5_times_powers_of_ten() -> None:
    assert log_ticks(8.0, 90.0) == [5, 10, 20, 50, 100]
    assert log_ticks(1.0, 1.0) == [1, 2]


def test_a_chart_without_points_is_none() -> None:
    assert line_chart([], label="") == ""
