"""A profile as a chart. Imports nothing of ComfyUI or the pack, so that programs outside of them can draw it, too."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SIZE = (960, 480)
BACK, TEXT, FAINT, BAR, TOP = "#1f2126", "white", "#5a5f68", "#5b8def", "#f2b705"


def chart(mean: Sequence[float], deviation: Sequence[float], layers: Sequence[int], title: str) -> Image.Image:
    """Context sensitivity by layer: bars of the mean with the Top-M in gold, and lines of the standard deviation."""
    image = Image.new("RGB", SIZE, BACK)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    left, right, top, bottom = 70, SIZE[0] - 30, 60, SIZE[1] - 60
    pen.text((left, 14), title, TEXT, font)
    words = "S, the share of the target's attention that the references receive; gold: layers "
    pen.text((left, 34), words + ", ".join(map(str, layers)), TEXT, font)
    depth = len(mean)
    highest = max((m + d for m, d in zip(mean, deviation, strict=True)), default=0)
    step = next((step for step in (0.01, 0.02, 0.05, 0.1) if highest <= 5 * step), 0.2)
    highest = step * max(1, math.ceil(highest / step - 1e-9))
    for mark in range(round(highest / step) + 1):
        y = bottom - (bottom - top) * mark * step / highest
        pen.line((left, y, right, y), FAINT)
        pen.text((left - 8, y), f"{mark * step:.2g}", TEXT, font, "rm")
    wide = (right - left) / depth
    for layer, (m, d) in enumerate(zip(mean, deviation, strict=True)):
        x, color = left + layer * wide, TOP if layer in layers else BAR
        low, level, high = (bottom - (bottom - top) * max(0, value) / highest for value in (m - d, m, m + d))
        pen.rectangle((x + 0.1 * wide, level, x + 0.9 * wide, bottom), color)
        if d:
            middle = x + wide / 2
            pen.line((middle, low, middle, high), TEXT, 2)
            for y in (low, high):
                pen.line((middle - 0.2 * wide, y, middle + 0.2 * wide, y), TEXT, 2)
        if layer % -(-depth // 30) == 0:
            pen.text((x + wide / 2, bottom + 6), str(layer), TOP if layer in layers else TEXT, font, "ma")
    pen.text(((left + right) / 2, bottom + 28), "layer; white: ± the deviation between pairs", TEXT, font, "ma")
    return image


def as_image(picture: Image.Image) -> Tensor:
    """As ComfyUI has images: [1, H, W, 3] in 0..1."""
    return torch.from_numpy(np.array(picture)).float()[None] / 255
