"""Procedural scenes: anti-aliased shapes over a gradient, flat or with fine random detail.

A `Scene` is plain data in relative coordinates (0 to 1 from the left and from the top), so the same
scene can be drawn at any size and every edit of it has an exact expected image (`edits.py`). Fine detail is a sum of
random plane waves (`relief`): it has no grid, and its frequencies are those that the codec keeps at 128 pixels.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

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

# Surfaces cover a named colour; fields are grounds of their own, with the range of colours that each may have.
SURFACES = ("grainy", "cloudy", "woven", "spotted")
FIELDS: dict[str, tuple[RGB, RGB]] = {
    "clouds": ((0.35, 0.50, 0.66), (0.62, 0.66, 0.86)),
    "waves": ((0.08, 0.34, 0.46), (0.28, 0.56, 0.70)),
    "grass": ((0.22, 0.42, 0.10), (0.50, 0.60, 0.26)),
}
FINE = 0.5  # share of the scenes that have fine detail


@dataclass(frozen=True)
class Texture:
    """Fine detail that lightens and darkens a colour by up to `strength`; the seed is that of its waves."""

    kind: str
    seed: int
    strength: float
    angle: float


@dataclass(frozen=True)
class Specks:
    """Round specks at random places; radii in units of the image's side."""

    count: int
    seed: int
    smallest: float
    largest: float


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
    texture: Texture | None = None


@dataclass(frozen=True)
class Scene:
    """A background and two to four objects of different shapes. A texture takes the place of the ground's wave."""

    background: RGB
    gradient_angle: float
    gradient: float
    texture_angle: float
    texture_cycles: float
    texture_phase: float
    objects: tuple[Object, ...]
    zoom: float = 1.0
    texture: Texture | None = None
    stars: Specks | None = None

    def find(self, shape: str) -> Object | None:
        return next((o for o in self.objects if o.shape == shape), None)


def free(x: float, y: float, radius: float, others: Sequence[Object]) -> bool:
    """Whether a shape fits at (x, y): inside the image and clear of the other shapes."""
    margin = radius + 0.02
    if not (margin <= x <= 1 - margin and margin <= y <= 1 - margin):
        return False
    return all(math.hypot(x - o.x, y - o.y) >= 1.05 * (radius + o.radius) for o in others)


def random_texture(rng: random.Random, kinds: Sequence[str], strength: float) -> Texture:
    return Texture(rng.choice(kinds), rng.getrandbits(40), strength * rng.uniform(0.6, 1.0), rng.uniform(0, math.pi))


def random_field(rng: random.Random, scene: Scene, kind: str) -> Scene:
    """The scene in front of clouds, waves or grass; all about them is random."""
    low, high = FIELDS[kind]
    share = rng.random()
    return replace(
        scene,
        background=tuple(a + (b - a) * share for a, b in zip(low, high, strict=True)),
        gradient_angle=rng.uniform(0, 2 * math.pi),
        gradient=rng.uniform(0.05, 0.2),
        texture=random_texture(rng, (kind,), 0.42),
    )


def random_object(rng: random.Random, shape: str, colour: RGB, others: Sequence[Object]) -> Object | None:
    """An object of random place, size and surface that is clear of the others; None where it found no place."""
    texture = random_texture(rng, SURFACES, 0.35) if rng.random() < 0.5 else None
    striped, angle = texture is None and rng.random() < 0.5, rng.uniform(0, math.pi)
    for radius in (rng.uniform(0.11, 0.17), rng.uniform(0.09, 0.13), 0.09):
        for _ in range(20):
            x, y = rng.random(), rng.random()
            if free(x, y, radius, others):
                return Object(shape, colour, striped, x, y, radius, angle, texture)
    return None


def random_scene(rng: random.Random, shapes: Sequence[str] = ()) -> Scene:
    """A scene that holds at least `shapes`, two to four objects in all; flat, or with fine detail."""
    scene = _flat_scene(rng, shapes)
    if rng.random() >= FINE:
        return scene
    objects = tuple(
        replace(o, striped=False, texture=random_texture(rng, SURFACES, 0.35)) if rng.random() < 0.6 else o
        for o in scene.objects
    )
    scene = replace(scene, objects=objects)
    ground = rng.random()
    if ground < 0.3:
        return random_field(rng, scene, rng.choice(list(FIELDS)))
    return replace(scene, texture=random_texture(rng, SURFACES, 0.26)) if ground < 0.8 else scene


