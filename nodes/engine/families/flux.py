"""FLUX.1 (Kontext) and FLUX.2: ComfyUI's `comfy.ldm.flux.model.Flux`, with modulation by block or shared.

FLUX.1 dev takes references like Kontext. Redux is dev with more text tokens, which always stay. Fill, Canny and Depth
have an image beside the latent in their channels (`in_channels` 96 or 32, `out_channels` 16): ComfyUI joins references
to that, so they would need as many channels, which no VAE of it gives; without references they run untouched.
"""

from __future__ import annotations

from .family import Block, Family, Network


def _blocks(network: Network) -> list[Block]:
    double = [Block("double_block", i, block) for i, block in enumerate(network.double_blocks)]
    return double + [Block("single_block", i, block) for i, block in enumerate(network.single_blocks)]


FLUX1 = Family(
    name="flux1",
    label="FLUX.1",
    network="comfy.ldm.flux.model.Flux",
    variant=lambda network: not network.params.global_modulation,
    blocks=_blocks,
    hidden=lambda network: network.hidden_size,
)
FLUX2 = Family(
    name="flux2",
    label="FLUX.2",
    network="comfy.ldm.flux.model.Flux",
    variant=lambda network: network.params.global_modulation,
    blocks=_blocks,
    hidden=lambda network: network.hidden_size,
    linear=26,  # 8 for the projections, 18 for the gated MLP d -> 2 x 3d, 3d -> d
)
