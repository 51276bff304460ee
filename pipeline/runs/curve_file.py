"""curve.jsonl: the points of a training, one JSON line each.

A point is {"step": 50, "loss": 3.1, "time_ms": 1700000000000}.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

from pipeline.storage.stores import StoredPath

CURVE_POINTS = 120
"""A longer curve is drawn as the means of this many pieces."""


def point_line(step: int, metrics: Mapping[str, float], time_ms: int) -> str:
    """A point as a line of its file, without its end. A value that is not finite is null."""
    values = {key: float(value) if math.isfinite(value) else None for key, value in metrics.items()}
    return json.dumps({"step": step, **values, "time_ms": time_ms})


def read_points(lines: Sequence[str]) -> list[dict[str, Any]]:
    """The points in lines of a file. A torn last line is left out, as is one that holds no value."""
    points = []
    for line in lines:
        with suppress(json.JSONDecodeError):
            point = json.loads(line) if line.endswith("\n") else None
            if isinstance(point, dict) and "step" in point and point.keys() - {"step", "time_ms"}:
                points.append(point)
    return points


def read_curve(path: StoredPath) -> list[dict[str, Any]]:
    """The points of a curve file, {"step": 50, "loss": 3.1}, oldest first; none if there is no file. A torn last line
    is left out."""
    return [{key: value for key, value in point.items() if key != "time_ms"} for point in read_points(lines_of(path))]


def lines_of(path: StoredPath) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        return []


def thinned(points: Sequence[tuple[float, float]], limit: int = CURVE_POINTS) -> list[tuple[float, float]]:
    """At most `limit` points: means of consecutive pieces, as equal as can be; the last point stays as it is."""
    if len(points) <= limit:
        return list(points)
    *rest, last = points
    bounds = [round(i * len(rest) / (limit - 1)) for i in range(limit)]
    pieces = [rest[a:b] for a, b in pairwise(bounds)]
    return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in pieces] + [last]
