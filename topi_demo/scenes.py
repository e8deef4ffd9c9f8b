"""Procedural scenes: anti-aliased shapes over a textured gradient.

A `Scene` is plain data in relative coordinates (0 to 1 from the left and from the top), so the same
scene can be drawn at any size and every edit of it has an exact expected image (`edits.py`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RGB = tuple[float, float, float]

SHAPES = ("circle", "square", "triangle", "star")
COLOURS: dict[str, RGB] = {
    "red": (0.88, 0.14, 0.14),
    "orange": (0.97, 0.55, 0.08),
    "yellow": (0.97, 0.90, 0.16),
    "green": (0.13, 0.68, 0.22),
    "cyan": (0.10, 0.78, 0.85),
    "blue": (0.14, 0.28, 0.90),
    "purple": (0.56, 0.18, 0.80),
    "white": (0.96, 0.96, 0.96),
}
BACKGROUNDS: dict[str, RGB] = {
    "gray": (0.50, 0.50, 0.50),
    "pink": (0.82, 0.55, 0.62),
    "brown": (0.48, 0.36, 0.26),
    "olive": (0.48, 0.52, 0.28),
    "teal": (0.26, 0.52, 0.52),
    "navy": (0.20, 0.24, 0.44),
}


@dataclass(frozen=True)
class Object:
    """One shape; `x`, `y`, `radius` in units of the image's side."""

    shape: str
    colour: RGB
    striped: bool
    x: float
    y: float
    radius: float
    stripe_angle: float


@dataclass(frozen=True)
class Scene:
    """A background and two to four objects of different shapes."""

    background: RGB
    gradient_angle: float
    gradient: float
    texture_angle: float
    texture_cycles: float
    texture_phase: float
    objects: tuple[Object, ...]
    zoom: float = 1.0

    def find(self, shape: str) -> Object | None:
        return next((o for o in self.objects if o.shape == shape), None)


def free(x: float, y: float, radius: float, others: Sequence[Object]) -> bool:
    """Whether a shape fits at (x, y): inside the image and clear of the other shapes."""
    margin = radius + 0.02
    if not (margin <= x <= 1 - margin and margin <= y <= 1 - margin):
        return False
    return all(math.hypot(x - o.x, y - o.y) >= 1.05 * (radius + o.radius) for o in others)


def random_scene(rng: random.Random, shapes: Sequence[str] = ()) -> Scene:
    """A scene that holds at least `shapes`, two to four objects in all."""
    rest = [s for s in SHAPES if s not in shapes]
    rng.shuffle(rest)
    count = rng.randint(max(2, len(shapes)), 4)
    wanted = list(shapes) + rest[: count - len(shapes)]
    rng.shuffle(wanted)
    colours = rng.sample(list(COLOURS.values()), len(wanted))
    objects: list[Object] = []
    for shape, colour in zip(wanted, colours, strict=True):
        radius = rng.uniform(0.11, 0.17)
        while True:
            x, y = rng.random(), rng.random()
            if free(x, y, radius, objects):
                break
            radius = max(0.09, radius * 0.99)
        objects.append(Object(shape, colour, rng.random() < 0.5, x, y, radius, rng.uniform(0, math.pi)))
    return Scene(
        background=rng.choice(list(BACKGROUNDS.values())),
        gradient_angle=rng.uniform(0, 2 * math.pi),
        gradient=rng.uniform(0.1, 0.3),
        texture_angle=rng.uniform(0, math.pi),
        texture_cycles=rng.uniform(1.5, 5.0),
        texture_phase=rng.uniform(0, 2 * math.pi),
        objects=tuple(objects),
    )


def _distance(shape: str, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Signed distance of the points to the shape's border; inside is negative."""
    if shape == "circle":
        return torch.hypot(x, y) - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.85 * radius
    if shape == "triangle":
        return torch.maximum(math.sqrt(0.75) * x.abs() - 0.5 * y, y) - 0.5 * radius
    points, inner = 5, 0.45
    fold = math.pi / points
    angle = torch.atan2(x, -y)
    angle = (angle - 2 * fold * torch.round(angle / (2 * fold))).abs()
    length = torch.hypot(x, y)
    px, py = length * torch.cos(angle), length * torch.sin(angle)
    tip = (radius, 0.0)
    notch = (inner * radius * math.cos(fold), inner * radius * math.sin(fold))
    ex, ey = notch[0] - tip[0], notch[1] - tip[1]
    norm = math.hypot(ex, ey)
    return ((px - tip[0]) * ey - (py - tip[1]) * ex) / norm


def draw(scene: Scene, size: int) -> Tensor:
    """The scene as an image [3, size, size] in 0..1; borders are anti-aliased by their distance."""
    axis = ((torch.arange(size) + 0.5) / size - 0.5) / scene.zoom + 0.5
    y, x = axis[:, None], axis[None, :]

    along = (x - 0.5) * math.cos(scene.gradient_angle) + (y - 0.5) * math.sin(scene.gradient_angle)
    wave = x * math.cos(scene.texture_angle) + y * math.sin(scene.texture_angle)
    shade = scene.gradient * along + 0.05 * torch.sin(2 * math.pi * scene.texture_cycles * wave + scene.texture_phase)
    image = torch.tensor(scene.background)[:, None, None] + shade

    pixels = size * scene.zoom
    for o in scene.objects:
        # only the pixels around the shape are touched
        reach = 1.1 * o.radius
        rows = slice(*_span(o.y - reach, o.y + reach, axis))
        cols = slice(*_span(o.x - reach, o.x + reach, axis))
        dx, dy = (x[:, cols] - o.x), (y[rows] - o.y)
        distance = _distance(o.shape, dx.expand(dy.shape[0], -1), dy.expand(-1, dx.shape[1]), o.radius)
        cover = (0.5 - distance * pixels).clamp(0, 1)
        colour = torch.tensor(o.colour)[:, None, None]
        if o.striped:
            across = dx * math.cos(o.stripe_angle) + dy * math.sin(o.stripe_angle)
            stripe = (0.5 + 2.5 * torch.sin(2 * math.pi * across / (0.8 * o.radius))).clamp(0, 1)
            colour = colour * (1 - 0.6 * stripe)
        image[:, rows, cols] = image[:, rows, cols] * (1 - cover) + colour * cover
    return image.clamp(0, 1)


def coverage(o: Object, grid: int, fine: int = 4) -> Tensor:
    """The share of each cell of a grid over the (not zoomed) image that the shape covers, by `fine` squared samples."""
    axis = (torch.arange(grid * fine) + 0.5) / (grid * fine)
    inside = _distance(
        o.shape, (axis - o.x).expand(len(axis), -1), (axis - o.y)[:, None].expand(-1, len(axis)), o.radius
    )
    return torch.nn.functional.avg_pool2d((inside < 0).float()[None], fine)[0]


def _span(low: float, high: float, axis: Tensor) -> tuple[int, int]:
    inside = ((axis >= low) & (axis <= high)).nonzero()
    return (0, 0) if len(inside) == 0 else (int(inside[0]), int(inside[-1]) + 1)
