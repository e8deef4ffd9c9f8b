"""What the blocks of a network get in one call: fewer tokens, a listener, or keys and values of an anchor.

Where ComfyUI lets a block be replaced, this is by block replacements, and those that were there before are called by
ours. Networks without them are reached by torch's hooks on their blocks, removed when the call ends.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import count

import torch
from torch import Tensor, nn

from ..topi_core.layout import Layout
from ..topi_core.reuse import Place, extend, extend_mask
from ..topi_core.select import realign
from .families.family import Block, Family
from .run import Call, State

POSITIONS, MASKS = ("pe", "image_pe"), ("attn_mask",)  # arguments of a block that run over its tokens, beside "img"

Change = Callable[[dict], dict]
"""Takes a block's arguments and returns those it shall get; never changes the dict it was given.

Whatever the family, these are called img, txt, pe, attn_mask and transformer_options, as in ComfyUI's replacements;
image_pe are positions of the image tokens alone, where a block has both.
"""


def changes(
    family: Family, network: nn.Module, state: State, call: Call, front_layers: int
) -> dict[Block, list[Change]]:
    """What to do, one thing after the other, with the arguments of which blocks in this call."""
    blocks = family.blocks(network)
    wanted = defaultdict(list, {blocks[0]: [_marker(call)]})
    for layer, block in enumerate(blocks):
        if layer in call.layers:
            wanted[block].append(_scorer(state, call, layer, block))
        if call.kind == "anchor" and call.caches:
            wanted[block].append(_attentions(call, layer, _keep))
        if call.kept is not None and (layer >= front_layers or call.kind == "reused"):
            wanted[block].append(_pruner(call, block, family.pe_dim))
        if call.kind == "reused":
            wanted[block].append(_attentions(call, layer, _reuse))
    return wanted


def with_replacements(options: dict, changes: Mapping[Block, list[Change]]) -> dict:
    """A copy of transformer_options in which these blocks get changed arguments."""
    replace = options.get("patches_replace", {})
    dit = dict(replace.get("dit", {}))
    for block, own in changes.items():
        dit[block.name] = _replacement(own, dit.get(block.name))
    return options | {"patches_replace": {**replace, "dit": dit}}


def _replacement(changes: Iterable[Change], previous: Callable | None) -> Callable:
    def replacement(args: dict, extra: dict) -> dict:
        for change in changes:
            args = change(args)
        return extra["original_block"](args) if previous is None else previous(args, extra)

    return replacement


def hook(changes: Mapping[Block, list[Change]], arguments: Mapping[str, str], hooks: ExitStack) -> None:
    """Changes what these blocks get until `hooks` is closed; arguments: a block's own names -> the common ones."""
    signatures = {type(block.module): inspect.signature(block.module.forward) for block in changes}
    for block, own in changes.items():
        before = partial(_before, own, arguments, signatures[type(block.module)])
        hooks.enter_context(block.module.register_forward_pre_hook(before, with_kwargs=True))


def _before(
    changes: Iterable[Change], arguments: Mapping[str, str], forward: inspect.Signature, module: nn.Module, args, kwargs
) -> tuple:
    """torch's forward pre-hook."""
    bound = forward.bind(*args, **kwargs)
    common = {arguments.get(name, name): value for name, value in bound.arguments.items()}
    for change in changes:
        common = change(common)
    for name in bound.arguments:
        bound.arguments[name] = common[arguments.get(name, name)]
    return bound.args, bound.kwargs


def _marker(call: Call) -> Change:
    """Notes that the network really runs, as a cache may answer in its place, and with how much text.

    Patches after the input may have put tokens before the prompt's, as USO's style reference does.
    """

    def mark(args: dict) -> dict:
        call.computed = True
        if "txt" in args:
            call.layout = replace(call.layout, text_tokens=args["txt"].shape[1])
        return args

    return mark


def _pruner(call: Call, block: Block, pe_dim: int) -> Change:
    """Shortens what a block gets: hidden rows once, positions and mask at every block (Eq. 12)."""

    def prune(args: dict) -> dict:
        layout = _own_layout(block, call.layout)
        text = min(call.text_tokens, layout.text_tokens)
        changed = dict(args)
        if args["img"].shape[1] != text + layout.target_tokens + call.kept.shape[1]:
            if args["img"].shape[1] != layout.tokens:
                raise RuntimeError(_unexpected(layout, args["img"].shape[1]))
            changed["img"] = _shorter(args["img"], layout, call)
        if "txt" in args and args["txt"].shape[1] > call.text_tokens:
            changed["txt"] = args["txt"][:, : call.text_tokens]
        for names, dims in ((POSITIONS, (pe_dim,)), (MASKS, (-2, -1))):
            changed |= {name: _realigned(call, args[name], dims) for name in names if args.get(name) is not None}
        return changed

    return prune


def _unexpected(layout: Layout, tokens: int) -> str:
    return (
        f"ToPi expected {layout.tokens} tokens ({layout}) and found {tokens}; "
        "another patch changes the sequence: remove it or ToPi Patch"
    )


def _own_layout(block: Block, layout: Layout) -> Layout:
    """That of a block's hidden states."""
    return layout if block.kind == "single_block" else layout.without_text


