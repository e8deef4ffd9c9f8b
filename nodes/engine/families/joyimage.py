"""JoyImage-Edit: ComfyUI's `comfy.ldm.joyimage.model.JoyImageTransformer3DModel`; its text comes last."""

from .family import Family

JOYIMAGE = Family(
    name="joyimage",
    label="JoyImage",
    network="comfy.ldm.joyimage.model.JoyImageTransformer3DModel",
    double="double_blocks",
    hidden=lambda network: network.img_in.out_channels,
    patch=lambda network: network.patch_size[-1],
    frames=lambda network, latent: -(-latent.shape[2] // network.patch_size[0]),  # of latents [B, C, frames, H, W]
    order=("target", "references", "text"),
    pe_dim=1,  # and over the images only: its text is not rotated
)
