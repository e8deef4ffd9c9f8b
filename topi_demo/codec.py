"""The demo model's VAE: a fixed linear codec, 8 x 8 pixels to 16 channels.

Each 8 x 8 block keeps the 8 lowest DCT coefficients of its luma and the 4 lowest of both chroma planes,
shifted and scaled to about zero mean and unit variance on the demo scenes. The basis is orthonormal, so decoding
is the transpose: what the codec loses is the high frequencies, and nothing else.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 8
LUMA = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (1, 2), (2, 1))
CHROMA = ((0, 0), (0, 1), (1, 0), (1, 1))
CHANNELS = len(LUMA) + 2 * len(CHROMA)

# Mean and standard deviation of every channel over 1,500 random edits, before and after.
MEAN = (-1.213, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.351, 0.0, 0.0, 0.0, -0.007, 0.0, 0.0, 0.0)
STD = (4.625, 0.702, 0.702, 0.361, 0.322, 0.322, 0.200, 0.200, 2.849, 0.520, 0.520, 0.241, 1.673, 0.322, 0.322, 0.148)


def basis() -> Tensor:
    """[16, 3, 8, 8]: each channel's DCT basis function, in orthonormal luma and chroma axes of RGB."""
    grid = torch.arange(BLOCK) + 0.5
    waves = torch.stack(
        [torch.cos(math.pi * k * grid / BLOCK) * math.sqrt((1 if k == 0 else 2) / BLOCK) for k in range(BLOCK)]
    )
    axes = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 2.0, -1.0]])
    axes = axes / axes.norm(dim=1, keepdim=True)
    planes = [(axes[0], LUMA), (axes[1], CHROMA), (axes[2], CHROMA)]
    return torch.stack(
        [axis[:, None, None] * waves[v][:, None] * waves[u][None, :] for axis, modes in planes for v, u in modes]
    )


def encode(image: Tensor) -> Tensor:
    """image [B, 3, H, W] in 0..1, H and W multiples of 8 -> latent [B, 16, H/8, W/8]."""
    latent = F.conv2d(image * 2 - 1, basis().to(image), stride=BLOCK)
    return (latent - _column(MEAN, latent)) / _column(STD, latent)


def decode(latent: Tensor) -> Tensor:
    """latent [B, 16, h, w] -> image [B, 3, 8h, 8w], clamped to 0..1."""
    scaled = latent * _column(STD, latent) + _column(MEAN, latent)
    image = F.conv_transpose2d(scaled, basis().to(latent), stride=BLOCK)
    return ((image + 1) / 2).clamp(0, 1)


def _column(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]