def _realigned(call: Call, x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """x without the dropped tokens along those dims that run over all tokens, or all of the images; once a call."""
    key = (id(x), dims)
    if key not in call.positions:
        short = x
        for dim in dims:
            layout = _layout_of(x.shape[dim], call.layout)
            if layout is not None:
                if call.kind == "reused" and dim == -1:
                    short = _keys_last(short, layout, call)
                else:
                    short = _shorter(short, layout, call, dim % x.ndim)
        call.positions[key] = (x, short)  # x is kept alive, or its id could be another tensor's
    return call.positions[key][1]


def _shorter(x: Tensor, layout: Layout, call: Call, dim: int = 1) -> Tensor:
    """x without the context tokens that this call drops, and without the text that leaves it."""
    x = realign(x, layout.context, call.kept, dim)
    if layout.text_tokens <= call.text_tokens:
        return x
    start = layout.text.start - (layout.context_tokens - call.kept.shape[1] if layout.text.start else 0)
    head, text, tail = x.tensor_split((start, start + layout.text_tokens), dim)
    return torch.cat((head, text.narrow(dim, 0, call.text_tokens), tail), dim)


def _keys_last(mask: Tensor, layout: Layout, call: Call) -> Tensor:
    """A mask's columns as the attention of a reused call has its keys: its own tokens, then the reused ones."""
    kept = torch.cat([cache.kept for cache in call.caches]).to(mask.device)
    columns = realign(mask, layout.context, kept, mask.ndim - 1).narrow(-1, layout.context.start, kept.shape[1])
    text, target = mask[..., layout.text], mask[..., layout.target]
    own = (target, text) if call.reuse_text or layout.text.start else (text, target)
    return torch.cat([*(part.expand(*columns.shape[:-1], -1) for part in own), columns], -1)


def _layout_of(tokens: int, layout: Layout) -> Layout | None:
    """The whole sequence's or that of the images alone, by their number of tokens; None for anything else."""
    return next((some for some in (layout, layout.without_text) if some.tokens == tokens), None)


def _attentions(call: Call, layer: int, attend: Callable) -> Change:
    """Puts `attend(call, place, attention, q, k, v, heads, ...)` around each of a block's attentions."""

    def change(args: dict) -> dict:
        number = count()  # most blocks have one attention
        return _attended(lambda *rest, **kwargs: attend(call, (layer, next(number)), *rest, **kwargs), args)

    return change


def _keep(call: Call, place: Place, attention: Callable, q: Tensor, k: Tensor, v: Tensor, *rest, **kwargs) -> Tensor:
    """Lets an attention run, and keeps the keys and values of its context for each cond of the call."""
    layout = _layout_of(k.shape[-2], call.layout)
    if layout is None:
        raise RuntimeError(_unexpected(call.layout, k.shape[-2]))
    parts = (layout.text, layout.context) if call.reuse_text else (layout.context,)
    keys, values = (x.chunk(len(call.caches)) for x in (k, v))
    for cache, own_k, own_v in zip(call.caches, keys, values, strict=True):
        cache.put(place, own_k, own_v, *parts)
    return attention(q, k, v, *rest, **kwargs)


def _reuse(call: Call, place: Place, attention: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *rest, **kwargs):
    """Lets an attention see the kept keys and values beside its own, and in place of those of text that left."""
    pairs = [cache.get(place, k.device, call.sigma, call.reuse_text) for cache in call.caches]
    keys, values = zip(*pairs, strict=True)
    tokens, kept = k.shape[-2], keys[0].x.shape[-2]
    own = slice(0, tokens)
    if call.reuse_text:  # at one end
        own = slice(call.text_tokens, tokens) if call.layout.text.start == 0 else slice(0, tokens - call.text_tokens)
    if rest and rest[0] is not None:
        rest = (extend_mask(rest[0], tokens, own, kept), *rest[1:])
    elif kwargs.get("mask") is not None:
        kwargs["mask"] = extend_mask(kwargs["mask"], tokens, own, kept)
    return attention(q, extend(k[..., own, :], keys), extend(v[..., own, :], values), heads, *rest, **kwargs)


def _scorer(state: State, call: Call, layer: int, block: Block) -> Change:
    """Listens to one block's attention over the whole sequence, or looks at its input, or both."""

    def listen(attention: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *rest, **kwargs):
        if layer not in call.heard:
            heads_first = [x if kwargs.get("skip_reshape") else _split_heads(x, heads) for x in (q, k, v)]
            if all(x.shape[2] == call.layout.tokens for x in heads_first):
                mask = rest[0] if rest else kwargs.get("mask")
                state.score(call, layer, *(_all_heads(x, heads) for x in heads_first), _four_dims(mask))
        return attention(q, k, v, heads, *rest, **kwargs)

    def change(args: dict) -> dict:
        if call.features:
            state.score_features(call, layer, args["img"], _own_layout(block, call.layout))
        return _attended(listen, args) if call.search or not call.features else args

    return change


def _attended(attend: Callable, args: dict) -> dict:
    """A block's arguments with `attend(attention, q, k, v, heads, ...)` around each of its attentions.

    `attention` takes the rest and is what would have run: another pack's override, or ComfyUI's own.
    """
    options = args["transformer_options"]
    previous = options.get("optimized_attention_override")

    def override(function, *rest, **kwargs):
        return attend(function if previous is None else partial(previous, function), *rest, **kwargs)

    return args | {"transformer_options": options | {"optimized_attention_override": override}}


def _split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _all_heads(x: Tensor, heads: int) -> Tensor:
    """Keys or values [B, fewer heads, N, D] that several heads of the queries share, as one each of these."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _four_dims(mask: Tensor | None) -> Tensor | None:
    """A mask as ComfyUI's attention reads it: [N, N] and [B, N, N] are for all heads."""
    if mask is None or mask.ndim == 4:
        return mask
    return mask[None, None] if mask.ndim == 2 else mask[:, None]
