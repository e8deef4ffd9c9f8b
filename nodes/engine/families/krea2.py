"""Krea 2: ComfyUI's `comfy.ldm.krea2.model.SingleStreamDiT`."""

from collections.abc import Mapping

from torch import Tensor

from .family import REACHED_FROM_OUTSIDE, Family, Network


def _references(network: Network, given: Mapping) -> list[Tensor]:
    """Without a reference method, in the conditioning or in the model, ComfyUI leaves them out."""
    method = given.get("ref_latents_method", getattr(network, "default_ref_method", None))
    return [] if method is None else given.get("ref_latents") or []


KREA2 = Family(
    name="krea2",
    label="Krea 2",
    network="comfy.ldm.krea2.model.SingleStreamDiT",
    single="blocks",
    hidden=lambda network: network.first.out_features,
    keys=lambda network: sum(block.attn.kvheads * block.attn.headdim for block in network.blocks),
    key_heads=lambda network: network.blocks[0].attn.kvheads,
    linear=23,  # 7 for the projections with 12 of 48 key heads and the gate, 16 for the gated MLP 8/3 d wide
    patch=lambda network: network.patch,  # and frames are rows of the batch
    references=_references,
    hooked={"x": "img", "freqs": "pe", "mask": "attn_mask"},
    **REACHED_FROM_OUTSIDE,
)
