"""The model families ToPi knows: what differs between them, one file each."""

from __future__ import annotations

from . import boogu, flux, joyimage, krea2, mage_flow, omnigen2, qwen_image
from .family import Family, Network, class_of

FAMILIES: tuple[Family, ...] = (
    flux.FLUX1,
    flux.FLUX2,
    qwen_image.QWEN_IMAGE,
    mage_flow.MAGE_FLOW,
    joyimage.JOYIMAGE,
    krea2.KREA2,
    omnigen2.OMNIGEN2,
    boogu.BOOGU,
)


def family_of(network: Network) -> Family:
    """The family of a diffusion network; ValueError that names what was found and what is supported."""
    for family in FAMILIES:
        if family.matches(network):
            return family
    supported = ", ".join(family.label for family in FAMILIES)
    raise ValueError(
        f"ToPi cannot prune a model of the class {class_of(network)}; supported are ComfyUI's own {supported}"
    )
