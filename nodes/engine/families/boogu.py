"""Boogu-Image: ComfyUI's `comfy.ldm.boogu.model.BooguTransformer2DModel`; its target comes last.

Its double blocks attend twice: over everything, which is what ToPi listens to, and over the images alone.
"""

from .family import REACHED_FROM_OUTSIDE, Family, Network


def _keys(network: Network) -> int:
    double = [a for block in network.double_stream_layers for a in (block.img_instruct_attn, block.img_self_attn)]
    attentions = double + [block.attn for block in network.single_stream_layers]
    return sum(attention.kv_heads * attention.dim_head for attention in attentions)


BOOGU = Family(
    name="boogu",
    label="Boogu",
    network="comfy.ldm.boogu.model.BooguTransformer2DModel",
    double="double_stream_layers",
    single="single_stream_layers",
    hidden=lambda network: network.hidden_size,
    keys=_keys,
    key_heads=lambda network: network.single_stream_layers[0].attn.kv_heads,
    linear=31,  # 32 single blocks of 29 (key heads 7 of 28, gated MLP 4.04 d wide), 8 double blocks of 36
    order=("text", "references", "target"),
    pe_dim=1,
    hooked={
        "img_hidden_states": "img",
        "instruct_hidden_states": "txt",
        "joint_rotary_emb": "pe",
        "img_rotary_emb": "image_pe",
        "joint_attention_mask": "attn_mask",
        "hidden_states": "img",  # of a single block, from here on
        "image_rotary_emb": "pe",
        "attention_mask": "attn_mask",
    },
    **REACHED_FROM_OUTSIDE,
)
