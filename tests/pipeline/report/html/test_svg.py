from __future__ import annotations

import re

from pipeline.report.html.svg import Mark, Point, line_chart, log_ticks, scatter, small_strip, strip, ticks


def test_ticks_are_round_and_enclose_the_values() -> None:
    assert ticks(0.0, 600.0) == [0, 200, 400, 600]
    assert ticks(68.9, 71.2) == [68.5, 69, 69.5, 70, 70.5, 71, 71.5]
    assert ticks(5.0, 5.0) == [4.4, 4.6, 4.8, 5.0, 5.2, 5.4, 5.6]


def test_marks_of_speed_and_figure_hold_the_numbers_of_their_rows() -> None:
    points = [
        Point(name="r50", published=Mark(speed=9.0, value=80.0), ours=Mark(speed=9.5, value=80.2, low=80.0, high=80.4)),
        Point(name="swin-t", published=Mark(speed=7.0, value=81.0)),
        Point(name="tiny", ours=Mark(speed=3.0, value=70.0)),
    ]
    chart = scatter(points, x_label="images/s", label="mIoU & speed")
    assert re.findall(r'<text class="number (\w+)"[^>]*>(\d)<', chart) == [
        ("hollow", "1"), ("ours", "1"), ("hollow", "2"), ("ours", "3"),
    ]  # fmt: skip
    assert (chart.count('class="join"'), chart.count('class="interval"')) == (1, 1)
    assert chart.startswith('<svg class="chart scatter"') and "<title>mIoU &amp; speed</title>" in chart


def test_the_published_figure_and_the_authors_stand_in_lines_of_their_own() -> None:
    chart = strip({0: 50.0}, {0: "#000"}, label="", published=50.0, authors=50.01, margin=1.0)
    assert re.findall(r'<text [^>]*y="([\d.]+)"[^>]*>(published|authors)', chart) == [
        ("12.0", "published"), ("27.0", "authors"),
    ]  # fmt: skip


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
