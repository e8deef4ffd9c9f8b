"""Puts ToPi on a model: a clone with two keyed wrappers. Disconnecting the node is the removal.

OUTER_SAMPLE makes the state of a run and drops it at its end. The other one looks at each call of the network and
changes, for that call only, what some blocks get (`changes.py`). It is DIFFUSION_MODEL where ComfyUI lets a block be
replaced; networks without that are reached from outside, by APPLY_MODEL, which every model has.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ..topi_core.config import Settings
from ..topi_core.layout import Layout
from ..topi_core.trace import Anchor, Run, Trace
from .caches import Caches
from .changes import changes, hook, with_replacements
from .compiled import apart, take_over
from .families.family import Family, class_of
from .memory import Memory
from .picture import picture
from .run import RunState, State

KEY = "topi"
log = logging.getLogger(__name__)


def attach(model: ModelPatcher, patch: Patch) -> ModelPatcher:
    """A clone of the model with the two wrappers of a patch."""
    patched = model.clone()
    around_call = WrappersMP.DIFFUSION_MODEL if patch.family.arguments is None else WrappersMP.APPLY_MODEL
    for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, patch.sample), (around_call, patch.call)):
        patched.remove_wrappers_with_key(kind, KEY)  # of two ToPi nodes in a row, the last one counts
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    return patched


@dataclass
class Patch:
    """The two wrappers. Holds settings only; the state of a run travels in its transformer_options.

    Each run is appended to the trace when it starts, and `on_anchor` is told of each of its anchors.
    """

    family: Family
    settings: Settings
    trace: Trace
    on_anchor: Callable[[Run, Anchor], None] | None = None
    warned: set[str] = field(default_factory=set)

    def sample(self, executor, *args, **kwargs):
        """OUTER_SAMPLE: one run's lifetime (`CFGGuider.outer_sample`)."""
        guider = executor.class_obj
        arguments = inspect.signature(executor.original).bind(*args, **kwargs).arguments
        _refuse_other_cache(guider.model_options)
        if guider.model_patcher.get_additional_models_with_key("multigpu"):
            raise RuntimeError(
                "ToPi cannot prune a model that is sampled on several GPUs at once; remove one of the two"
            )
        original = guider.model_options
        own = comfy.model_patcher.create_model_options_clone(original)
        compiled = take_over(own, guider.model_patcher)
        state = self.start(guider, arguments)
        state.compiled = compiled
        self.trace.runs.append(state.record)
        own.setdefault("transformer_options", {})[KEY] = state
        guider.model_options = own
        try:
            result = executor(*args, **kwargs)
            state.finish(result)
        finally:
            guider.model_options = original
            state.release()
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
            patch=self.family.patch(network),
            cell_pixels=latent_format.spacial_downscale_ratio,
            hidden=self.family.hidden(network),
            linear=self.family.linear,
        )
        sampling = patcher.get_model_object("model_sampling")
        high = float("inf") if s.start_percent == 0 else sampling.percent_to_sigma(s.start_percent)
        low = float("-inf") if s.end_percent == 1 else sampling.percent_to_sigma(s.end_percent)
        draw = partial(picture, latent_format=latent_format)
        seed, images = arguments.get("seed") or 0, arguments["noise"].shape[0]
        memory = Memory(patcher, self.family.keys_width(network))
        caches = Caches(s.forecast, self.family.key_heads(network))
        return RunState(record, (high, low), seed, images, memory, caches, draw, self.on_anchor)

    def call(self, executor, *args, **kwargs):
        """DIFFUSION_MODEL or APPLY_MODEL: one call of the network."""
        names = inspect.signature(executor.original).parameters
        given = dict(zip(names, args, strict=False)) | kwargs
        options, x = given["transformer_options"], next(iter(given.values()))
        state = options.get(KEY)
        if not isinstance(state, State) or "sample_sigmas" not in options:
            self._warn_once("ToPi: this sampler does not go through ComfyUI's sampling, so the model runs without ToPi")
            return executor(*args, **kwargs)
        if x.shape[0] != len(options["uuids"]) * state.images:
            self._warn_once(
                "ToPi: another patch splits the batch that ComfyUI made of the prompts, so the model runs without ToPi"
            )
            return executor(*args, **kwargs)
        family = self.family
        network = executor.class_obj if family.arguments is None else executor.class_obj.diffusion_model
        if not family.matches(network) or len(family.blocks(network)) != self.settings.depth:
            self._warn_once(f"ToPi: this run has a second model, of another kind ({class_of(network)}): without ToPi")
            return executor(*args, **kwargs)

        try:
            return self._call(executor, network, args, kwargs, given, state)
        except Exception as error:
            if not _out_of_memory(error) or not state.give_up():
                raise
        # Here the error's frames hold nothing any more.
        return self._call(executor, network, args, kwargs, given, state)

    def _call(self, executor, network, args: Sequence, kwargs: dict[str, Any], given: dict[str, Any], state: State):
        """given: all arguments by name, in their order."""
        options, x = given["transformer_options"], next(iter(given.values()))
        family, hooked = self.family, self.family.arguments is not None
        text = given["c_crossattn" if hooked else "context"]
        references = family.references(network, given)
        grids = tuple(family.grid(network, reference) for reference in references)
        layout = Layout(text.shape[1], family.grid(network, x), grids, family.order)
        call = state.begin(options, references, layout, x, family.text_leaves and given.get("attention_mask") is None)
        wanted = changes(family, network, state, call, self.settings.front_layers)
        with ExitStack() as hooks:
            if state.compiled:
                blocks = family.blocks(network)
                wanted = {block: [*wanted.get(block, ()), apart] for block in blocks}
                state.compiled.enter(blocks, hooks)
            if hooked:
                hook(wanted, family.arguments, hooks)
            elif "transformer_options" in kwargs:
                kwargs = kwargs | {"transformer_options": with_replacements(options, wanted)}
            else:  # other wrappers look for it by its place
                args = list(args)
                args[list(given).index("transformer_options")] = with_replacements(options, wanted)
            result = executor(*args, **kwargs)
        state.end(call)
        return result

    def _warn_once(self, sentence: str) -> None:
        if sentence not in self.warned:
            self.warned.add(sentence)
            log.warning(sentence)


def _out_of_memory(error: Exception) -> bool:
    """By ComfyUI's own judgement, which before 0.30 was the class of the error alone."""
    is_oom = getattr(mm, "is_oom", None)
    return is_oom(error) if is_oom else isinstance(error, mm.OOM_EXCEPTION)


def _refuse_other_cache(model_options: dict[str, Any]) -> None:
    """ComfyUI's FluxKVCache takes the references out of the sequence after the first step, and adds its own keys."""
    patches = model_options.get("transformer_options", {}).get("patches", {}).get("attn1_patch", [])
    if any(type(patch).__name__ == "KV_Attn_Input" for patch in patches):
        raise RuntimeError(
            "ToPi cannot prune or reuse references that FluxKVCache has already taken out of the sequence: remove "
            "FluxKVCache, or bypass ToPi Patch (its mode reuse does the same for any model, with refreshes)"
        )
