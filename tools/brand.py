"""Draws the icon and the banner that the registry shows, with our own scenes and overlay: `python -m tools.brand`.

An illustration of what the views show: no model has run, and the mask is what the edit changes.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

from topi_core.overlay import draw
from topi_demo import edits

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
INSTRUCTION = "replace the star with a circle"
SIDE, TOKENS, SEED = 512, 16, "topi 18"


def kept(before: Tensor, after: Tensor) -> Tensor:
    """The tokens around what an edit changes, without holes, [1, S, S]."""
    changed = (before - after).abs().amax(0)[None, None]
    tokens = (max_pool2d(changed, SIDE // TOKENS) > 0.1).float()
    closed = -max_pool2d(-max_pool2d(tokens, 3, 1, 1), 3, 1, 1)
    return interpolate(closed, size=(SIDE, SIDE))[0]


def image(pixels: Tensor, side: int) -> Image.Image:
    return Image.fromarray((pixels * 255).round().byte().numpy().astype(np.uint8)).resize((side, side), Image.LANCZOS)


def main() -> None:
    example = edits.example(random.Random(SEED), edits.parse(INSTRUCTION), SIDE)
    before, after = example.references[0], example.expected
    overlay = draw(before.movedim(0, -1)[None], kept(before, after), 0.6)[0]
    image(overlay, 256).save(IMAGES / "icon.png", optimize=True)

    banner = Image.new("RGB", (1260, 540), "#1f2126")
    for i, pixels in enumerate((before.movedim(0, -1), overlay, after.movedim(0, -1))):
        banner.paste(image(pixels, 372), (36 + i * 408, 84))
    banner.save(IMAGES / "banner.png", optimize=True)


if __name__ == "__main__":
    main()
