"""Puts ToPi on a model: a clone with two keyed wrappers. Disconnecting the node is the removal.

OUTER_SAMPLE makes the state of a run and drops it at its end. DIFFUSION_MODEL looks at each call of the network and
adds, for that call only, the block replacements it needs; those that were there before are called by ours.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import comfy.model_patcher
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..topi_core.config import Settings
from ..topi_core.layout import Layout
from ..topi_core.select import realign
from ..topi_core.trace import Anchor, Run, Trace
from .families.family import Block, Family
from .picture import picture
from .run import Call, RunState, State

KEY = "topi"
log = logging.getLogger(__name__)

Change = Callable[[dict], dict]
"""Takes a block's arguments and returns those it shall get; never changes the dict it was given."""


def attach(
    model: ModelPatcher,
    family: Family,
    settings: Settings,
    trace: Trace,
    on_anchor: Callable[[Run, Anchor], None] | None = None,
) -> ModelPatcher:
    """A clone of the model that prunes by these settings, appends its runs to the trace and tells of each anchor."""
    return put(model, Patch(family, settings, trace, on_anchor))


def put(model: ModelPatcher, patch: Patch) -> ModelPatcher:
    """A clone of the model with the wrappers of a patch."""
    patched = model.clone()
    for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, patch.sample), (WrappersMP.DIFFUSION_MODEL, patch.call)):
        patched.remove_wrappers_with_key(kind, KEY)  # of two ToPi nodes in a row, the last one counts
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    return patched


@dataclass
class Patch:
    """The two wrappers. Holds settings only; the state of a run travels in its transformer_options."""

    family: Family
    settings: Settings
    trace: Trace
    on_anchor: Callable[[Run, Anchor], None] | None = None
    warned: set[str] = field(default_factory=set)

    def sample(self, executor, *args, **kwargs):
        """OUTER_SAMPLE: one run's lifetime (`CFGGuider.outer_sample`)."""
        guider = executor.class_obj
        arguments = inspect.signature(executor.original).bind(*args, **kwargs).arguments
        _refuse_compiled(guider.model_patcher, guider.model_options)
        if "multigpu_clones" in guider.model_options:
            raise RuntimeError(
                "ToPi cannot prune a model that is sampled on several GPUs at once; remove one of the two"
            )
        state = self.start(guider, arguments)
        self.trace.runs.append(state.record)

        original = guider.model_options
        guider.model_options = comfy.model_patcher.create_model_options_clone(original)
        guider.model_options.setdefault("transformer_options", {})[KEY] = state
        try:
            result = executor(*args, **kwargs)
        finally:
            guider.model_options = original
        state.finish(result)
        log.info("ToPi: %s", state.record.summary())
        return result

    def start(self, guider, arguments: dict[str, Any]) -> State:
        """The state of a run that a guider is about to make with the arguments of its `outer_sample`."""
        s, patcher = self.settings, guider.model_patcher
        latent_format = patcher.get_model_object("latent_format")
        network = patcher.get_model_object("diffusion_model")
        record = Run(
            self.family.name,
            s,
            patch=network.patch_size,
            cell_pixels=latent_format.spacial_downscale_ratio,
            hidden=self.family.hidden(network),
            linear=self.family.linear,
        )
        sampling = patcher.get_model_object("model_sampling")
        high = sampling.percent_to_sigma(s.start_percent)
        low = float("-inf") if s.end_percent == 1 else sampling.percent_to_sigma(s.end_percent)
        draw = partial(picture, latent_format=latent_format)
        seed, images = arguments.get("seed") or 0, arguments["noise"].shape[0]
        return RunState(record, (high, low), seed, images, draw, self.on_anchor)

    def call(self, executor, *args, **kwargs):
        """DIFFUSION_MODEL: one call of the network."""
        names = list(inspect.signature(executor.original).parameters)
        given = dict(zip(names, args, strict=False)) | kwargs
        options = given["transformer_options"]
        state = options.get(KEY)
        if not isinstance(state, State) or "sample_sigmas" not in options:
            self._warn_once("ToPi: this sampler does not go through ComfyUI's sampling, so the model runs without ToPi")
            return executor(*args, **kwargs)

        network, x, references = executor.class_obj, given["x"], given.get("ref_latents") or []
        if x.shape[0] != len(options["uuids"]) * state.images:
            self._warn_once(
                "ToPi: another patch splits the batch that ComfyUI made of the prompts, so the model runs without ToPi"
            )
            return executor(*args, **kwargs)
        grids = tuple(self.family.grid(network, reference) for reference in references)
        layout = Layout(given["context"].shape[1], self.family.grid(network, x), grids)
        call = state.begin(options, references, layout)
        own = _with_replacements(options, self._changes(network, state, call))
        if "transformer_options" in kwargs:
            kwargs["transformer_options"] = own
        else:  # other wrappers look for it by its place
            args = list(args)
            args[names.index("transformer_options")] = own
        result = executor(*args, **kwargs)
        state.end(call)
        return result

    def _changes(self, network, state: State, call: Call) -> dict[Block, Change]:
        """What to do with the arguments of which blocks in this call."""
        blocks = list(enumerate(self.family.blocks(network)))
        changes: dict[Block, Change] = {blocks[0][1]: _marker(call)}
        if call.layers:
            changes |= {block: _scorer(state, call, layer) for layer, block in blocks if layer in call.layers}
        if call.kept is not None:
            changes |= {block: _pruner(call, block) for layer, block in blocks if layer >= self.settings.front_layers}
        return changes

    def _warn_once(self, sentence: str) -> None:
        if sentence not in self.warned:
            self.warned.add(sentence)
            log.warning(sentence)


