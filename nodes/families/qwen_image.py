"""Qwen-Image-Edit (first, 2509, 2511, layered): ComfyUI's `comfy.ldm.qwen_image.model.QwenImageTransformer2DModel`."""

from __future__ import annotations

from torch import Tensor, nn

from ...topi_core.layout import Grid
from .family import Block, Family, padded_grid


def _grid(network: nn.Module, latent: Tensor) -> Grid:
    """Latents are [B, C, frames, H, W]; the frames, of which layered makes several, stand below one another."""
    rows, columns = padded_grid(latent, network.patch_size)
    return latent.shape[2] * rows, columns


QWEN_IMAGE = Family(
    name="qwen_image",
    label="Qwen-Image",
    network="comfy.ldm.qwen_image.model.QwenImageTransformer2DModel",
    blocks=lambda network: [Block("double_block", i, block) for i, block in enumerate(network.transformer_blocks)],
    grid=_grid,
    hidden=lambda network: network.inner_dim,
)
