"""What the engine must know of a model family, and the one place that reads a network's arguments."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import Tensor, nn

from ....topi_core.layout import Grid, Layout, Part

Network = Any  # A network of ComfyUI's, with the attributes of its class


class Block(NamedTuple):
    """One block. A double block's hidden states are those of the images, a single block's have the text as well."""

    kind: str
    index: int
    module: nn.Module

    @property
    def name(self) -> tuple[str, int]:
        """Its key in `patches_replace["dit"]`: ("double_block", 3)."""
        return self.kind, self.index

    def layout(self, whole: Layout) -> Layout:
        """That of its hidden states."""
        return whole if self.kind == "single_block" else whole.without_text


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family: how to recognise its network, its blocks in order, what its calls are given, and how to reach it."""

    name: str
    label: str
    network: str  # the full name of ComfyUI's class, never imported: an older ComfyUI may lack the model
    double: str = ""  # the network's attribute that lists its double blocks
    single: str = ""  # and the one for the single blocks behind them
    hidden: Callable[[Network], int]
    variant: Callable[[Network], bool] = lambda network: True  # which networks, where families share a class
    linear: int = 24  # linear operations of a layer, in units of tokens x hidden^2 (`topi_core.cost.layer_flops`)
    keys: Callable[[Network], int] | None = None
    """Width of a token's keys over all attentions of the network, where it is not `hidden` for each block."""
    key_heads: Callable[[Network], int | None] = lambda network: None
    """How many heads of keys a network with grouped-query attention has; some repeat them before the attention."""
    patch: Callable[[Network], int] = lambda network: network.patch_size  # latent pixels a token, along one side
    frames: Callable[[Network, Tensor], int] = lambda network, latent: 1
    """Token grids of a latent that stand below one another: those of its frames, where they are not rows of a batch."""
    order: tuple[Part, Part, Part] = ("text", "target", "references")  # of the tokens in the attention
    pe_dim: int = 2  # the dimension of a block's positions that runs over the tokens
    references: Callable[[Network, Mapping], list[Tensor]] = lambda network, given: given.get("ref_latents") or []
    """The reference latents that a call puts into the sequence, by its arguments."""
    wrapper: str = WrappersMP.DIFFUSION_MODEL  # which of ComfyUI's wrappers sees a call of the network
    network_of: Callable[[Any], Network] = lambda owner: owner  # from the object whose call that wrapper sees
    text: str = "context"  # which argument of that call is the text [B, X, W]
    hooked: Mapping[str, str] | None = None
    """How a plan reaches the blocks: None, by ComfyUI's block replacements; else by torch's hooks, and this maps
    parameters of a block's forward to their names in a replacement (`apply`)."""
    text_leaves: bool = True
    """Whether text can leave the sequence: it has a stream of its own, at one end of the attention's, and the network
    looks for nothing behind its blocks but the picture."""

    def blocks(self, network: Network) -> list[Block]:
        kinds = (("double_block", self.double), ("single_block", self.single))
        return [Block(kind, i, block) for kind, name in kinds if name for i, block in enumerate(getattr(network, name))]

    def grid(self, network: Network, latent: Tensor) -> Grid:
        """Token grid of a latent [..., H, W], whose sides ComfyUI pads to the patch."""
        rows, columns = (-(-side // self.patch(network)) for side in latent.shape[-2:])
        return self.frames(network, latent) * rows, columns

    def keys_width(self, network: Network) -> int:
        """Width of a token's keys over all attentions of the network; values are as wide."""
        return self.keys(network) if self.keys else len(self.blocks(network)) * self.hidden(network)

    def matches(self, network: Network) -> bool:
        """Not for classes made from it, whose forward may be another."""
        return class_of(network) == self.network and self.variant(network)


REACHED_FROM_OUTSIDE: dict[str, Any] = {
    "wrapper": WrappersMP.APPLY_MODEL,
    "network_of": lambda model: model.diffusion_model,
    "text": "c_crossattn",
    "text_leaves": False,
}
"""Of networks that ComfyUI gives no block replacements: every model has this wrapper."""


class Arguments:
    """What one call of a family's network was given."""

    def __init__(self, family: Family, executor: WrapperExecutor, args: Sequence, kwargs: Mapping[str, Any]):
        self.family, self.args, self.kwargs = family, args, kwargs
        function = getattr(executor.original, "__func__", executor.original)
        self.given: dict[str, Any] = dict(zip(_parameters(function), args, strict=False)) | dict(kwargs)
        self.options: dict[str, Any] = self.given["transformer_options"]
        self.latent: Tensor = next(iter(self.given.values()))
        self.network: Network = family.network_of(executor.class_obj)

    @cached_property
    def references(self) -> list[Tensor]:
        return self.family.references(self.network, self.given)

    @cached_property
    def layout(self) -> Layout:
        target, *references = (self.family.grid(self.network, x) for x in (self.latent, *self.references))
        return Layout(self.given[self.family.text].shape[1], target, tuple(references), self.family.order)

    @property
    def text_leaves(self) -> bool:
        """A mask over the text's tokens holds it in the sequence."""
        return self.family.text_leaves and self.given.get("attention_mask") is None

    def with_options(self, options: dict[str, Any]) -> tuple[Sequence, Mapping[str, Any]]:
        """args and kwargs with other transformer_options, in the place where other wrappers look for them."""
        if "transformer_options" in self.kwargs:
            return self.args, {**self.kwargs, "transformer_options": options}
        place = list(self.given).index("transformer_options")
        return [*self.args[:place], options, *self.args[place + 1 :]], self.kwargs


@cache
def _parameters(function: Callable) -> tuple[str, ...]:
    """Without the `self` of a method."""
    return tuple(name for name in inspect.signature(function).parameters if name != "self")


def class_of(network: Network) -> str:
    """The full name of a network's class."""
    return f"{type(network).__module__}.{type(network).__qualname__}"
