"""Curves as they are shown."""

from __future__ import annotations

from pipeline.runs.curve_file import thinned


def test_a_long_curve_keeps_its_last_point_and_the_means_of_pieces() -> None:
    # 7 points, 4 wanted: three pieces of two, and the last.
    points = [(float(x), 10.0 * x) for x in range(7)]
    assert thinned(points, 4) == [(0.5, 5.0), (2.5, 25.0), (4.5, 45.0), (6.0, 60.0)]
    assert thinned(points, 7) == points
