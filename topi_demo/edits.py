"""Editing instructions: their words, what they mean, and the exact image each of them asks for.

Every instruction is a sentence of a small grammar (`GRAMMAR`). Edits of the scene (recolour, move,
zoom ...) are drawn anew; edits of the picture (night, blur, shift ...) are computed from its pixels.
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

from .scenes import BACKGROUNDS, COLOURS, RGB, SHAPES, Object, Scene, draw, free, random_scene

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
}
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
        return {"put": 2, "put two": 3}.get(self.kind, 1)

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
    while kind in ("replace", "put two") and words["other"] == words["shape"]:
        words["other"] = rng.choice(SHAPES)
    return Edit(kind, words)


@dataclass(frozen=True)
class Example:
    """Reference images and the image that the instruction asks for, [3, S, S] in 0..1, and the former's scenes."""

    edit: Edit
    references: tuple[Tensor, ...]
    expected: Tensor
    scenes: tuple[Scene, ...]


def example(rng: random.Random, edit: Edit, size: int) -> Example:
    """A random scene (or two, or three) that the edit can be applied to, drawn before and after."""
    while True:
        scenes = _scenes_for(rng, edit)
        after = _EDITS[edit.kind](scenes, edit)
        if after is not None:
            break
    images = tuple(draw(scene, size) for scene in scenes)
    expected = after(images[0]) if callable(after) else draw(after, size)
    return Example(edit, images, expected, tuple(scenes))


def caption(scene: Scene) -> str:
    """A text-to-image caption of a scene: its objects from left to right, and the background."""
    colours = {rgb: name for name, rgb in COLOURS.items()}
    grounds = {rgb: name for name, rgb in BACKGROUNDS.items()}
    words = []
    for o in sorted(scene.objects, key=lambda o: o.x):
        words += [colours[o.colour], *(["striped"] if o.striped else []), o.shape]
    return " ".join([*words, "on", grounds[scene.background], "background"])


def _scenes_for(rng: random.Random, edit: Edit) -> list[Scene]:
    shape, other = edit.words.get("shape"), edit.words.get("other")
    if edit.references == 1:
        scene = random_scene(rng, [shape] if shape else [])
        if edit.kind == "replace":  # the new shape must not be there already
            scene = replace(scene, objects=tuple(o for o in scene.objects if o.shape != other))
        return [scene]
    donors = [random_scene(rng, [shape])] + ([random_scene(rng, [other])] if other else [])
    first = random_scene(rng)
    first = replace(first, objects=tuple(o for o in first.objects if o.shape not in (shape, other)))
    return [first, *donors]


# What an edit returns: the new scene, a function of the picture, or None where it does not fit this scene.
After = Scene | Callable[[Tensor], Tensor] | None


def _change(scene: Scene, name: str, /, **fields: object) -> Scene:
    objects = tuple(replace(o, **fields) if o.shape == name else o for o in scene.objects)
    return replace(scene, objects=objects)


def _recolour(scenes: list[Scene], edit: Edit) -> After:
    colour = COLOURS[edit.words["colour"]]
    if any(o.colour == colour for o in scenes[0].objects):
        return None
    return _change(scenes[0], edit.words["shape"], colour=colour)


def _remove(scenes: list[Scene], edit: Edit) -> After:
    return replace(scenes[0], objects=tuple(o for o in scenes[0].objects if o.shape != edit.words["shape"]))


def _replace(scenes: list[Scene], edit: Edit) -> After:
    return _change(scenes[0], edit.words["shape"], shape=edit.words["other"])


def _move(scenes: list[Scene], edit: Edit) -> After:
    dx, dy = DIRECTIONS[edit.words["direction"]]
    moved = scenes[0].find(edit.words["shape"])
    x, y = moved.x + MOVE * dx, moved.y + MOVE * dy
    others = [o for o in scenes[0].objects if o is not moved]
    return _change(scenes[0], moved.shape, x=x, y=y) if free(x, y, moved.radius, others) else None


def _background(scenes: list[Scene], edit: Edit) -> After:
    ground = BACKGROUNDS[edit.words["ground"]]
    return None if scenes[0].background == ground else replace(scenes[0], background=ground)


def _put(scenes: list[Scene], edit: Edit) -> After:
    first, objects = scenes[0], list(scenes[0].objects)
    for donor, name in zip(scenes[1:], ("shape", "other"), strict=False):
        new = donor.find(edit.words[name])
        if not free(new.x, new.y, new.radius, objects):
            return None
        objects.append(new)
    return replace(first, objects=tuple(objects))


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


def _shift(scenes: list[Scene], edit: Edit) -> After:
    dx, dy = DIRECTIONS[edit.words["direction"]]

    def shifted(image: Tensor) -> Tensor:
        size = image.shape[-1]
        by = round(SHIFT * size)
        rows = (torch.arange(size) - dy * by).clamp(0, size - 1)
        cols = (torch.arange(size) - dx * by).clamp(0, size - 1)
        return image[:, rows][:, :, cols]

    return shifted


_EDITS: dict[str, Callable[[list[Scene], Edit], After]] = {
    "recolour": _recolour,
    "remove": _remove,
    "replace": _replace,
    "move": _move,
    "background": _background,
    "night": lambda scenes, edit: _night,
    "invert": lambda scenes, edit: lambda image: 1 - image,
    "blur": lambda scenes, edit: _blur,
    "shift": _shift,
    "zoom": lambda scenes, edit: replace(scenes[0], zoom=ZOOM),
    "winter": lambda scenes, edit: _tinted(scenes[0], (0.86, 0.90, 0.96), (1.0, 1.0, 1.0), 0.5),
    "autumn": lambda scenes, edit: _tinted(scenes[0], (0.64, 0.44, 0.24), (0.90, 0.50, 0.10), 0.4),
    "keep": lambda scenes, edit: scenes[0],
    "put": _put,
    "put two": _put,
}
