"""Carries a plan out: what the blocks of a network and their attentions get in one call. It knows no saving.

Blocks are reached by ComfyUI's block replacements, where those of others are called by ours, or by torch's hooks until
the call ends where a network has none; attentions by ComfyUI's override, of which there is one for the whole call.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache, partial
from typing import Any

from torch import Tensor, nn

from ...topi_core.plan import Attention, Call, Plan
from .compiled import INNER, Compiled, isolated_attention
from .families.family import Arguments, Block


def carry_out(
    plan: Plan, call: Call, executor, given: Arguments, blocks: Sequence[Block], compiled: Compiled | None
) -> Tensor:
    """Calls the network so that it computes what the plan says."""
    if plan.answer is not None:
        return plan.answer
    carrier = Carrier(plan, call, blocks, given.family.pe_dim, given.options)
    options = dict(given.options)
    if plan.attention:
        options["optimized_attention_override"] = carrier.attend
    with ExitStack() as until:
        if compiled:
            compiled.enter(blocks, until)
            inner = options.get("optimized_attention_override")
            options |= {"optimized_attention_override": isolated_attention, INNER: inner}
        if given.family.hooked is not None:
            carrier.hook(given.family.hooked, until)
        else:
            options["patches_replace"] = carrier.replacements(given.options.get("patches_replace", {}))
        args, kwargs = given.with_options(options)
        return executor(*args, **kwargs)


class Carrier:
    """Stands before and behind the blocks of one call, and before their attentions."""

    def __init__(self, plan: Plan, call: Call, blocks: Sequence[Block], pe_dim: int, options: dict[str, Any]):
        self.plan, self.call, self.blocks = plan, call, blocks
        # dimensions that run over tokens, of arguments as they are called in ComfyUI's replacements
        self.dims = {"pe": (pe_dim,), "image_pe": (pe_dim,), "attn_mask": (-2, -1)}
        self.previous: Callable | None = options.get("optimized_attention_override")
        self.layer = -1  # that runs now; -1: none
        self.attentions = 0  # of it, so far
        self.shortened: dict[int, tuple[Tensor, Tensor]] = {}  # positions and masks, by the id of what was given
        self.tokens: dict[str, int] = {}  # that the cut leaves, by the kind of block

    @property
    def wanted(self) -> list[int]:
        """Layers that the plan has to do with; the first one tells that the network really runs."""
        plan, depth = self.plan, len(self.blocks)
        first = depth if plan.cut is None else plan.first_layer
        return sorted({0, *range(first, depth), *plan.attention, *plan.inputs, *[depth - 1] * bool(plan.output)})

    def enter(self, layer: int, args: dict[str, Any]) -> dict[str, Any]:
        """What a block gets in place of these arguments, which stay as they are."""
        plan, call, block = self.plan, self.call, self.blocks[layer]
        if layer == 0:
            call.computed = True
            if "txt" in args:  # patches after the input may have put tokens before the prompt's, as USO's style does
                call.layout = call.layout.with_text(args["txt"].shape[1])
        for see in plan.inputs.get(layer, ()):
            see(layer, args["img"], block.layout(call.layout))
        if plan.cut is not None and layer >= plan.first_layer:
            args = self._shorter(args, block)
        self.layer, self.attentions = layer, 0
        return args

    def leave(self, layer: int, hidden: Tensor) -> Tensor:
        """What goes on behind a block."""
        self.layer = -1
        if layer == len(self.blocks) - 1:
            for change in self.plan.output:
                hidden = change(hidden, self.blocks[layer].layout(self.call.layout))
        return hidden

    def attend(self, function: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *rest, **kwargs) -> Tensor:
        """ComfyUI's `optimized_attention_override`. What would have run, another pack's or ComfyUI's own, is called."""
        run = function if self.previous is None else partial(self.previous, function)
        handlers = self.plan.attention.get(self.layer)
        if not handlers:
            return run(q, k, v, heads, *rest, **kwargs)
        mask = rest[0] if rest else kwargs.get("mask")
        site = self.layer, self.attentions
        self.attentions += 1
        seen = Attention(site, q, k, v, heads, mask, splits_later=not kwargs.get("skip_reshape"))
        for handle in handlers:
            handle(seen)
        if seen.mask is not mask:
            if rest:
                rest = (seen.mask, *rest[1:])
            else:
                kwargs["mask"] = seen.mask
        return run(seen.q, seen.k, seen.v, heads, *rest, **kwargs)

    def replacements(self, others: Mapping[str, Any]) -> dict[str, Any]:
        """`patches_replace` with ours for the wanted blocks, around those of others."""
        dit = dict(others.get("dit", {}))
        for layer in self.wanted:
            name = self.blocks[layer].name
            dit[name] = partial(self._replacement, layer, dit.get(name))
        return {**others, "dit": dit}

    def _replacement(self, layer: int, previous: Callable | None, args: dict, extra: dict) -> dict:
        args = self.enter(layer, args)
        out = extra["original_block"](args) if previous is None else previous(args, extra)
        hidden = self.leave(layer, out["img"])
        return out if hidden is out["img"] else {**out, "img": hidden}

    def hook(self, names: Mapping[str, str], until: ExitStack) -> None:
        """The same by hooks; names: a block's own parameters -> the common ones."""
        for layer in self.wanted:
            before = partial(self._before, layer, names)
            until.enter_context(self.blocks[layer].module.register_forward_pre_hook(before, with_kwargs=True))
        last = len(self.blocks) - 1

        def behind(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
            return self.leave(last, out)

        until.enter_context(self.blocks[last].module.register_forward_hook(behind))

    def _before(self, layer: int, names: Mapping[str, str], module: nn.Module, args: tuple, kwargs: dict) -> tuple:
        """torch's forward pre-hook."""
        bound = _signature(type(module)).bind(module, *args, **kwargs)
        common = self.enter(layer, {names.get(name, name): value for name, value in bound.arguments.items()})
        for name in list(bound.arguments)[1:]:
            bound.arguments[name] = common[names.get(name, name)]
        return bound.args[1:], bound.kwargs

    def _shorter(self, args: dict[str, Any], block: Block) -> dict[str, Any]:
        """Hidden rows shortened once, positions and mask at every block (Eq. 12)."""
        cut = self.plan.cut
        assert cut is not None
        changed, img, txt = dict(args), args["img"], args.get("txt")
        if block.kind not in self.tokens:
            self.tokens[block.kind] = cut.tokens(block.layout(self.call.layout))
        if img.shape[1] != self.tokens[block.kind]:
            layout = block.layout(self.call.layout)
            if img.shape[1] != layout.tokens:
                raise RuntimeError(self.call.unexpected(img.shape[1]))
            changed["img"] = cut.gather(img, layout)
        if txt is not None and cut.text is not None and txt.shape[1] > cut.text:
            changed["txt"] = txt[:, : cut.text]
        for name, dims in self.dims.items():
            x = args.get(name)
            if x is not None:  # mostly the same one for all blocks of the call
                if id(x) not in self.shortened:  # x is kept alive, or its id could be another tensor's
                    self.shortened[id(x)] = x, cut.shorten(x, self.call.layout, dims)
                changed[name] = self.shortened[id(x)][1]
        return changed


@cache
def _signature(of: type[nn.Module]) -> inspect.Signature:
    return inspect.signature(of.forward)
