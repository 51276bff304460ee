"""Coast scenes: the sea from a beach, with boats, buoys, rocks and parasols.

As in the street, colours do not tell the classes apart: water and sky share blues and greys, sand, rocks and dry hills
share browns, and sails, clouds and foam share white.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from pipeline.data.datasets.shapes.canvas import (
    PAINTS,
    STONES,
    Canvas,
    Colour,
    Scene,
    paint_hills,
    paint_shadow,
    paint_sky,
    pick,
    shade,
)

CLASS_NAMES = ("sky", "hill", "water", "sand", "rock", "boat", "buoy", "parasol")
SKY, HILL, WATER, SAND, ROCK, BOAT, BUOY, PARASOL = range(len(CLASS_NAMES))
THINGS = (BOAT, BUOY, PARASOL)

_ROUGH = {HILL: (0.05, 0.14), WATER: (0.02, 0.08), SAND: (0.04, 0.09), ROCK: (0.09, 0.2)}

WATERS = ((84, 118, 142), (112, 142, 156), (62, 92, 108), (96, 118, 104), (142, 150, 156), (120, 160, 200))
SANDS = ((208, 188, 150), (186, 166, 130), (168, 152, 128), (150, 138, 122), (130, 118, 84))
SAILS = ((236, 232, 224), (216, 200, 172), (188, 70, 60), (70, 98, 150), (190, 190, 190))
FLOATS = ((206, 60, 44), (226, 180, 60), (60, 120, 80), (232, 230, 226), (60, 64, 72))
CLOTHS = (*FLOATS, (70, 110, 170), (214, 140, 150))


class _Coast(Canvas):
    """The picture, and the sea between horizon and shore."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]) -> None:
        super().__init__(rng, size, horizon=size[0] * rng.uniform(0.3, 0.42), rough=_ROUGH)
        self.stuff = [self.segment(class_id) for class_id in range(BOAT)]
        self.across = np.linspace(0, 1, 33)
        bends = sum(
            rng.uniform(0.1, 0.5) / n * np.sin(2 * np.pi * (n * self.across + rng.uniform())) for n in (1, 2, 3)
        )
        middle = rng.uniform(0.58, 0.74) + rng.uniform(-0.16, 0.16) * (self.across - 0.5)
        self.shore = self.height * (middle + 0.06 * bends)
        """The row of the shore at every place `across`."""

    def shore_at(self, x: float) -> float:
        """The row of the shore in column `x`."""
        return float(np.interp(x / self.width, self.across, self.shore))

    def near(self, y: float) -> float:
        """How near the ground in a row is: 0 at the horizon, 1 at the lower edge."""
        return (y - self.horizon) / (self.height - self.horizon)


def draw(rng: np.random.Generator, size: tuple[int, int]) -> Canvas:
    """A scene of `size` (height, width), before light and noise."""
    scene = _Coast(rng, size)
    paint_sky(scene, scene.stuff[SKY])
    if rng.uniform() < 0.75:
        paint_hills(scene, scene.stuff[HILL])
    _water(scene)
    _beach(scene)
    _objects(scene)
    return scene


def _water(scene: _Coast) -> None:
    """The sea, darker towards the viewer, with streaks of waves."""
    rng, height, width = scene.rng, scene.height, scene.width
    far, near = pick(rng, WATERS), rng.uniform(0.7, 1.1)
    rows = np.linspace(scene.horizon, height, 13)
    for place, (top, bottom) in enumerate(pairwise(rows)):
        colour = shade(far, 1 + (near - 1) * place / 12)
        scene.box(-1, top, width + 1, bottom + 1, colour, scene.stuff[WATER])
    light = rng.uniform(1.08, 1.3) if rng.uniform() < 0.6 else rng.uniform(0.75, 0.92)
    for _ in range(rng.integers(10, 40)):
        y = rng.uniform(scene.horizon + 1, height)
        long, thick = width * rng.uniform(0.05, 0.3) * (0.2 + scene.near(y)), 0.4 + 2 * scene.near(y)
        scene.ellipse(rng.uniform(0, width), y, long / 2, thick / 2, shade(far, light * rng.uniform(0.95, 1.05)))


