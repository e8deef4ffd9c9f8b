"""JoyImage-Edit: ComfyUI's `comfy.ldm.joyimage.model.JoyImageTransformer3DModel`; its text comes last."""

from __future__ import annotations

from torch import Tensor, nn

from ...topi_core.layout import Grid
from .family import Block, Family, padded_grid


def _grid(network: nn.Module, latent: Tensor) -> Grid:
    """Latents are [B, C, frames, H, W]; the frames stand below one another."""
    frames, side, _ = network.patch_size
    rows, columns = padded_grid(latent, side)
    return -(-latent.shape[2] // frames) * rows, columns


JOYIMAGE = Family(
    name="joyimage",
    label="JoyImage",
    network="comfy.ldm.joyimage.model.JoyImageTransformer3DModel",
    blocks=lambda network: [Block("double_block", i, block) for i, block in enumerate(network.double_blocks)],
    grid=_grid,
    hidden=lambda network: network.img_in.out_channels,
    patch=lambda network: network.patch_size[-1],
    order=("target", "references", "text"),
    pe_dim=1,  # and over the images only: its text is not rotated
)
