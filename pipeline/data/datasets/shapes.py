"""Generated road scenes with panoptic labels: a picture depends on (seed, split, index) only.

Colours do not tell the classes apart (asphalt, concrete, clouds and cars share greys; trees, hills and some houses
share greens and browns; every picture has its own light), so a network has to look at shape, texture and place.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from pipeline.data.images.codecs import IGNORE
from pipeline.data.records import Labelled, Record

if TYPE_CHECKING:
    from pipeline.params.schema import DatasetConfig

CLASS_NAMES = ("sky", "hill", "road", "pavement", "building", "tree", "car", "person", "sign")
SKY, HILL, ROAD, PAVEMENT, BUILDING, TREE, CAR, PERSON, SIGN = range(len(CLASS_NAMES))
THINGS = (CAR, PERSON, SIGN)

SLIVER_PIXELS = 24
"""Things of which less than this is seen belong to nothing: nobody could name them."""

Colour = tuple[float, float, float]
"""RGB, 0 to 255."""


def records(config: DatasetConfig, sources: Sequence[Path], split: str) -> list[Record]:
    """The split's records, to be drawn. ValueError says which key of `generate` is missing or too small."""
    if tuple(config.class_names) != CLASS_NAMES:
        raise ValueError(f"layout shapes draws the classes {', '.join(CLASS_NAMES)}; class_names lists others")
    for key, least in ((split, 1), ("height", 64), ("width", 64), ("seed", 0)):
        if config.generate.get(key, -1) < least:
            raise ValueError(f"generate.{key} is {config.generate.get(key)}; layout shapes needs at least {least}")
    size = (config.generate["height"], config.generate["width"])
    return [
        Record(
            name=f"{split}_{index:06d}",
            image_file=f"generated picture {split} {index}",
            label_file=f"generated labels {split} {index}",
            read=partial(_read, config.generate["seed"], split, index, size),
        )
        for index in range(config.generate[split])
    ]


def _read(seed: int, split: str, index: int, size: tuple[int, int]) -> Labelled:
    image, segments, classes = draw(seed, split, index, size)
    done, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
    assert done
    return Labelled(data.tobytes(), segments, classes)


