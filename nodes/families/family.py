"""What the patch must know of a model family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor, nn

from ...topi_core.layout import Grid, Part


class Block(NamedTuple):
    """One block. A double block's hidden states are those of the images, a single block's have the text as well."""

    kind: Literal["double_block", "single_block"]
    index: int
    module: nn.Module

    @property
    def name(self) -> tuple[str, int]:
        """Its key in `patches_replace["dit"]`: ("double_block", 3)."""
        return self.kind, self.index


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family: how to recognise its network, its blocks in order, and the token grid of a latent."""

    name: str
    label: str
    network: str
    """The full name of ComfyUI's class. It is never imported: an older ComfyUI may lack the model."""
    blocks: Callable[[nn.Module], Sequence[Block]]
    hidden: Callable[[nn.Module], int]
    variant: Callable[[nn.Module], bool] = lambda network: True
    """Which networks of the class, where several families share it."""
    linear: int = 24
    """Linear operations of a layer, in units of tokens x hidden^2 (`topi_core.cost.layer_flops`)."""
    keys: Callable[[nn.Module], int] | None = None
    """Width of a token's keys over all attentions of the network, where it is not `hidden` for each block."""
    key_heads: Callable[[nn.Module], int | None] = lambda network: None
    """How many heads of keys a network has, where fewer than of queries; some repeat them before the attention."""
    patch: Callable[[nn.Module], int] = lambda network: network.patch_size
    """Latent pixels a token, along one side."""
    frames: Callable[[nn.Module, Tensor], int] = lambda network, latent: 1
    """Token grids of a latent that stand below one another: those of its frames, where they are not rows of a batch."""
    order: tuple[Part, Part, Part] = ("text", "target", "references")
    """Of the tokens in the attention."""
    pe_dim: int = 2
    """The dimension of a block's positions that runs over the tokens."""
    references: Callable[[nn.Module, Mapping], list[Tensor]] = lambda network, given: given.get("ref_latents") or []
    """The reference latents that a call puts into the sequence, by its arguments."""
    arguments: Mapping[str, str] | None = None
    """For networks without block replacements: parameters of a block's forward -> their names in a `Change`."""

    def grid(self, network: nn.Module, latent: Tensor) -> Grid:
        """Token grid of a latent [..., H, W], whose sides ComfyUI pads to the patch."""
        rows, columns = (-(-side // self.patch(network)) for side in latent.shape[-2:])
        return self.frames(network, latent) * rows, columns

    @property
    def text_leaves(self) -> bool:
        """Whether text can leave the sequence: where blocks can be replaced, the networks give it a stream of its own,
        at one end of the attention's sequence, and look for nothing behind their blocks but the picture.
        """
        return self.arguments is None

    def keys_width(self, network: nn.Module) -> int:
        """Width of a token's keys over all attentions of the network; values are as wide."""
        return self.keys(network) if self.keys else len(self.blocks(network)) * self.hidden(network)

    def matches(self, network: nn.Module) -> bool:
        """Not for classes made from it, whose forward may be another."""
        return class_of(network) == self.network and self.variant(network)


def class_of(network: nn.Module) -> str:
    """The full name of a network's class."""
    return f"{type(network).__module__}.{type(network).__qualname__}"
