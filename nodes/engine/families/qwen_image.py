"""Qwen-Image-Edit (first, 2509, 2511, layered): ComfyUI's `comfy.ldm.qwen_image.model.QwenImageTransformer2DModel`."""

from __future__ import annotations

from .family import Block, Family

QWEN_IMAGE = Family(
    name="qwen_image",
    label="Qwen-Image",
    network="comfy.ldm.qwen_image.model.QwenImageTransformer2DModel",
    blocks=lambda network: [Block("double_block", i, block) for i, block in enumerate(network.transformer_blocks)],
    hidden=lambda network: network.inner_dim,
    frames=lambda network, latent: latent.shape[2],  # of latents [B, C, frames, H, W]; layered makes several
)
