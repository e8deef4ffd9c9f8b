"""Puts ToPi on a model: a clone with three keyed wrappers. Disconnecting the node is the removal.

OUTER_SAMPLE makes the engine of a run and drops it at its end. PREDICT_NOISE sees each evaluation of the guided model,
which may be skipped. The third one sees each call of the network: which of ComfyUI's wrappers that is, the family says.
"""

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...topi_core.config import Model, Settings
from ...topi_core.plan import Saving
from ...topi_core.references import References
from ...topi_core.report import summary
from ...topi_core.savings.prune import Prune
from ...topi_core.savings.reuse import Reuse
from ...topi_core.savings.score import Score
from ...topi_core.trace import Anchor, Run, Trace
from .apply import carry_out
from .compiled import take_over
from .families.family import Arguments, Family, class_of
from .memory import CallMemory
from .picture import picture
from .run import Engine

KEY = "topi"
log = logging.getLogger(__name__)


@dataclass
class Patch:
    """The three wrappers. Holds settings only; the engine of a run travels in its transformer_options."""

    family: Family
    model: Model
    settings: Settings
    trace: Trace  # gets each run when it starts
    on_anchor: Callable[[Run, Anchor], None] | None = None
    watched: Callable[[], bool] = lambda: True  # whether anybody will look at scores that decide nothing
    warned: set[str] = field(default_factory=set)

    def sample(self, executor, *args, **kwargs):
        """OUTER_SAMPLE: one run's lifetime (`CFGGuider.outer_sample`)."""
        guider = executor.class_obj
        arguments = inspect.signature(executor.original).bind(*args, **kwargs).arguments
        _refuse(guider)
        original = guider.model_options
        own = comfy.model_patcher.create_model_options_clone(original)
        engine = self.engine(guider, arguments)
        engine.compiled = take_over(own, guider.model_patcher)
        self.trace.runs.append(engine.record)
        own.setdefault("transformer_options", {})[KEY] = engine
        guider.model_options = own
        try:
            result = executor(*args, **kwargs)
            engine.finish(result)
        finally:
            guider.model_options = original
            engine.release()
        log.info("ToPi: %s", summary(engine.record))
        return result

    def engine(self, guider, arguments: dict[str, Any]) -> Engine:
        """For a run that a guider is about to make with the arguments of its `outer_sample`."""
        patcher, s, images = guider.model_patcher, self.settings.anchors, arguments["noise"].shape[0]
        get = patcher.get_model_object
        latent_format, network, sampling = get("latent_format"), get("diffusion_model"), get("model_sampling")
        high = float("inf") if s.start_percent == 0 else sampling.percent_to_sigma(s.start_percent)
        low = float("-inf") if s.end_percent == 1 else sampling.percent_to_sigma(s.end_percent)
        run = Run(self.model, self.settings, self.family.patch(network), latent_format.spacial_downscale_ratio)
        references = References(run, partial(picture, latent_format=latent_format), self.on_anchor)
        savings = self.savings(run, references, network, arguments.get("seed") or 0)
        memory = partial(CallMemory, patcher, self.family.keys_width(network))
        return Engine(self.family, network, savings, references, (high, low), images, memory)

    def savings(self, run: Run, references: References, network, seed: int) -> list[Saving]:
        """Scores where something is chosen by them or looked at, then what the mode saves."""
        scores = [Score(run, references, seed)] if not self.settings.keeps_all or self.watched() else []
        if self.settings.mode == "prune":
            return [*scores, Prune(references, self.model.front_layers)]
        return [*scores, Reuse(run, references, self.settings.reuse, self.family.key_heads(network))]

    def predict(self, executor, x: Tensor, timestep: Tensor, model_options: dict | None = None, *rest) -> Tensor:
        """PREDICT_NOISE: one evaluation of the guided model (`CFGGuider.outer_predict_noise`)."""
        options = model_options or {}
        engine: Any = options.get("transformer_options", {}).get(KEY)
        if not isinstance(engine, Engine):
            return executor(x, timestep, options, *rest)
        return engine.predict(executor, x, timestep, options, *rest)

    def call(self, executor, *args, **kwargs) -> Tensor:
        """One call of the network."""
        given = Arguments(self.family, executor, args, kwargs)
        engine: Any = given.options.get(KEY)
        why = None
        if not isinstance(engine, Engine) or "sample_sigmas" not in given.options:
            why = "ToPi: this sampler does not go through ComfyUI's sampling, so the model runs without ToPi"
        elif given.latent.shape[0] != len(given.options["uuids"]) * engine.images:
            why = (
                "ToPi: another patch splits the batch that ComfyUI made of the prompts, so the model runs without ToPi"
            )
        elif not engine.takes(given.network):
            why = f"ToPi: this run has a second model, of another kind ({class_of(given.network)}): without ToPi"
        if why is not None:
            if why not in self.warned:
                self.warned.add(why)
                log.warning(why)
            return executor(*args, **kwargs)
        try:
            return self._call(executor, given, engine)
        except Exception as error:
            if not _out_of_memory(error) or not engine.free():
                raise
        # Here the error's frames hold nothing any more.
        return self._call(executor, given, engine)

    def _call(self, executor, given: Arguments, engine: Engine) -> Tensor:
        plan, call = engine.begin(given)
        output = carry_out(plan, call, executor, given, engine.blocks_of(given.network), engine.compiled)
        engine.end(plan, call, output)
        return output


def attach(model: ModelPatcher, patch: Patch) -> ModelPatcher:
    """A clone of the model with the three wrappers of a patch."""
    patched = model.clone()
    for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.PREDICT_NOISE, WrappersMP.DIFFUSION_MODEL, WrappersMP.APPLY_MODEL):
        patched.remove_wrappers_with_key(kind, KEY)  # of two ToPi nodes in a row, the last one counts
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, patch.sample)
    patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, patch.predict)
    patched.add_wrapper_with_key(patch.family.wrapper, KEY, patch.call)
    return patched


def _out_of_memory(error: Exception) -> bool:
    """By ComfyUI's own judgement, which before 0.30 was the class of the error alone."""
    is_oom = getattr(mm, "is_oom", None)
    return is_oom(error) if is_oom else isinstance(error, mm.OOM_EXCEPTION)


def _refuse(guider) -> None:
    """RuntimeError beside what ToPi cannot work with."""
    if guider.model_patcher.get_additional_models_with_key("multigpu"):
        raise RuntimeError("ToPi cannot prune a model that is sampled on several GPUs at once; remove one of the two")
    patches = guider.model_options.get("transformer_options", {}).get("patches", {}).get("attn1_patch", [])
    if any(type(patch).__name__ == "KV_Attn_Input" for patch in patches):
        raise RuntimeError(  # it takes the references out of the sequence after the first step, and adds its own keys
            "ToPi cannot prune or reuse references that FluxKVCache has already taken out of the sequence: remove "
            "FluxKVCache, or bypass ToPi Patch (its mode reuse does the same for any model, with refreshes)"
        )
