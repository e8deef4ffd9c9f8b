"""The model families ToPi knows: what differs between them, one file each."""

from .boogu import BOOGU
from .family import Family, Network, class_of
from .flux import FLUX1, FLUX2
from .joyimage import JOYIMAGE
from .krea2 import KREA2
from .mage_flow import MAGE_FLOW
from .omnigen2 import OMNIGEN2
from .qwen_image import QWEN_IMAGE

FAMILIES = (FLUX1, FLUX2, QWEN_IMAGE, MAGE_FLOW, JOYIMAGE, KREA2, OMNIGEN2, BOOGU)


def family_of(network: Network) -> Family:
    """The family of a diffusion network; ValueError that names what was found and what is supported."""
    for family in FAMILIES:
        if family.matches(network):
            return family
    found, supported = class_of(network), ", ".join(family.label for family in FAMILIES)
    raise ValueError(f"ToPi cannot prune a model of the class {found}; supported are ComfyUI's own {supported}")
