"""Mage-Flow: ComfyUI's `comfy.ldm.mage_flow.model.MageFlowTransformer2DModel`, made of Qwen-Image's blocks."""

from __future__ import annotations

from .family import Block, Family

MAGE_FLOW = Family(
    name="mage_flow",
    label="Mage-Flow",
    network="comfy.ldm.mage_flow.model.MageFlowTransformer2DModel",
    blocks=lambda network: [Block("double_block", i, block) for i, block in enumerate(network.transformer_blocks)],
    hidden=lambda network: network.inner_dim,
)
