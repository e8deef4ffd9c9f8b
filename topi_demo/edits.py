"""Editing instructions: their words, what they mean, and the exact image each of them asks for.

Every instruction is a sentence of a small grammar (`GRAMMAR`). Edits of the scene (recolour, move,
zoom ...) are drawn anew; edits of the picture (night, blur, shift ...) are computed from its pixels. Edits of the group
"open" have many right answers ("add a star": where, how large, of which colour?); their example shows one of them.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .scenes import (
    BACKGROUNDS,
    COLOURS,
    FIELDS,
    RGB,
    SHAPES,
    Object,
    Scene,
    Specks,
    Texture,
    draw,
    free,
    random_field,
    random_object,
    random_scene,
    relief,
    specks,
)

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MOVE = 0.25
SHIFT = 0.125
ZOOM = 1.5

SLOTS = {
    "shape": SHAPES,
    "other": SHAPES,
    "colour": tuple(COLOURS),
    "ground": tuple(BACKGROUNDS),
    "direction": tuple(DIRECTIONS),
    "field": tuple(FIELDS),
}

# kind -> (group of the paper's benchmark, sentence)
GRAMMAR: dict[str, tuple[str, str]] = {
    "recolour": ("local", "make the {shape} {colour}"),
    "remove": ("local", "remove the {shape}"),
    "replace": ("local", "replace the {shape} with a {other}"),
    "move": ("local", "move the {shape} {direction}"),
    "background": ("global", "make the background {ground}"),
    "night": ("global", "make it night"),
    "invert": ("global", "invert the colours"),
    "blur": ("global", "blur the image"),
    "shift": ("camera", "shift the image {direction}"),
    "zoom": ("camera", "zoom in"),
    "winter": ("implicit", "make it winter"),
    "autumn": ("implicit", "make it autumn"),
    "keep": ("keep", "keep the image"),
    "put": ("multi", "put the {shape} of the second image into the first"),
    "put two": ("multi", "put the {shape} of the second image and the {other} of the third image into the first"),
    "put ground": ("multi", "put the ground of the second image into the first"),
    "put both": ("multi", "put the {shape} of the second image and the ground of the third image into the first"),
    "add": ("open", "add a {shape}"),
    "something": ("open", "replace the {shape} with something"),
    "front": ("open", "put it in front of {field}"),
    "snow": ("open", "make it snow"),
    "stars": ("open", "make it a starry night"),
    "fog": ("open", "make it foggy"),
    "zoom out": ("open", "zoom out"),
    "painting": ("open", "make it a painting"),
    "somewhere": ("open", "put the {shape} of the second image somewhere in the first"),
    "two somewhere": (
        "open",
        "put the {shape} of the second image and the {other} of the third image somewhere in the first",
    ),
}
OPEN = "open"  # the group of which an example's expected image is one of many right answers
GROUPS = tuple(dict.fromkeys(group for group, _ in GRAMMAR.values()))


@dataclass(frozen=True)
class Edit:
    """A parsed instruction: its kind and the words in its slots."""

    kind: str
    words: dict[str, str]

    @property
    def group(self) -> str:
        return GRAMMAR[self.kind][0]

    @property
    def references(self) -> int:
        sentence = GRAMMAR[self.kind][1]
        return 3 if "third" in sentence else 2 if "second" in sentence else 1

    def __str__(self) -> str:
        return GRAMMAR[self.kind][1].format(**self.words)


def parse(instruction: str) -> Edit:
    """The edit that an instruction asks for; ValueError with the grammar when it is none."""
    text = " ".join(re.sub(r"[.,!]", " ", instruction.lower()).split())
    for kind, (_, sentence) in GRAMMAR.items():
        pattern = re.sub(r"\{(\w+)\}", lambda m: f"(?P<{m[1]}>{'|'.join(SLOTS[m[1]])})", sentence)
        if match := re.fullmatch(pattern, text):
            return Edit(kind, match.groupdict())
    known = "; ".join(sentence for _, sentence in GRAMMAR.values())
    raise ValueError(f"the instruction {instruction!r} is not one the demo scenes know; allowed: {known}")


def random_edit(rng: random.Random, kind: str) -> Edit:
    names = re.findall(r"\{(\w+)\}", GRAMMAR[kind][1])
    words = {name: rng.choice(SLOTS[name]) for name in names}
    while words.get("other") and words["other"] == words["shape"]:
        words["other"] = rng.choice(SHAPES)
    return Edit(kind, words)


@dataclass(frozen=True)
class Example:
    """Reference images and the image that the instruction asks for, [3, S, S] in 0..1, and the former's scenes.

    Of an open edit, `expected` is one of the right answers.
    """

    edit: Edit
    references: tuple[Tensor, ...]
    expected: Tensor
    scenes: tuple[Scene, ...]


def example(rng: random.Random, edit: Edit, size: int) -> Example:
    """A random scene (or two, or three) that the edit can be applied to, drawn before and after."""
    while True:
        scenes = _scenes_for(rng, edit)
        after = _EDITS[edit.kind](scenes, edit, rng)
        if after is not None:
            break
    images = tuple(draw(scene, size) for scene in scenes)
    expected = after(images[0]) if callable(after) else draw(after, size)
    return Example(edit, images, expected, tuple(scenes))


def caption(scene: Scene) -> str:
    """A text-to-image caption of a scene: its objects from left to right, and the ground."""
    colours = {rgb: name for name, rgb in COLOURS.items()}
    grounds = {rgb: name for name, rgb in BACKGROUNDS.items()}
    words = []
    for o in sorted(scene.objects, key=lambda o: o.x):
        surface = o.texture.kind if o.texture else "striped" if o.striped else None
        words += [colours[o.colour], *([surface] if surface else []), o.shape]
    if scene.texture and scene.texture.kind in FIELDS:
        return " ".join([*words, "in", "front", "of", scene.texture.kind])
    ground = [*([scene.texture.kind] if scene.texture else []), grounds[scene.background]]
    return " ".join([*words, "on", *ground, "background"])


def _scenes_for(rng: random.Random, edit: Edit) -> list[Scene]:
    shape, other = edit.words.get("shape"), edit.words.get("other")
    if edit.references == 1:
        scene = random_scene(rng, [shape] if shape else [])
        if edit.kind == "replace":  # the new shape must not be there already
            scene = replace(scene, objects=tuple(o for o in scene.objects if o.shape != other))
        elif edit.kind == "add":
            scene = replace(scene, objects=tuple(o for o in scene.objects if o.shape != shape))
        elif edit.kind == "zoom out":  # what is outside now was there all the time, and nobody could know
            scene = replace(scene, zoom=ZOOM)
        return [scene]
    donors = [random_scene(rng, [name] if name else []) for name in (shape, other)[: edit.references - 1]]
    first = random_scene(rng)
    first = replace(first, objects=tuple(o for o in first.objects if o.shape not in (shape, other)))
    return [first, *donors]


def _field(scene: Scene) -> bool:
    return scene.texture is not None and scene.texture.kind in FIELDS


# What an edit returns: the new scene, a function of the picture, or None where it does not fit this scene.
After = Scene | Callable[[Tensor], Tensor] | None


def _change(scene: Scene, name: str, /, **fields: object) -> Scene:
    objects = tuple(replace(o, **fields) if o.shape == name else o for o in scene.objects)
    return replace(scene, objects=objects)


def _recolour(scenes: list[Scene], edit: Edit, rng: random.Random) -> After:
    colour = COLOURS[edit.words["colour"]]
    if any(o.colour == colour for o in scenes[0].objects):
        return None
    return _change(scenes[0], edit.words["shape"], colour=colour)


def _remove(scenes: list[Scene], edit: Edit, rng: random.Random) -> After:
    return replace(scenes[0], objects=tuple(o for o in scenes[0].objects if o.shape != edit.words["shape"]))


def _replace(scenes: list[Scene], edit: Edit, rng: random.Random) -> After:
    return _change(scenes[0], edit.words["shape"], shape=edit.words["other"])


def _move(scenes: list[Scene], edit: Edit, rng: random.Random) -> After:
    dx, dy = DIRECTIONS[edit.words["direction"]]
    moved = scenes[0].find(edit.words["shape"])
    x, y = moved.x + MOVE * dx, moved.y + MOVE * dy
    others = [o for o in scenes[0].objects if o is not moved]
    return _change(scenes[0], moved.shape, x=x, y=y) if free(x, y, moved.radius, others) else None


def _background(scenes: list[Scene], edit: Edit, rng: random.Random) -> After:
    ground = BACKGROUNDS[edit.words["ground"]]
    scene = scenes[0]  # behind clouds there is a ground that the reference does not show
    return None if scene.background == ground or _field(scene) else replace(scene, background=ground)


def _put(scenes: list[Scene], edit: Edit, rng: random.Random) -> After:
    first, objects = scenes[0], list(scenes[0].objects)
    for donor, name in zip(scenes[1:], ("shape", "other"), strict=False):
        new = donor.find(edit.words[name])
        if not free(new.x, new.y, new.radius, objects):
            return None
        objects.append(new)
    return replace(first, objects=tuple(objects))


def _grounded(scene: Scene, donor: Scene) -> Scene:
    names = ("background", "gradient_angle", "gradient", "texture_angle", "texture_cycles", "texture_phase", "texture")
    return replace(scene, **{name: getattr(donor, name) for name in names})


def _put_both(scenes: list[Scene], edit: Edit, rng: random.Random) -> After:
    scene = _put(scenes[:2], edit, rng)
    return scene and _grounded(scene, scenes[2])


def _somewhere(scenes: list[Scene], edit: Edit, rng: random.Random) -> After:
    objects = list(scenes[0].objects)
    for donor, name in zip(scenes[1:], ("shape", "other"), strict=False):
        given = donor.find(edit.words[name])
        place = random_object(rng, given.shape, given.colour, objects)
        if place is None:
            return None
        objects.append(replace(given, x=place.x, y=place.y, radius=place.radius))
    return replace(scenes[0], objects=tuple(objects))


def _add(scenes: list[Scene], edit: Edit, rng: random.Random) -> After:
    new = random_object(rng, edit.words["shape"], rng.choice(list(COLOURS.values())), scenes[0].objects)
    return new and replace(scenes[0], objects=(*scenes[0].objects, new))


def _something(scenes: list[Scene], edit: Edit, rng: random.Random) -> After:
    scene, old = scenes[0], scenes[0].find(edit.words["shape"])
    others = [o for o in scene.objects if o is not old]
    shape = rng.choice([s for s in SHAPES if not scene.find(s)] or [None])
    colour = rng.choice([c for c in COLOURS.values() if all(o.colour != c for o in scene.objects)])
    new = shape and random_object(rng, shape, colour, ())
    if not new or not free(old.x, old.y, new.radius, others):
        return None
    return replace(scene, objects=(*others, replace(new, x=old.x, y=old.y)))


def _axes(image: Tensor) -> tuple[Tensor, Tensor]:
    axis = (torch.arange(image.shape[-1]) + 0.5) / image.shape[-1]
    return axis[None, :], axis[:, None]


def _snow(scenes: list[Scene], edit: Edit, rng: random.Random) -> After:
    flakes = Specks(rng.randint(40, 80), rng.getrandbits(40), 0.008, 0.028)

    def snowed(image: Tensor) -> Tensor:
        cover = 0.95 * specks(flakes, *_axes(image), image.shape[-1])
        return torch.lerp(image * 0.7 + 0.12, torch.ones(()), cover)

    return snowed


def _starry(scenes: list[Scene], edit: Edit, rng: random.Random) -> After:
    starry = replace(scenes[0], stars=Specks(rng.randint(40, 70), rng.getrandbits(40), 0.005, 0.014))

    def night(image: Tensor) -> Tensor:
        lit = draw(starry, image.shape[-1])
        return (_night(image) + 0.9 * (lit - image)).clamp(0, 1)

    return night


def _fog(scenes: list[Scene], edit: Edit, rng: random.Random) -> After:
    banks = Texture("clouds", rng.getrandbits(40), 0.5, 0.0)
    return lambda image: torch.lerp(
        image, torch.tensor(0.86), 0.45 + 0.9 * relief(banks, *_axes(image)).clamp(-0.5, 0.5)
    )


def _painting(scenes: list[Scene], edit: Edit, rng: random.Random) -> After:
    strokes, seed = rng.randint(120, 200), rng.getrandbits(40)
    return lambda image: _painted(image, strokes, seed)


def _painted(image: Tensor, strokes: int, seed: int) -> Tensor:
    """Strokes at random places in random directions: every pixel has the colour of the nearest, as a brush measures."""
    size = image.shape[-1]
    px, py, turn, tone = torch.rand(4, strokes, generator=torch.Generator().manual_seed(seed))
    columns, rows = ((p * size).long().clamp(max=size - 1) for p in (px, py))
    colours = image[:, rows, columns] + 0.3 * (tone - 0.5)
    cos, sin = torch.cos(math.pi * turn), torch.sin(math.pi * turn)
    x, y = _axes(image)
    along, across = 0.25, 1.0  # a stroke is twice as long as wide
    xx, xy, yy = along * cos**2 + across * sin**2, (along - across) * cos * sin, along * sin**2 + across * cos**2
    # (p - c)' M (p - c) for all pixels and strokes, as one matrix product of [H W, 6] and [6, N]
    x, y = x.expand(size, -1).flatten(), y.expand(-1, size).flatten()
    pixels = torch.stack((x * x, x * y, y * y, x, y, torch.ones_like(x)), 1)
    strokes_ = torch.stack(
        (xx, 2 * xy, yy, -2 * (xx * px + xy * py), -2 * (xy * px + yy * py), xx * px**2 + 2 * xy * px * py + yy * py**2)
    )
    return colours[:, (pixels @ strokes_).argmin(1)].reshape(image.shape).clamp(0, 1)


def _tinted(scene: Scene, ground: RGB, tint: RGB, share: float) -> Scene:
    def mix(o: Object) -> Object:
        return replace(o, colour=tuple(c * (1 - share) + t * share for c, t in zip(o.colour, tint, strict=True)))

    return replace(scene, background=ground, objects=tuple(mix(o) for o in scene.objects))


def _night(image: Tensor) -> Tensor:
    return image * 0.35 + torch.tensor([0.0, 0.0, 0.08])[:, None, None]


def _blur(image: Tensor) -> Tensor:
    sigma = 0.03 * image.shape[-1]
    reach = math.ceil(3 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    padded = F.pad(image[None], (reach,) * 4, mode="replicate")[0][:, None]
    return F.conv2d(F.conv2d(padded, kernel[None, None, :, None]), kernel[None, None, None, :])[:, 0]


def _shift(scenes: list[Scene], edit: Edit, rng: random.Random) -> After:
    dx, dy = DIRECTIONS[edit.words["direction"]]

    def shifted(image: Tensor) -> Tensor:
        size = image.shape[-1]
        by = round(SHIFT * size)
        rows = (torch.arange(size) - dy * by).clamp(0, size - 1)
        cols = (torch.arange(size) - dx * by).clamp(0, size - 1)
        return image[:, rows][:, :, cols]

    return shifted


_EDITS: dict[str, Callable[[list[Scene], Edit, random.Random], After]] = {
    "recolour": _recolour,
    "remove": _remove,
    "replace": _replace,
    "move": _move,
    "background": _background,
    "night": lambda scenes, edit, rng: _night,
    "invert": lambda scenes, edit, rng: lambda image: 1 - image,
    "blur": lambda scenes, edit, rng: _blur,
    "shift": _shift,
    "zoom": lambda scenes, edit, rng: replace(scenes[0], zoom=ZOOM),
    "winter": lambda scenes, edit, rng: _tinted(scenes[0], (0.86, 0.90, 0.96), (1.0, 1.0, 1.0), 0.5),
    "autumn": lambda scenes, edit, rng: _tinted(scenes[0], (0.64, 0.44, 0.24), (0.90, 0.50, 0.10), 0.4),
    "keep": lambda scenes, edit, rng: scenes[0],
    "put": _put,
    "put two": _put,
    "put ground": lambda scenes, edit, rng: _grounded(scenes[0], scenes[1]),
    "put both": _put_both,
    "add": _add,
    "something": _something,
    "front": lambda scenes, edit, rng: random_field(rng, scenes[0], edit.words["field"]),
    "snow": _snow,
    "stars": _starry,
    "fog": _fog,
    "zoom out": lambda scenes, edit, rng: replace(scenes[0], zoom=1.0),
    "painting": _painting,
    "somewhere": _somewhere,
    "two somewhere": _somewhere,
}