def _with_replacements(options: dict, changes: dict[Block, Change]) -> dict:
    """A copy of transformer_options in which these blocks get changed arguments."""
    replace = options.get("patches_replace", {})
    dit = dict(replace.get("dit", {}))
    for block, change in changes.items():
        dit[tuple(block)] = _replacement(change, dit.get(tuple(block)))
    return options | {"patches_replace": {**replace, "dit": dit}}


def _replacement(change: Change, previous: Callable | None) -> Callable:
    def replacement(args: dict, extra: dict) -> dict:
        args = change(args)
        return extra["original_block"](args) if previous is None else previous(args, extra)

    return replacement


def _marker(call: Call) -> Change:
    """Notes that the network really runs: a cache may answer in its place."""

    def mark(args: dict) -> dict:
        call.computed = True
        return args

    return mark


def _image_start(block: Block, layout: Layout) -> int:
    """Where the target begins in the block's hidden states."""
    return layout.text_tokens if block.kind == "single_block" else 0


def _check(found: int, call: Call, start: int) -> None:
    expected = call.layout.tokens - (call.layout.text_tokens - start)
    if found != expected:
        raise RuntimeError(
            f"ToPi expected {expected} tokens ({call.layout}) and found {found}; "
            "another patch changes the sequence: remove it or ToPi Patch"
        )


def _pruner(call: Call, block: Block) -> Change:
    """Shortens what a block gets: hidden rows once, positions and mask at every block (Eq. 12)."""
    start = _image_start(block, call.layout)
    context = start + call.layout.target_tokens

    def prune(args: dict) -> dict:
        changed = dict(args)
        if args["img"].shape[1] != context + call.kept.shape[1]:
            _check(args["img"].shape[1], call, start)
            changed["img"] = realign(args["img"], context, call.kept)
        changed["pe"] = _realigned(call, args["pe"], (2,))
        if args.get("attn_mask") is not None:
            changed["attn_mask"] = _realigned(call, args["attn_mask"], (-2, -1))
        call.computed = True
        return changed

    return prune


def _realigned(call: Call, x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """x without the dropped tokens along those dims that run over the whole sequence; once a call."""
    key = (id(x), dims)
    if key not in call.positions:
        short = x
        for dim in dims:
            if x.shape[dim] == call.layout.tokens:
                short = realign(short, call.layout.context.start, call.kept, dim % x.ndim)
        call.positions[key] = (x, short)  # x is kept alive, or its id could be another tensor's
    return call.positions[key][1]


def _scorer(state: State, call: Call, layer: int) -> Change:
    """Listens to one block's attention through ComfyUI's override, or looks at its input."""

    def listen(args: dict) -> dict:
        call.computed = True
        if call.features:
            state.score_features(call, layer, _whole(args, call.layout))
            if not call.search:
                return args
        options = args["transformer_options"]
        previous = options.get("optimized_attention_override")

        def attention(function, q, k, v, heads, *rest, **kwargs):
            if layer not in call.heard:
                heads_first = [x if kwargs.get("skip_reshape") else _split_heads(x, heads) for x in (q, k, v)]
                if all(x.shape[2] == call.layout.tokens for x in heads_first):
                    mask = rest[0] if rest else kwargs.get("mask")
                    state.score(call, layer, *heads_first, _four_dims(mask))
            if previous is None:
                return function(q, k, v, heads, *rest, **kwargs)
            return previous(function, q, k, v, heads, *rest, **kwargs)

        return args | {"transformer_options": options | {"optimized_attention_override": attention}}

    return listen


def _whole(args: dict, layout: Layout) -> Tensor:
    """The block's input as one sequence [B, N, W], text first."""
    hidden = args["img"]
    return hidden if hidden.shape[1] == layout.tokens else torch.cat((args["txt"], hidden), 1)


def _split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _four_dims(mask: Tensor | None) -> Tensor | None:
    """A mask as ComfyUI's attention reads it: [N, N] and [B, N, N] are for all heads."""
    if mask is None or mask.ndim == 4:
        return mask
    return mask[None, None] if mask.ndim == 2 else mask[:, None]


def _refuse_compiled(patcher: ModelPatcher, model_options: dict[str, Any]) -> None:
    """A compiled network would replay an anchor step for pruned ones: its guards leave out transformer_options."""
    wrappers = model_options.get("transformer_options", {}).get("wrappers", {})
    compiled = wrappers.get(WrappersMP.APPLY_MODEL, {}).get("torch.compile")
    if compiled or hasattr(patcher.get_model_object("diffusion_model"), "_orig_mod"):
        raise RuntimeError("ToPi cannot prune a compiled model yet: remove TorchCompileModel, or bypass ToPi Patch")