def draw(seed: int, split: str, index: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """One scene of `size` (height, width): (h, w, 3) uint8 RGB, (h, w) uint8 segment ids, class of every id."""
    from m2f.draws import mix  # brings torch, which the other layouts' processes can do without

    rng = np.random.default_rng(mix(seed, zlib.crc32(split.encode()), index))
    scene = _Scene(rng, size)
    _background(scene)
    _ground(scene)
    _objects(scene)
    _light(scene)
    return scene.image, *_tidy(scene)


class _Scene:
    """The picture being drawn: colours, segment ids, and the ground plane seen in perspective."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]) -> None:
        self.rng = rng
        self.height, self.width = size
        self.image = np.zeros((*size, 3), np.uint8)
        self.ids = np.zeros(size, np.uint8)
        self.classes: list[int] = []
        self.textures: list[tuple[float, float]] = []
        self.horizon = self.height * rng.uniform(0.34, 0.5)
        self.vanishing = self.width * rng.uniform(0.3, 0.7)
        self.road_middle = self.width * rng.uniform(0.4, 0.6)
        self.road_half = self.width * rng.uniform(0.32, 0.5)
        self.pavement = (rng.uniform(0.3, 0.6), rng.uniform(0.3, 0.6))
        self.stuff = [self.segment(class_id) for class_id in range(CAR)]

    def segment(self, class_id: int) -> int:
        """A new segment of class `class_id` with a texture of its own (fine, coarse amplitude)."""
        low, high = {TREE: (0.13, 0.24), HILL: (0.05, 0.14), ROAD: (0.03, 0.07), PAVEMENT: (0.03, 0.08)}.get(
            class_id, (0.0, 0.04)
        )
        self.classes.append(class_id)
        self.textures.append((self.rng.uniform(low, high), self.rng.uniform(0.02, 0.12)))
        return len(self.classes) - 1

    def ground(self, across: float, near: float) -> tuple[float, float]:
        """(x, y) of a point on the ground: across -1..1 is the road, near 0 the horizon and 1 the lower edge."""
        bottom = self.road_middle + across * self.road_half
        return self.vanishing + (bottom - self.vanishing) * near, self.horizon + (self.height - self.horizon) * near

    def polygon(self, points: Sequence[tuple[float, float]], colour: Colour, segment: int | None = None) -> None:
        """Fill a polygon of (x, y) points; without `segment` only the colour changes, not the labels."""
        corners = np.round(np.array(points) * 16).astype(np.int32)
        cv2.fillPoly(self.image, [corners], colour, cv2.LINE_8, 4)
        if segment is not None:
            cv2.fillPoly(self.ids, [corners], segment, cv2.LINE_8, 4)

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: Colour, segment: int | None = None) -> None:
        """Fill an upright rectangle."""
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour, segment)

    def ellipse(
        self, x: float, y: float, radius_x: float, radius_y: float, colour: Colour, segment: int | None = None
    ) -> None:
        """Fill an ellipse."""
        angles = np.linspace(0, 2 * np.pi, 20, endpoint=False)
        outline = zip(x + radius_x * np.cos(angles), y + radius_y * np.sin(angles), strict=True)
        self.polygon(list(outline), colour, segment)


def _pick(rng: np.random.Generator, colours: Sequence[Colour], spread: float = 14.0) -> Colour:
    """One of `colours`, varied."""
    base = np.array(colours[int(rng.integers(len(colours)))]) + rng.normal(0, spread) + rng.normal(0, spread / 2, 3)
    red, green, blue = np.clip(base, 4, 251)
    return float(red), float(green), float(blue)


def _shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = (min(255.0, value * factor) for value in colour)
    return red, green, blue


SKIES = ((105, 155, 215), (170, 195, 222), (188, 188, 186), (205, 168, 140), (132, 138, 150))
GREENS = ((82, 108, 58), (110, 128, 70), (62, 88, 60), (132, 128, 78), (128, 104, 66))
GREYS = ((92, 92, 96), (124, 122, 120), (72, 74, 78), (148, 144, 138))
STONES = ((150, 146, 140), (172, 164, 150), (128, 126, 124), (150, 124, 108), (104, 102, 104))
WALLS = (
    (168, 160, 148),
    (146, 92, 72),
    (122, 124, 128),
    (204, 196, 180),
    (124, 138, 112),
    (140, 160, 188),
    (96, 80, 70),
)
PAINTS = ((186, 186, 188), (64, 66, 70), (232, 232, 230), (158, 44, 40), (52, 78, 138), (74, 98, 72), (168, 146, 96))
CLOTHES = (*PAINTS, (40, 42, 60), (120, 84, 60), (190, 120, 60))
SKINS = ((224, 180, 150), (168, 120, 90), (104, 72, 54))
PLATES = ((190, 40, 44), (40, 84, 170), (226, 200, 60), (236, 236, 232), (50, 128, 78))


def _noise(rng: np.random.Generator, size: tuple[int, int], cell: int) -> np.ndarray:
    """Smooth noise of about unit spread, (h, w) float32, with features of `cell` pixels."""
    height, width = size
    small = rng.standard_normal((height // cell + 2, width // cell + 2)).astype(np.float32)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def _background(scene: _Scene) -> None:
    rng, height, width = scene.rng, scene.height, scene.width
    top = np.array(_pick(rng, SKIES))
    bottom = np.clip(top + rng.uniform(-10, 60), 0, 255)
    ramp = np.clip(np.arange(height) / scene.horizon, 0, 1)[:, None, None]
    clouds = np.clip(_noise(rng, (height, width), height // 7) - rng.uniform(0, 1.2), 0, 1)[..., None]
    white = rng.uniform(170, 245)
    sky = (top * (1 - ramp) + bottom * ramp) * (1 - 0.8 * clouds) + white * 0.8 * clouds
    scene.image[:] = np.clip(sky, 0, 255)
    scene.ids[:] = scene.stuff[SKY]

    across = np.linspace(0, 1, 25)
    for distance in range(int(rng.integers(1, 3)), 0, -1):
        waves = sum(
            rng.uniform(0.3, 1) / rate * np.sin(2 * np.pi * (rate * across * 0.8 + rng.uniform())) for rate in (1, 2, 4)
        )
        crest = scene.horizon - height * (rng.uniform(0.02, 0.07) + 0.05 * distance * (1 + waves))
        crest = np.minimum(crest, scene.horizon - 2)
        colour = _pick(rng, (*GREENS, (118, 130, 150)))
        outline = [(0.0, height), *zip(across * width, crest, strict=True), (width, height)]
        scene.polygon(outline, _shade(colour, 1 + 0.15 * (distance - 1)), scene.stuff[HILL])


def _ground(scene: _Scene) -> None:
    rng, height, width = scene.rng, scene.height, scene.width
    grass = _pick(rng, GREENS)
    scene.box(-1, scene.horizon, width, height, grass, scene.stuff[HILL])

    def strip(
        left: float, right: float, colour: Colour, segment: int | None, near: float = 1.02, far: float = 0.0
    ) -> None:
        ground = scene.ground
        scene.polygon([ground(left, far), ground(right, far), ground(right, near), ground(left, near)], colour, segment)

    stone = _pick(rng, STONES)
    for side, breadth in ((-1, scene.pavement[0]), (1, scene.pavement[1])):
        strip(side, side * (1 + breadth), stone, scene.stuff[PAVEMENT])
        near = 0.05
        while near < 1.0:  # joints between the slabs
            near *= 1.22
            strip(side, side * (1 + breadth), _shade(stone, 0.84), None, near, near * 0.985)
        strip(side * 1.0, side * 1.05, _shade(stone, rng.uniform(0.7, 1.25)), None)

    asphalt = _pick(rng, GREYS)
    strip(-1, 1, asphalt, scene.stuff[ROAD])
    if rng.uniform() < 0.35:  # a repaired patch
        middle, near = rng.uniform(-0.6, 0.6), rng.uniform(0.25, 0.9)
        strip(middle - 0.3, middle + 0.3, _shade(asphalt, rng.uniform(0.75, 1.2)), None, near, near * 0.7)
    paint = _shade((235, 232, 222), rng.uniform(0.7, 1.05))
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


def _objects(scene: _Scene) -> None:
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


def _shadow(scene: _Scene, x: float, y: float, radius_x: float, radius_y: float) -> None:
    """Darken the ground under a thing; labels stay the ground's."""
    mask = np.zeros(scene.ids.shape, np.uint8)
    box = (x * 16, y * 16, radius_x * 16, radius_y * 16)
    x16, y16, radius_x16, radius_y16 = (round(float(value)) for value in box)
    cv2.ellipse(mask, (x16, y16), (radius_x16, radius_y16), 0, 0, 360, 1, cv2.FILLED, cv2.LINE_8, 4)
    dark = mask.astype(bool)
    scene.image[dark] = (scene.image[dark] * 0.55).astype(np.uint8)


def _building(scene: _Scene, x: float, y: float, near: float, side: int) -> None:
    """A house front beside the pavement and its face along the road."""
    rng = scene.rng
    breadth = scene.width * rng.uniform(0.35, 0.7) * near
    tall = scene.height * rng.uniform(0.7, 1.5) * near
    depth = rng.uniform(0.2, 0.45)  # how far the face along the road reaches towards the vanishing point
    wall = _pick(rng, WALLS)
    segment = scene.stuff[BUILDING]
    far_x, far_y = x + (scene.vanishing - x) * depth, y + (scene.horizon - y) * depth
    far_top = (y - tall) + (scene.horizon - (y - tall)) * depth
    face = _shade(wall, rng.uniform(0.6, 0.85))
    scene.polygon([(x, y), (x, y - tall), (far_x, far_top), (far_x, far_y)], face, segment)
    x0, x1 = sorted((x, x + side * breadth))
    scene.box(x0, y - tall, x1, y, wall, segment)
    if rng.uniform() < 0.5:
        roof = _pick(rng, ((96, 60, 50), (70, 72, 78), (120, 116, 112)))
        scene.polygon([(x0, y - tall), ((x0 + x1) / 2, y - tall * 1.22), (x1, y - tall)], roof, segment)
    pane = _pick(rng, ((60, 70, 84), (150, 176, 200), (40, 40, 44), (222, 206, 150)))
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
            scene.polygon(corners, _shade(pane, 0.75))


def _tree(scene: _Scene, x: float, y: float, near: float, side: int) -> None:
    """A trunk under a crown of blobs, or a fir."""
    rng = scene.rng
    tall = scene.height * rng.uniform(0.9, 1.3) * near
    bark, leaf = _pick(rng, ((84, 66, 50), (60, 54, 50), (120, 110, 98))), _pick(rng, (*GREENS, (150, 90, 50)))
    segment = scene.stuff[TREE]
    _shadow(scene, x, y, tall * 0.3, tall * 0.05)
    half = max(1.6, tall * 0.05)
    scene.box(x - half, y - tall * 0.5, x + half, y, bark, segment)
    if rng.uniform() < 0.3:
        for step in range(3):
            low, spread = y - tall * (0.15 + 0.25 * step), tall * (0.3 - 0.07 * step)
            scene.polygon(
                [(x - spread, low), (x, low - tall * 0.42), (x + spread, low)], _shade(leaf, 0.8 + 0.12 * step), segment
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
            _shade(leaf, rng.uniform(0.7, 1.2)),
            segment,
        )


def _car(scene: _Scene, x: float, y: float, near: float, side: int) -> None:
    """A car from behind or in front: body, cabin with glass, wheels, lights."""
    rng = scene.rng
    tall = max(12.0, scene.height * rng.uniform(0.36, 0.5) * near)
    half = tall * rng.uniform(0.58, 0.78)
    paint, segment = _pick(rng, PAINTS), scene.segment(CAR)
    _shadow(scene, x, y, half * 1.15, tall * 0.12)
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
    scene.polygon(cabin, _shade(paint, 0.92), segment)
    body = [(x - half * 0.92, belt), (x + half * 0.92, belt), (x + half, y - tall * 0.36), (x + half, y - tall * 0.12)]
    scene.polygon([*body, (x - half, y - tall * 0.12), (x - half, y - tall * 0.36)], paint, segment)
    glass = _pick(rng, ((48, 56, 66), (130, 150, 170), (30, 32, 36)))
    scene.polygon(
        [
            (x - half * 0.52, roof + tall * 0.08),
            (x + half * 0.52, roof + tall * 0.08),
            (x + half * 0.76, belt),
            (x - half * 0.76, belt),
        ],
        glass,
    )
    lamp = _pick(rng, ((190, 30, 30), (244, 240, 214)), 6)
    for lamp_side in (-1, 1):
        scene.box(
            x + lamp_side * half * 0.78 - half * 0.14,
            y - tall * 0.46,
            x + lamp_side * half * 0.78 + half * 0.14,
            y - tall * 0.34,
            lamp,
        )
    scene.box(x - half * 0.22, y - tall * 0.3, x + half * 0.22, y - tall * 0.2, (226, 224, 214))


def _person(scene: _Scene, x: float, y: float, near: float, side: int) -> None:
    """A standing or walking person: head, jacket, two legs."""
    rng = scene.rng
    tall = max(22.0, scene.height * rng.uniform(0.5, 0.62) * near)
    half = tall * rng.uniform(0.22, 0.27)
    jacket, trousers, skin = _pick(rng, CLOTHES), _pick(rng, CLOTHES), _pick(rng, SKINS, 8)
    segment, stride = scene.segment(PERSON), half * rng.uniform(0.2, 0.9)
    _shadow(scene, x, y, half * 1.2, tall * 0.05)
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
    scene.box(x - half * 0.12, neck, x + half * 0.12, hip, _shade(jacket, 0.75))
    scene.ellipse(x, y - tall * 0.9, tall * 0.095, tall * 0.105, skin, segment)
    scene.ellipse(
        x,
        y - tall * 0.95,
        tall * 0.095,
        tall * 0.06,
        _pick(rng, ((40, 32, 28), (120, 90, 60), (150, 150, 150))),
        segment,
    )


def _sign(scene: _Scene, x: float, y: float, near: float, side: int) -> None:
    """A traffic sign on its pole: disc, triangle, square or octagon with a mark inside."""
    rng = scene.rng
    tall = max(28.0, scene.height * rng.uniform(0.62, 0.78) * near)
    radius = max(6.5, tall * rng.uniform(0.18, 0.22))
    segment, plate, mark = (
        scene.segment(SIGN),
        _pick(rng, PLATES, 8),
        _pick(rng, ((240, 240, 236), (40, 40, 44), (190, 40, 44)), 6),
    )
    half, centre = max(1.2, tall * 0.03), y - tall + radius
    scene.box(x - half, centre, x + half, y, _pick(rng, ((128, 128, 130), (90, 88, 84))), segment)
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


def _light(scene: _Scene) -> None:
    """Texture, haze, cast shadows, a gradient of light, tint, blur and the camera's noise."""
    rng, size = scene.rng, (scene.height, scene.width)
    amplitude = np.array(scene.textures, np.float32)[scene.ids]
    fine = cv2.GaussianBlur(rng.standard_normal(size).astype(np.float32), (0, 0), 0.8) * 2.2
    texture = 1 + amplitude[..., 0] * fine + amplitude[..., 1] * _noise(rng, size, max(2, scene.height // 12))

    for _ in range(rng.integers(0, 3)):  # shadows of what stands outside the picture
        shadow = np.zeros(size, np.uint8)
        start, lean = rng.uniform(-0.2, 1.0) * scene.width, rng.uniform(-0.4, 0.4) * scene.width
        breadth = rng.uniform(0.1, 0.3) * scene.width
        near = rng.uniform(0.5, 1.0) * scene.height
        far = scene.horizon + rng.uniform(0.05, 0.4) * (scene.height - scene.horizon)
        corners = [(start, near), (start + breadth, near), (start + breadth * 0.6 + lean, far), (start + lean, far)]
        cv2.fillPoly(shadow, [np.round(np.array(corners)).astype(np.int32)], 1)
        soft = cv2.GaussianBlur(shadow.astype(np.float32), (0, 0), 1.2)
        texture *= 1 - rng.uniform(0.25, 0.5) * soft

    rows, columns = np.mgrid[-1 : 1 : size[0] * 1j, -1 : 1 : size[1] * 1j].astype(np.float32)
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.3)
    light = texture * (1 + strength * (np.cos(angle) * columns + np.sin(angle) * rows)) * rng.uniform(0.65, 1.15)
    tint = 1 + rng.uniform(-0.1, 0.1, 3).astype(np.float32)
    image = scene.image.astype(np.float32)
    haze = rng.uniform(0, 0.25) * np.exp(-np.abs(rows * size[0] / 2 + size[0] / 2 - scene.horizon) / (0.18 * size[0]))
    image = image * (1 - haze[..., None]) + rng.uniform(150, 220) * haze[..., None]
    image = cv2.GaussianBlur(image * light[..., None] * tint, (0, 0), rng.uniform(0.45, 0.8))
    image += rng.standard_normal(image.shape).astype(np.float32) * rng.uniform(2, 6)
    scene.image = np.clip(image + 0.5, 0, 255).astype(np.uint8)


def _tidy(scene: _Scene) -> tuple[np.ndarray, tuple[int, ...]]:
    """Ids without gaps for what is seen; slivers of things become 255."""
    counts = np.bincount(scene.ids.ravel(), minlength=len(scene.classes))
    lookup = np.full(256, IGNORE, np.uint8)
    kept = [
        old for old, class_id in enumerate(scene.classes) if counts[old] >= (SLIVER_PIXELS if class_id in THINGS else 1)
    ]
    lookup[kept] = np.arange(len(kept))
    return lookup[scene.ids], tuple(scene.classes[old] for old in kept)