def _flat_scene(rng: random.Random, shapes: Sequence[str]) -> Scene:
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
    if scene.texture:
        detail = relief(scene.texture, x, y)
    else:
        wave = x * math.cos(scene.texture_angle) + y * math.sin(scene.texture_angle)
        detail = 0.05 * torch.sin(2 * math.pi * scene.texture_cycles * wave + scene.texture_phase)
    image = torch.tensor(scene.background)[:, None, None] + (scene.gradient * along + detail)

    pixels = size * scene.zoom
    if scene.stars:
        image = torch.lerp(image, torch.ones(()), specks(scene.stars, x, y, pixels))
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
        if o.texture:
            colour = colour + relief(o.texture, dx, dy)
        image[:, rows, cols] = image[:, rows, cols] * (1 - cover) + colour * cover
    return image.clamp(0, 1)


def relief(texture: Texture, x: Tensor, y: Tensor) -> Tensor:
    """Height of the texture at x [1, W] and y [H, 1], within its strength: [H, W]."""
    generator = torch.Generator().manual_seed(texture.seed)
    count = 32
    u, phase, around = torch.rand(3, count, generator=generator)
    angle, size, gain = 2 * math.pi * around, torch.ones(count), 1.0
    if texture.kind in ("clouds", "cloudy"):  # the same energy in every octave but for a little
        cycles = 0.8 * 16**u
        size = cycles**-0.4
    elif texture.kind == "waves":
        cycles, angle = 3.5 * 2**u, texture.angle + 0.7 * (around - 0.5)
    elif texture.kind == "spotted":
        cycles, gain = 3 + 4 * u, 2.5
    elif texture.kind == "woven":  # two families of threads
        cycles = 7 + 0.8 * u
        angle = texture.angle + 0.1 * (around - 0.5) + math.pi / 2 * (torch.arange(count) % 2)
    elif texture.kind == "grass":
        cycles, angle = 5 + 8 * u, 0.5 * (around - 0.5)
    else:
        cycles = 5 + 8 * u
    size = size * gain / size.square().sum().sqrt()
    kx, ky = (2 * math.pi * cycles * turn for turn in (torch.cos(angle), torch.sin(angle)))
    across, down = kx * x.mT, ky * y + 2 * math.pi * phase  # [W, N], [H, N]
    # cos(a + b) = cos a cos b - sin a sin b, so the sum over the waves is two matrix products
    height = (size * torch.cos(down)) @ torch.cos(across).mT - (size * torch.sin(down)) @ torch.sin(across).mT
    return texture.strength * torch.tanh(1.2 * height)


def specks(of: Specks, x: Tensor, y: Tensor, pixels: float) -> Tensor:
    """How much the specks cover at x [1, W] and y [H, 1], of which `pixels` make one unit: [H, W]."""
    places = torch.rand(of.count, 3, generator=torch.Generator().manual_seed(of.seed))
    cover = torch.zeros(y.shape[0], x.shape[1])
    for px, py, size in places.tolist():
        radius = of.smallest + (of.largest - of.smallest) * size
        reach = radius + 1 / pixels
        rows, cols = (slice(*_span(p - reach, p + reach, axis.flatten())) for p, axis in ((py, y), (px, x)))
        distance = torch.hypot(x[:, cols] - px, y[rows] - py) - radius
        cover[rows, cols] = torch.maximum(cover[rows, cols], (0.5 - distance * pixels).clamp(0, 1))
    return cover


def coverage(o: Object, grid: int, zoom: float = 1.0, fine: int = 4) -> Tensor:
    """The share of each cell of a grid over the image that the shape covers, by `fine` squared samples."""
    axis = ((torch.arange(grid * fine) + 0.5) / (grid * fine) - 0.5) / zoom + 0.5
    inside = _distance(
        o.shape, (axis - o.x).expand(len(axis), -1), (axis - o.y)[:, None].expand(-1, len(axis)), o.radius
    )
    return torch.nn.functional.avg_pool2d((inside < 0).float()[None], fine)[0]


def _span(low: float, high: float, axis: Tensor) -> tuple[int, int]:
    inside = ((axis >= low) & (axis <= high)).nonzero()
    return (0, 0) if len(inside) == 0 else (int(inside[0]), int(inside[-1]) + 1)
