"""Road scenes: a street with houses, seen along the road.

Colours do not tell the classes apart (asphalt, concrete, clouds and cars share greys; trees, hills and some houses
share greens and browns; every picture has its own light), so a network has to look at shape, texture and place.
"""

from __future__ import annotations

import numpy as np

from pipeline.data.datasets.shapes.canvas import (
    GREENS,
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

CLASS_NAMES = ("sky", "hill", "road", "pavement", "building", "tree", "car", "person", "sign")
SKY, HILL, ROAD, PAVEMENT, BUILDING, TREE, CAR, PERSON, SIGN = range(len(CLASS_NAMES))
THINGS = (CAR, PERSON, SIGN)

_ROUGH = {TREE: (0.13, 0.24), HILL: (0.05, 0.14), ROAD: (0.03, 0.07), PAVEMENT: (0.03, 0.08)}

GREYS = ((92, 92, 96), (124, 122, 120), (72, 74, 78), (148, 144, 138))
WALLS = (
    (168, 160, 148),
    (146, 92, 72),
    (122, 124, 128),
    (204, 196, 180),
    (124, 138, 112),
    (140, 160, 188),
    (96, 80, 70),
)
CLOTHES = (*PAINTS, (40, 42, 60), (120, 84, 60), (190, 120, 60))
SKINS = ((224, 180, 150), (168, 120, 90), (104, 72, 54))
PLATES = ((190, 40, 44), (40, 84, 170), (226, 200, 60), (236, 236, 232), (50, 128, 78))


class _Street(Canvas):
    """The picture, and the ground plane seen in perspective."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]) -> None:
        super().__init__(rng, size, horizon=size[0] * rng.uniform(0.34, 0.5), rough=_ROUGH)
        self.vanishing = self.width * rng.uniform(0.3, 0.7)
        self.road_middle = self.width * rng.uniform(0.4, 0.6)
        self.road_half = self.width * rng.uniform(0.32, 0.5)
        self.pavement = (rng.uniform(0.3, 0.6), rng.uniform(0.3, 0.6))
        self.stuff = [self.segment(class_id) for class_id in range(CAR)]

    def ground(self, across: float, near: float) -> tuple[float, float]:
        """(x, y) of a point on the ground: across -1..1 is the road, near 0 the horizon and 1 the lower edge."""
        bottom = self.road_middle + across * self.road_half
        return self.vanishing + (bottom - self.vanishing) * near, self.horizon + (self.height - self.horizon) * near


def draw(rng: np.random.Generator, size: tuple[int, int]) -> Canvas:
    """A scene of `size` (height, width), before light and noise."""
    scene = _Street(rng, size)
    paint_sky(scene, scene.stuff[SKY])
    paint_hills(scene, scene.stuff[HILL])
    _ground(scene)
    _objects(scene)
    return scene


def _ground(scene: _Street) -> None:
    rng, height, width = scene.rng, scene.height, scene.width
    grass = pick(rng, GREENS)
    scene.box(-1, scene.horizon, width, height, grass, scene.stuff[HILL])

    def strip(
        left: float, right: float, colour: Colour, segment: int | None, near: float = 1.02, far: float = 0.0
    ) -> None:
        ground = scene.ground
        scene.polygon([ground(left, far), ground(right, far), ground(right, near), ground(left, near)], colour, segment)

    stone = pick(rng, STONES)
    for side, breadth in ((-1, scene.pavement[0]), (1, scene.pavement[1])):
        strip(side, side * (1 + breadth), stone, scene.stuff[PAVEMENT])
        near = 0.05
        while near < 1.0:  # joints between the slabs
            near *= 1.22
            strip(side, side * (1 + breadth), shade(stone, 0.84), None, near, near * 0.985)
        strip(side * 1.0, side * 1.05, shade(stone, rng.uniform(0.7, 1.25)), None)

    asphalt = pick(rng, GREYS)
    strip(-1, 1, asphalt, scene.stuff[ROAD])
    if rng.uniform() < 0.35:  # a repaired patch
        middle, near = rng.uniform(-0.6, 0.6), rng.uniform(0.25, 0.9)
        strip(middle - 0.3, middle + 0.3, shade(asphalt, rng.uniform(0.75, 1.2)), None, near, near * 0.7)
    paint = shade((235, 232, 222), rng.uniform(0.7, 1.05))
    if rng.uniform() < 0.8:
        for side in (-1, 1):
            strip(side * 0.93, side * 0.9, paint, None)
    for middle in (0.0,) if rng.uniform() < 0.6 else (-0.33, 0.33):
        near = rng.uniform(0.05, 0.07)
        while near < 1.0:
            strip(middle - 0.022, middle + 0.022, paint, None, near * 1.25, near)
            near *= 1.6
    if rng.uniform() < 0.3:  # a crossing
        near = rng.uniform(0.35, 0.8)
        for middle in np.arange(-0.85, 0.9, 0.2):
            strip(middle - 0.05, middle + 0.05, paint, None, near * 1.16, near)


def _objects(scene: _Street) -> None:
    """Everything that stands on the ground, far things first so that near ones hide them."""
    rng = scene.rng
    planned: list[tuple[float, int, float]] = []  # near, class, across
    for side, breadth in ((-1, scene.pavement[0]), (1, scene.pavement[1])):
        edge = 1 + breadth
        near = rng.uniform(0.1, 0.2)
        while near < 0.75 and rng.uniform() < 0.85:
            planned.append((near, BUILDING, side * (edge + rng.uniform(0.02, 0.25))))
            near *= rng.uniform(1.25, 1.9)
        near = rng.uniform(0.3, 0.42)
        while near < 0.9:  # along the pavement, far enough from each other to be seen
            class_id = rng.choice((TREE, PERSON, SIGN, ROAD), p=(0.35, 0.3, 0.25, 0.1))
            low, high = {TREE: (edge - 0.2, edge + 0.05), PERSON: (1.1, edge), SIGN: (1.04, 1.15)}.get(class_id, (0, 0))
            if class_id != ROAD:
                planned.append((near, int(class_id), side * rng.uniform(low, high)))
            near *= rng.uniform(1.3, 1.7)
    planned += [(rng.uniform(0.22, 0.85), CAR, rng.choice((-0.62, -0.3, 0.3, 0.62))) for _ in range(rng.integers(1, 4))]
    if rng.uniform() < 0.25:
        planned.append((rng.uniform(0.4, 0.8), PERSON, rng.uniform(-0.7, 0.7)))
    painters = {BUILDING: _building, TREE: _tree, CAR: _car, PERSON: _person, SIGN: _sign}
    for near, class_id, across in sorted(planned):
        painters[class_id](scene, *scene.ground(across, near), near, 1 if across > 0 else -1)


def _building(scene: _Street, x: float, y: float, near: float, side: int) -> None:
    """A house front beside the pavement and its face along the road."""
    rng = scene.rng
    breadth = scene.width * rng.uniform(0.35, 0.7) * near
    tall = scene.height * rng.uniform(0.7, 1.5) * near
    depth = rng.uniform(0.2, 0.45)  # how far the face along the road reaches towards the vanishing point
    wall = pick(rng, WALLS)
    segment = scene.stuff[BUILDING]
    far_x, far_y = x + (scene.vanishing - x) * depth, y + (scene.horizon - y) * depth
    far_top = (y - tall) + (scene.horizon - (y - tall)) * depth
    face = shade(wall, rng.uniform(0.6, 0.85))
    scene.polygon([(x, y), (x, y - tall), (far_x, far_top), (far_x, far_y)], face, segment)
    x0, x1 = sorted((x, x + side * breadth))
    scene.box(x0, y - tall, x1, y, wall, segment)
    if rng.uniform() < 0.5:
        roof = pick(rng, ((96, 60, 50), (70, 72, 78), (120, 116, 112)))
        scene.polygon([(x0, y - tall), ((x0 + x1) / 2, y - tall * 1.22), (x1, y - tall)], roof, segment)
    pane = pick(rng, ((60, 70, 84), (150, 176, 200), (40, 40, 44), (222, 206, 150)))
    columns, floors = int(rng.integers(2, 5)), int(rng.integers(2, 5))
    for column in range(columns):
        for floor in range(floors):
            left = x0 + breadth * (column + 0.25) / columns
            top = y - tall * (floor + 0.8) / floors
            scene.box(left, top, left + breadth * 0.5 / columns, top + tall * 0.5 / floors, pane)
    for floor in range(floors):  # windows along the road, two per floor, in perspective
        for start in (0.15, 0.6):
            corners = []
            for along, up in ((start, 0.3), (start, 0.8), (start + 0.25, 0.8), (start + 0.25, 0.3)):
                share = along * depth
                height_y = y - tall * (floor + up) / floors
                corners.append((x + (scene.vanishing - x) * share, height_y + (scene.horizon - height_y) * share))
            scene.polygon(corners, shade(pane, 0.75))


def _tree(scene: _Street, x: float, y: float, near: float, side: int) -> None:
    """A trunk under a crown of blobs, or a fir."""
    rng = scene.rng
    tall = scene.height * rng.uniform(0.9, 1.3) * near
    bark, leaf = pick(rng, ((84, 66, 50), (60, 54, 50), (120, 110, 98))), pick(rng, (*GREENS, (150, 90, 50)))
    segment = scene.stuff[TREE]
    paint_shadow(scene, x, y, tall * 0.3, tall * 0.05)
    half = max(1.6, tall * 0.05)
    scene.box(x - half, y - tall * 0.5, x + half, y, bark, segment)
    if rng.uniform() < 0.3:
        for step in range(3):
            low, spread = y - tall * (0.15 + 0.25 * step), tall * (0.3 - 0.07 * step)
            scene.polygon(
                [(x - spread, low), (x, low - tall * 0.42), (x + spread, low)], shade(leaf, 0.8 + 0.12 * step), segment
            )
        return
    for _ in range(8):
        shift_x, shift_y = rng.normal(0, 0.12, 2) * tall
        radius = tall * rng.uniform(0.15, 0.23)
        scene.ellipse(
            x + shift_x,
            y - tall * 0.7 + shift_y * 0.8,
            radius,
            radius * 0.85,
            shade(leaf, rng.uniform(0.7, 1.2)),
            segment,
        )


def _car(scene: _Street, x: float, y: float, near: float, side: int) -> None:
    """A car from behind or in front: body, cabin with glass, wheels, lights."""
    rng = scene.rng
    tall = max(12.0, scene.height * rng.uniform(0.36, 0.5) * near)
    half = tall * rng.uniform(0.58, 0.78)
    paint, segment = pick(rng, PAINTS), scene.segment(CAR)
    paint_shadow(scene, x, y, half * 1.15, tall * 0.12)
    tyre: Colour = (28.0, 28.0, 30.0)
    for wheel in (-1, 1):
        scene.box(
            x + wheel * half * 0.72 - half * 0.17,
            y - tall * 0.25,
            x + wheel * half * 0.72 + half * 0.17,
            y,
            tyre,
            segment,
        )
    roof, belt = y - tall, y - tall * 0.55
    cabin = [(x - half * 0.62, roof), (x + half * 0.62, roof), (x + half * 0.9, belt), (x - half * 0.9, belt)]
    scene.polygon(cabin, shade(paint, 0.92), segment)
    body = [(x - half * 0.92, belt), (x + half * 0.92, belt), (x + half, y - tall * 0.36), (x + half, y - tall * 0.12)]
    scene.polygon([*body, (x - half, y - tall * 0.12), (x - half, y - tall * 0.36)], paint, segment)
    glass = pick(rng, ((48, 56, 66), (130, 150, 170), (30, 32, 36)))
    scene.polygon(
        [
            (x - half * 0.52, roof + tall * 0.08),
            (x + half * 0.52, roof + tall * 0.08),
            (x + half * 0.76, belt),
            (x - half * 0.76, belt),
        ],
        glass,
    )
    lamp = pick(rng, ((190, 30, 30), (244, 240, 214)), 6)
    for lamp_side in (-1, 1):
        scene.box(
            x + lamp_side * half * 0.78 - half * 0.14,
            y - tall * 0.46,
            x + lamp_side * half * 0.78 + half * 0.14,
            y - tall * 0.34,
            lamp,
        )
    scene.box(x - half * 0.22, y - tall * 0.3, x + half * 0.22, y - tall * 0.2, (226, 224, 214))


def _person(scene: _Street, x: float, y: float, near: float, side: int) -> None:
    """A standing or walking person: head, jacket, two legs."""
    rng = scene.rng
    tall = max(22.0, scene.height * rng.uniform(0.5, 0.62) * near)
    half = tall * rng.uniform(0.22, 0.27)
    jacket, trousers, skin = pick(rng, CLOTHES), pick(rng, CLOTHES), pick(rng, SKINS, 8)
    segment, stride = scene.segment(PERSON), half * rng.uniform(0.2, 0.9)
    paint_shadow(scene, x, y, half * 1.2, tall * 0.05)
    hip, neck, leg = y - tall * 0.46, y - tall * 0.82, half * 0.38
    for foot in (-1, 1):
        foot_x = x + foot * stride
        scene.polygon(
            [
                (x + foot * half * 0.1 - leg, hip),
                (x + foot * half * 0.1 + leg, hip),
                (foot_x + leg, y),
                (foot_x - leg, y),
            ],
            trousers,
            segment,
        )
    scene.polygon([(x - half * 0.85, neck), (x + half * 0.85, neck), (x + half, hip), (x - half, hip)], jacket, segment)
    scene.box(x - half * 0.12, neck, x + half * 0.12, hip, shade(jacket, 0.75))
    scene.ellipse(x, y - tall * 0.9, tall * 0.095, tall * 0.105, skin, segment)
    scene.ellipse(
        x,
        y - tall * 0.95,
        tall * 0.095,
        tall * 0.06,
        pick(rng, ((40, 32, 28), (120, 90, 60), (150, 150, 150))),
        segment,
    )


def _sign(scene: _Street, x: float, y: float, near: float, side: int) -> None:
    """A traffic sign on its pole: disc, triangle, square or octagon with a mark inside."""
    rng = scene.rng
    tall = max(28.0, scene.height * rng.uniform(0.62, 0.78) * near)
    radius = max(6.5, tall * rng.uniform(0.18, 0.22))
    segment, plate, mark = (
        scene.segment(SIGN),
        pick(rng, PLATES, 8),
        pick(rng, ((240, 240, 236), (40, 40, 44), (190, 40, 44)), 6),
    )
    half, centre = max(1.2, tall * 0.03), y - tall + radius
    scene.box(x - half, centre, x + half, y, pick(rng, ((128, 128, 130), (90, 88, 84))), segment)
    drawing = rng.integers(4)
    if drawing == 0:
        scene.ellipse(x, centre, radius, radius, plate, segment)
        scene.ellipse(x, centre, radius * 0.62, radius * 0.62, mark)
    elif drawing == 1:
        for share, colour, owner in ((1.15, plate, segment), (0.6, mark, None)):
            corners = [
                (x + share * radius * np.sin(angle), centre - share * radius * np.cos(angle))
                for angle in (0, 2.1, 4.18)
            ]
            scene.polygon(corners, colour, owner)
    elif drawing == 2:
        scene.box(x - radius, centre - radius, x + radius, centre + radius, plate, segment)
        scene.polygon(
            [
                (x - radius * 0.5, centre + radius * 0.5),
                (x, centre - radius * 0.6),
                (x + radius * 0.5, centre + radius * 0.5),
            ],
            mark,
        )
    else:
        corners = [
            (x + radius * 1.05 * np.cos(angle), centre + radius * 1.05 * np.sin(angle))
            for angle in np.pi / 8 + np.arange(8) * np.pi / 4
        ]
        scene.polygon(corners, plate, segment)
        scene.box(x - radius * 0.65, centre - radius * 0.2, x + radius * 0.65, centre + radius * 0.2, mark)


STREET = Scene(class_names=CLASS_NAMES, things=THINGS, draw=draw)
