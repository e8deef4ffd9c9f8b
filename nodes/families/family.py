"""What the patch must know of a model family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor, nn

from ...topi_core.layout import Grid


class Block(NamedTuple):
    """A block's name in `patches_replace["dit"]`: ("double_block", 3)."""

    kind: Literal["double_block", "single_block"]
    index: int


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family: how to recognise its network, its blocks in order, and the token grid of a latent.

    A double block's hidden states are [target | references] beside the text, a single block's are
    [text | target | references].
    """

    name: str
    label: str
    matches: Callable[[nn.Module], bool]
    blocks: Callable[[nn.Module], Sequence[Block]]
    grid: Callable[[nn.Module, Tensor], Grid]
    hidden: Callable[[nn.Module], int]
    linear: int = 24
    """Linear operations of a layer, in units of tokens x hidden^2 (`topi_core.cost.layer_flops`)."""


def padded_grid(latent: Tensor, patch: int) -> Grid:
    """Token grid of a latent [..., H, W] whose sides ComfyUI pads to the patch size."""
    height, width = latent.shape[-2:]
    return -(-height // patch), -(-width // patch)