def _beach(scene: _Coast) -> None:
    """Sand below the shore, a strip of wet sand and foam along it."""
    rng, height, width = scene.rng, scene.height, scene.width
    sand = pick(rng, SANDS)
    edge = list(zip(scene.across * width, scene.shore, strict=True))

    def below(shift: float, colour: Colour, segment: int | None) -> None:
        shore = [(x, y + shift * height) for x, y in edge]
        scene.polygon(
            [(0.0, height + 1.0), *shore, (width + 1.0, shore[-1][1]), (width + 1.0, height + 1.0)], colour, segment
        )

    below(0.0, shade(sand, rng.uniform(0.62, 0.8)), scene.stuff[SAND])
    below(rng.uniform(0.02, 0.06), sand, None)
    foam = shade((236, 238, 236), rng.uniform(0.85, 1.0))
    for x, y in edge[:: int(rng.integers(1, 3))]:
        if rng.uniform() < 0.75:
            scene.ellipse(x, y - height * 0.012, width * rng.uniform(0.015, 0.04), height * 0.009, foam)
    for _ in range(rng.integers(0, 9)):  # footprints and wrack
        x = rng.uniform(0, width)
        y = rng.uniform(scene.shore_at(x) + height * 0.08, height)
        scene.ellipse(x, y, width * rng.uniform(0.005, 0.02), height * 0.006, shade(sand, rng.uniform(0.6, 0.85)))


def _objects(scene: _Coast) -> None:
    """Everything that stands in the water or on the sand, far things first so that near ones hide them."""
    rng, height, width = scene.rng, scene.height, scene.width
    planned: list[tuple[float, int, float]] = []  # y, class, x

    def at_sea(class_id: int, count: int, first: float, last: float) -> None:
        for _ in range(count):
            x = rng.uniform(0.06, 0.94) * width
            planned.append(
                (scene.horizon + (scene.shore_at(x) - scene.horizon) * rng.uniform(first, last), class_id, x)
            )

    at_sea(BOAT, int(rng.integers(1, 4)), 0.12, 0.8)
    at_sea(BUOY, int(rng.integers(0, 4)), 0.35, 0.9)
    at_sea(ROCK, int(rng.integers(0, 3)), 0.3, 1.0)
    for class_id, count in ((PARASOL, int(rng.integers(0, 4))), (ROCK, int(rng.integers(0, 3)))):
        for _ in range(count):
            x = rng.uniform(0.04, 0.96) * width
            planned.append((scene.shore_at(x) + (height - scene.shore_at(x)) * rng.uniform(0.3, 0.95), class_id, x))
    painters = {BOAT: _boat, BUOY: _buoy, ROCK: _rock, PARASOL: _parasol}
    for y, class_id, x in sorted(planned):
        painters[class_id](scene, x, y, scene.near(y))


def _boat(scene: _Coast, x: float, y: float, near: float) -> None:
    """A hull with sails or with a cabin, and its reflection."""
    rng = scene.rng
    long = max(16.0, scene.width * rng.uniform(0.34, 0.5) * near)
    hull, segment, bow = pick(rng, PAINTS), scene.segment(BOAT), rng.choice((-1.0, 1.0))
    deep = long * rng.uniform(0.13, 0.18)
    paint_shadow(scene, x, y + deep * 0.3, long * 0.5, deep * 0.5)
    if rng.uniform() < 0.6:
        mast, foot = long * rng.uniform(0.85, 1.2), y - deep * 0.8
        half = max(0.8, long * 0.015)
        scene.box(x - half, foot - mast, x + half, foot, shade((110, 92, 76), rng.uniform(0.7, 1.4)), segment)
        sail = pick(rng, SAILS)
        top, low = foot - mast * 0.96, foot - mast * 0.1
        scene.polygon([(x - bow * half, top), (x - bow * half, low), (x - bow * long * 0.42, low)], sail, segment)
        if rng.uniform() < 0.7:
            jib = shade(sail, rng.uniform(0.85, 1.1))
            scene.polygon(
                [(x + bow * half, top + mast * 0.1), (x + bow * half, low), (x + bow * long * 0.4, low)], jib, segment
            )
    else:
        tall, back = deep * rng.uniform(1.2, 1.8), x - bow * long * 0.22
        cabin, foot = shade(pick(rng, SAILS), 0.95), y - deep * 0.8
        front = x + bow * long * 0.16
        scene.polygon(
            [(back, foot), (back, foot - tall), (front - bow * tall * 0.3, foot - tall), (front, foot)], cabin, segment
        )
        glass = pick(rng, ((48, 56, 66), (130, 150, 170)))
        left, right = sorted((back + bow * long * 0.05, front - bow * tall * 0.45))
        scene.box(left, foot - tall * 0.8, right, foot - tall * 0.45, glass)
    deck = y - deep
    outline = [(x - bow * long * 0.46, deck), (x + bow * long * 0.56, deck - deep * 0.25)]
    scene.polygon([*outline, (x + bow * long * 0.4, y), (x - bow * long * 0.4, y)], hull, segment)
    scene.polygon(
        [*outline, (x + bow * long * 0.52, deck + deep * 0.1), (x - bow * long * 0.45, deck + deep * 0.3)],
        shade(hull, 1.25),
    )


