"""OmniGen2: ComfyUI's `comfy.ldm.omnigen.omnigen2.OmniGen2Transformer2DModel`; its target comes last."""

from .family import REACHED_FROM_OUTSIDE, Family

OMNIGEN2 = Family(
    name="omnigen2",
    label="OmniGen2",
    network="comfy.ldm.omnigen.omnigen2.OmniGen2Transformer2DModel",
    single="layers",
    hidden=lambda network: network.hidden_size,
    keys=lambda network: sum(layer.attn.kv_heads * layer.attn.dim_head for layer in network.layers),
    key_heads=lambda network: network.layers[0].attn.kv_heads,
    linear=30,  # 5.3 for the projections with 7 of 21 key heads, 24.4 for the gated MLP 4.06 d wide
    order=("text", "references", "target"),
    pe_dim=1,
    hooked={"hidden_states": "img", "image_rotary_emb": "pe", "attention_mask": "attn_mask"},
    **REACHED_FROM_OUTSIDE,
)
