"""What every generated scene is drawn with: the picture and its labels, colours, sky, hills, light and noise."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from pipeline.data.images.codecs import IGNORE

SLIVER_PIXELS = 24
"""Things of which less than this is seen belong to nothing: nobody could name them."""

Colour = tuple[float, float, float]
"""RGB, 0 to 255."""

SKIES = ((105, 155, 215), (170, 195, 222), (188, 188, 186), (205, 168, 140), (132, 138, 150))
GREENS = ((82, 108, 58), (110, 128, 70), (62, 88, 60), (132, 128, 78), (128, 104, 66))
STONES = ((150, 146, 140), (172, 164, 150), (128, 126, 124), (150, 124, 108), (104, 102, 104))
PAINTS = ((186, 186, 188), (64, 66, 70), (232, 232, 230), (158, 44, 40), (52, 78, 138), (74, 98, 72), (168, 146, 96))


class Canvas:
    """The picture being drawn: colours, segment ids and the texture of every segment.

    `horizon`: the row of the horizon. `rough`: amplitude of the fine texture of some classes, from and to.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        size: tuple[int, int],
        *,
        horizon: float,
        rough: Mapping[int, tuple[float, float]],
    ) -> None:
        self.rng, self.horizon, self.rough = rng, horizon, rough
        self.height, self.width = size
        self.image = np.zeros((*size, 3), np.uint8)
        self.ids = np.zeros(size, np.uint8)
        self.classes: list[int] = []
        self.textures: list[tuple[float, float]] = []

    def segment(self, class_id: int) -> int:
        """A new segment of class `class_id` with a texture of its own (fine, coarse amplitude)."""
        low, high = self.rough.get(class_id, (0.0, 0.04))
        self.classes.append(class_id)
        self.textures.append((self.rng.uniform(low, high), self.rng.uniform(0.02, 0.12)))
        return len(self.classes) - 1

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


@dataclass(frozen=True)
class Scene:
    """What can be drawn."""

    class_names: tuple[str, ...]
    things: tuple[int, ...]
    """Classes with a segment for each object."""
    draw: Callable[[np.random.Generator, tuple[int, int]], Canvas]
    """A scene of a size (height, width), before light and noise."""


def pick(rng: np.random.Generator, colours: Sequence[Colour], spread: float = 14.0) -> Colour:
    """One of `colours`, varied."""
    base = np.array(colours[int(rng.integers(len(colours)))]) + rng.normal(0, spread) + rng.normal(0, spread / 2, 3)
    red, green, blue = np.clip(base, 4, 251)
    return float(red), float(green), float(blue)


def shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = (min(255.0, value * factor) for value in colour)
    return red, green, blue


def noise(rng: np.random.Generator, size: tuple[int, int], cell: int) -> np.ndarray:
    """Smooth noise of about unit spread, (h, w) float32, with features of `cell` pixels."""
    height, width = size
    small = rng.standard_normal((height // cell + 2, width // cell + 2)).astype(np.float32)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def paint_sky(scene: Canvas, segment: int) -> None:
    """Fill the picture with a sky with clouds."""
    rng, height, width = scene.rng, scene.height, scene.width
    top = np.array(pick(rng, SKIES))
    bottom = np.clip(top + rng.uniform(-10, 60), 0, 255)
    ramp = np.clip(np.arange(height) / scene.horizon, 0, 1)[:, None, None]
    clouds = np.clip(noise(rng, (height, width), height // 7) - rng.uniform(0, 1.2), 0, 1)[..., None]
    white = rng.uniform(170, 245)
    sky = (top * (1 - ramp) + bottom * ramp) * (1 - 0.8 * clouds) + white * 0.8 * clouds
    scene.image[:] = np.clip(sky, 0, 255)
    scene.ids[:] = segment


def paint_hills(scene: Canvas, segment: int) -> None:
    """One or two ranges of hills at the horizon."""
    rng, height, width = scene.rng, scene.height, scene.width
    across = np.linspace(0, 1, 25)
    for distance in range(int(rng.integers(1, 3)), 0, -1):
        waves = sum(
            rng.uniform(0.3, 1) / rate * np.sin(2 * np.pi * (rate * across * 0.8 + rng.uniform())) for rate in (1, 2, 4)
        )
        crest = scene.horizon - height * (rng.uniform(0.02, 0.07) + 0.05 * distance * (1 + waves))
        crest = np.minimum(crest, scene.horizon - 2)
        colour = pick(rng, (*GREENS, (118, 130, 150)))
        outline = [(0.0, height), *zip(across * width, crest, strict=True), (width, height)]
        scene.polygon(outline, shade(colour, 1 + 0.15 * (distance - 1)), segment)


def paint_shadow(scene: Canvas, x: float, y: float, radius_x: float, radius_y: float) -> None:
    """Darken the ground under a thing; labels stay the ground's."""
    mask = np.zeros(scene.ids.shape, np.uint8)
    box = (x * 16, y * 16, radius_x * 16, radius_y * 16)
    x16, y16, radius_x16, radius_y16 = (round(float(value)) for value in box)
    cv2.ellipse(mask, (x16, y16), (radius_x16, radius_y16), 0, 0, 360, 1, cv2.FILLED, cv2.LINE_8, 4)
    dark = mask.astype(bool)
    scene.image[dark] = (scene.image[dark] * 0.55).astype(np.uint8)


def paint_light(scene: Canvas) -> None:
    """Texture, haze, cast shadows, a gradient of light, tint, blur and the camera's noise."""
    rng, size = scene.rng, (scene.height, scene.width)
    amplitude = np.array(scene.textures, np.float32)[scene.ids]
    fine = cv2.GaussianBlur(rng.standard_normal(size).astype(np.float32), (0, 0), 0.8) * 2.2
    texture = 1 + amplitude[..., 0] * fine + amplitude[..., 1] * noise(rng, size, max(2, scene.height // 12))

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


def tidy(scene: Canvas, things: Collection[int]) -> tuple[np.ndarray, tuple[int, ...]]:
    """Ids without gaps for what is seen; slivers of things become 255."""
    counts = np.bincount(scene.ids.ravel(), minlength=len(scene.classes))
    lookup = np.full(256, IGNORE, np.uint8)
    kept = [
        old for old, class_id in enumerate(scene.classes) if counts[old] >= (SLIVER_PIXELS if class_id in things else 1)
    ]
    lookup[kept] = np.arange(len(kept))
    return lookup[scene.ids], tuple(scene.classes[old] for old in kept)