def _buoy(scene: _Coast, x: float, y: float, near: float) -> None:
    """A float with a band: a ball, a cone or a can with a mark on top."""
    rng = scene.rng
    tall = max(9.0, scene.height * rng.uniform(0.16, 0.24) * near)
    half, colour, segment = tall * rng.uniform(0.34, 0.46), pick(rng, FLOATS), scene.segment(BUOY)
    band = shade(pick(rng, FLOATS), 0.95)
    paint_shadow(scene, x, y, half * 1.3, tall * 0.1)
    form = rng.integers(3)
    if form == 0:
        scene.ellipse(x, y - tall * 0.5, half, tall * 0.5, colour, segment)
        scene.box(x - half * 0.95, y - tall * 0.6, x + half * 0.95, y - tall * 0.42, band)
    elif form == 1:
        scene.polygon(
            [(x - half, y), (x + half, y), (x + half * 0.12, y - tall * 1.15), (x - half * 0.12, y - tall * 1.15)],
            colour,
            segment,
        )
        scene.polygon(
            [
                (x - half * 0.72, y - tall * 0.32),
                (x + half * 0.72, y - tall * 0.32),
                (x + half * 0.5, y - tall * 0.58),
                (x - half * 0.5, y - tall * 0.58),
            ],
            band,
        )
    else:
        scene.box(x - half * 0.8, y - tall * 0.7, x + half * 0.8, y, colour, segment)
        scene.box(x - half * 0.8, y - tall * 0.5, x + half * 0.8, y - tall * 0.28, band)
        scene.ellipse(x, y - tall * 0.9, half * 0.42, tall * 0.2, band, segment)


def _rock(scene: _Coast, x: float, y: float, near: float) -> None:
    """A boulder with edges, lit from above."""
    rng = scene.rng
    half = max(5.0, scene.width * rng.uniform(0.07, 0.17) * near)
    tall = half * rng.uniform(0.7, 1.3)
    colour, segment = pick(rng, (*STONES, (130, 112, 88))), scene.stuff[ROCK]
    paint_shadow(scene, x, y, half * 1.1, tall * 0.12)
    angles = np.linspace(0, np.pi, 8)
    reach = rng.uniform(0.75, 1.0, len(angles))
    outline = [(x + half * r * np.cos(a), y - tall * r * np.sin(a)) for a, r in zip(angles, reach, strict=True)]
    scene.polygon(outline, colour, segment)
    middle = (x + half * rng.uniform(-0.2, 0.2), y - tall * rng.uniform(0.25, 0.5))
    for place in range(len(outline) - 1):  # facets, darker towards the foot
        low = min(place, len(outline) - 2 - place)
        scene.polygon([outline[place], outline[place + 1], middle], shade(colour, rng.uniform(0.62, 0.8) + 0.12 * low))


def _parasol(scene: _Coast, x: float, y: float, near: float) -> None:
    """A parasol on its pole, in stripes of two colours, its shadow on the sand."""
    rng = scene.rng
    tall = max(18.0, scene.height * rng.uniform(0.36, 0.5) * near)
    half, rise = tall * rng.uniform(0.45, 0.6), tall * rng.uniform(0.3, 0.42)
    colours = (pick(rng, CLOTHS), pick(rng, CLOTHS))
    segment, lean, pole = scene.segment(PARASOL), rng.uniform(-0.12, 0.12) * tall, max(0.9, tall * 0.025)
    paint_shadow(scene, x + half * 0.5, y, half, tall * 0.08)
    top = (x + lean, y - tall)
    scene.polygon(
        [(x - pole, y), (x + pole, y), (top[0] + pole, top[1] + rise), (top[0] - pole, top[1] + rise)],
        (206, 200, 190),
        segment,
    )
    angles = np.linspace(np.pi, 2 * np.pi, 13)
    rim = [(top[0] + half * np.cos(a), top[1] + rise + rise * np.sin(a)) for a in angles]
    scene.polygon(rim, colours[0], segment)
    feet = np.linspace(-half, half, 7)
    for place in range(0, 6, 2):
        left, right = feet[place], feet[place + 1]
        bend = [(top[0] + 0.55 * foot, top[1] + rise * 0.28) for foot in (right, left)]
        scene.polygon([(top[0] + left, top[1] + rise), (top[0] + right, top[1] + rise), *bend], colours[1])


COAST = Scene(class_names=CLASS_NAMES, things=THINGS, draw=draw)
