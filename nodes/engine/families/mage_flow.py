"""Mage-Flow: ComfyUI's `comfy.ldm.mage_flow.model.MageFlowTransformer2DModel`, made of Qwen-Image's blocks."""

from .family import Family

MAGE_FLOW = Family(
    name="mage_flow",
    label="Mage-Flow",
    network="comfy.ldm.mage_flow.model.MageFlowTransformer2DModel",
    double="transformer_blocks",
    hidden=lambda network: network.inner_dim,
)
