"""FLUX.1 (Kontext) and FLUX.2: ComfyUI's `comfy.ldm.flux.model.Flux`, with modulation by block or shared.

FLUX.1 dev takes references like Kontext. Redux is dev with more text tokens, which always stay. Fill, Canny and Depth
have an image beside the latent in their channels (`in_channels` 96 or 32, `out_channels` 16): ComfyUI joins references
to that, so they would need as many channels, which no VAE of it gives; without references they run untouched.
"""

from dataclasses import replace

from .family import Family

FLUX1 = Family(
    name="flux1",
    label="FLUX.1",
    network="comfy.ldm.flux.model.Flux",
    variant=lambda network: not network.params.global_modulation,
    double="double_blocks",
    single="single_blocks",
    hidden=lambda network: network.hidden_size,
)
FLUX2 = replace(
    FLUX1,
    name="flux2",
    label="FLUX.2",
    variant=lambda network: network.params.global_modulation,
    linear=26,  # 8 for the projections, 18 for the gated MLP d -> 2 x 3d, 3d -> d
)
