"""Qwen-Image-Edit (first, 2509, 2511, layered): ComfyUI's `comfy.ldm.qwen_image.model.QwenImageTransformer2DModel`."""

from .family import Family

QWEN_IMAGE = Family(
    name="qwen_image",
    label="Qwen-Image",
    network="comfy.ldm.qwen_image.model.QwenImageTransformer2DModel",
    double="transformer_blocks",
    hidden=lambda network: network.inner_dim,
    frames=lambda network, latent: latent.shape[2],  # of latents [B, C, frames, H, W]; layered makes several
)
