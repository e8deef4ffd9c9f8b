"""Baselines that leave out whole steps of the network: forecasts of its velocity, TeaCache and RegionE's step rule.

Each is a saving on ToPi's own engine. It stands where ComfyUI calls the network, whose output is the velocity of a
rectified flow [B, C, h, w], before it becomes a denoised latent and before CFG mixes the conditionings: what the
published ones do once per step behind CFG happens here for each conditioning. Here is also FluxKVCache's rule.

Axes: B batch rows (conditionings x images), T tokens of the target, W width, C channels, h and w cells of the latent.
Sigmas run from 1 to 0, and a step i goes from sigmas[i] to sigmas[i + 1].
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from topi_core.config import AnchorSettings, ReuseSettings
from topi_core.layout import Layout
from topi_core.plan import Call, CondKey, Plan, Saving
from topi_core.savings.reuse import Reuse

from .attach import attached, module_of

KEY = "bench"
ONE_ANCHOR = AnchorSettings(update_interval=1000)  # the most that the setting takes: the first step alone


# Forecasts on a fixed schedule


def every(steps: int, computed: int) -> frozenset[int]:
    """Which `computed` of the steps run: the first three, the last two, and others evenly between these."""
    if not min(5, steps) <= computed <= steps:
        raise ValueError(f"computed must be in [{min(5, steps)}, {steps}] for {steps} steps, got {computed}")
    if steps <= 5:
        return frozenset(range(steps))
    between = computed - 5
    evenly = (2 + (i + 1) * (steps - 4) // (between + 1) for i in range(between))
    return frozenset((0, 1, 2, *evenly, steps - 2, steps - 1))


class Held(Saving):
    """The velocity of the last computed step stands in at steps that are not computed."""

    order = 0  # of the polynomial in sigma through the last order + 1 computed velocities

    def __init__(self, computed: frozenset[int]):
        self.computed = computed
        self.known: dict[CondKey, dict[float, Tensor]] = {}  # sigma -> velocity [images, C, h, w], newest last

    def apply(self, plan: Plan, call: Call) -> bool:
        if call.step not in self.computed and all(cond in self.known for cond in call.conds):
            plan.kind = "skipped"
            plan.answer = torch.cat([self.forecast(self.known[cond], call) for cond in call.conds])
        return True

    def commit(self, plan: Plan, call: Call, output: Tensor) -> None:
        for prompt, cond in enumerate(call.conds):
            known = self.known.setdefault(cond, {})
            known.pop(call.sigma, None)  # a sampler that comes back to a sigma replaces what it found there
            known[call.sigma] = output[call.rows(prompt)]
            while len(known) > self.order + 1:
                del known[next(iter(known))]

    def forecast(self, known: Mapping[float, Tensor], call: Call) -> Tensor:
        """Velocity at the call's sigma; while few are known, the polynomial has a lower order."""
        terms = zip(lagrange(list(known), call.sigma), known.values(), strict=True)
        newest = next(reversed(known.values()))
        return sum(weight * velocity.float() for weight, velocity in terms).to(newest.dtype)

    def release(self) -> None:
        self.known.clear()


class Linear(Held):
    """The line in sigma through the last two computed velocities."""

    order = 1


class Quadratic(Held):
    """The parabola in sigma through the last three computed velocities."""

    order = 2


def lagrange(at: Sequence[float], sigma: float) -> list[float]:
    """Weights of values known `at` these sigmas, in the value at `sigma` of the polynomial through them all."""
    weights = []
    for i, own in enumerate(at):
        weight = 1.0
        for j, other in enumerate(at):
            if j != i:
                weight *= (sigma - other) / (own - other)
        weights.append(weight)
    return weights


# RegionE


def decay(
    sigmas: Sequence[float], gammas: Sequence[float], delta: float, first: int, last: int, symmetric: bool = False
) -> dict[int, float]:
    """RegionE's skipped steps, each with the factor of the velocity there (arXiv 2510.25590).

    r_i = gamma_i (1 + sigma_i - sigma_(i-1)), with gamma_i = gammas[i - 1], is the expected ratio of the norms of two
    neighbouring velocities. A step is skipped while the product of r since the last computed one is at most `delta`
    below 1, and never where r_i >= 1, nor among the `first` and the `last` steps. The factor is r_i alone, not the
    product: a second skipped step in a row shrinks the velocity by less than the rule expects, as published.

    symmetric: a step is skipped while the product is within `delta` of 1 on either side. This is not RegionE's; it is
    for models whose velocities grow, where the published rule computes nearly every step.
    """
    factors, product = {}, 1.0
    for i in range(max(first, 1), len(sigmas) - 1 - last):
        ratio = gammas[i - 1] * (1 + sigmas[i] - sigmas[i - 1])
        product *= ratio
        if abs(1 - product) <= delta and (symmetric or ratio < 1):
            factors[i] = ratio
        else:
            product = 1.0
    return factors


class Decayed(Held):
    """RegionE's step rule alone: its regions, its keys and values and the refresh that they need are not here."""

    def __init__(self, factors: Mapping[int, float], steps: int):
        super().__init__(frozenset(range(steps)) - factors.keys())
        self.factors = factors

    def forecast(self, known: Mapping[float, Tensor], call: Call) -> Tensor:
        return super().forecast(known, call) * self.factors[call.step]


# TeaCache


@dataclass
class Ends:
    """What one call of FLUX.1 computes of the target before its first block and behind the last, by its own modules."""

    network: Any
    latent: Tensor  # [B, C, h, w]
    timestep: Tensor  # [B]
    pooled: Tensor | None  # [B, width of the pooled text]
    guidance: Tensor | None  # [B]

    @cached_property
    def hidden(self) -> Tensor:
        """The target's rows as the first block gets them [B, T, W]."""
        tokens, _ = self.network.process_img(self.latent)
        return self.network.img_in(tokens)

    @cached_property
    def vector(self) -> Tensor:
        """Timestep, guidance and pooled text, which modulate every block [B, W]."""
        from comfy.ldm.flux.layers import timestep_embedding

        network, dtype = self.network, self.latent.dtype
        vector = network.time_in(timestep_embedding(self.timestep, 256).to(dtype))
        if network.params.guidance_embed and self.guidance is not None:
            vector = vector + network.guidance_in(timestep_embedding(self.guidance, 256).to(dtype))
        width = network.params.vec_in_dim
        pooled = self.latent.new_zeros(len(self.latent), width) if self.pooled is None else self.pooled[:, :width]
        return vector + network.vector_in(pooled)

    def modulated(self) -> Tensor:
        """The target's rows as they enter the first attention's projections [B, T, W]."""
        block = self.network.double_blocks[0]
        modulation, _ = block.img_mod(self.vector)
        return block.img_norm1(self.hidden) * (1 + modulation.scale) + modulation.shift

    def velocity(self, hidden: Tensor) -> Tensor:
        """What the network makes of the target's rows behind its last block [B, T, W] -> [B, C, h, w]."""
        patch, (height, width) = self.network.patch_size, self.latent.shape[-2:]
        rows, columns = -(-height // patch), -(-width // patch)
        out = self.network.final_layer(hidden, self.vector).unflatten(1, (rows, columns))
        out = out.unflatten(3, (-1, patch, patch)).permute(0, 3, 1, 4, 2, 5)  # [B, C, rows, patch, columns, patch]
        return out.flatten(4).flatten(2, 3)[..., :height, :width]


class TeaCache(Saving):
    """Skips the blocks while the first one's input has hardly changed (TeaCache, arXiv 2411.19108).

    The relative L1 change of the modulated input from each step to the next, through a polynomial of degree 4
    (`coefficients`, highest first) that makes of it the expected relative change of the output, is summed up. While the
    sum stays below `threshold`, what all blocks together added to their input at the last computed step is added to
    this step's input. The first and the last step are computed. Unlike the published code for text to image, the
    change and the residual are those of the target's rows, without the references'. A whole batch shares one decision.
    """

    def __init__(self, watch: Watch, threshold: float, coefficients: Sequence[float]):
        self.watch, self.threshold, self.coefficients = watch, threshold, coefficients
        self.modulated: dict[tuple[CondKey, ...], Tensor] = {}  # of the step before [B, T, W]
        self.sums: dict[tuple[CondKey, ...], float] = {}  # since the last computed step
        self.residuals: dict[tuple[CondKey, ...], Tensor] = {}  # of the last computed step [B, T, W]

    def observe(self, plan: Plan, call: Call) -> bool:
        self._change(call)
        self._compute(plan)
        return True

    def apply(self, plan: Plan, call: Call) -> bool:
        change = self._change(call)
        if change is None or call.conds not in self.residuals or call.step == self.watch.steps - 1:
            self._compute(plan)
            return True
        total = self.sums[call.conds] = self.sums.get(call.conds, 0.0) + polynomial(self.coefficients, change)
        if total < self.threshold:
            ends = self.watch.current
            plan.kind, plan.answer = "skipped", ends.velocity(ends.hidden + self.residuals[call.conds])
        else:
            self._compute(plan)
        return True

    def commit(self, plan: Plan, call: Call, output: Tensor) -> None:
        self.residuals[call.conds] = plan.notes[self]
        self.sums[call.conds] = 0.0

    def release(self) -> None:
        self.modulated.clear()
        self.residuals.clear()

    def _change(self, call: Call) -> float | None:
        """Relative L1 change of the modulated input since the step before; None at the first one."""
        now, before = self.watch.current.modulated(), self.modulated.get(call.conds)
        self.modulated[call.conds] = now
        return None if before is None else relative_change(now, before).item()

    def _compute(self, plan: Plan) -> None:
        plan.output.append(partial(self._behind, plan, self.watch.current))

    def _behind(self, plan: Plan, ends: Ends, hidden: Tensor, layout: Layout) -> Tensor:
        if hidden.shape[1] != layout.tokens:
            raise RuntimeError(
                f"TeaCache found {hidden.shape[1]} of {layout.tokens} tokens behind the last block: put it on a model "
                "without another saving that shortens the sequence"
            )
        plan.notes[self] = hidden[:, layout.target] - ends.hidden
        return hidden


def relative_change(now: Tensor, before: Tensor, dims: Sequence[int] | None = None) -> Tensor:
    """Relative L1 change mean|now - before| / mean|before|, over these dimensions or over all."""
    now, before = now.float(), before.float()
    return (now - before).abs().mean(dims) / before.abs().mean(dims)


def polynomial(coefficients: Sequence[float], x: Any) -> Any:
    """Value at x, a number or a tensor; the coefficient of the highest power is the first."""
    value = 0.0 * x
    for coefficient in coefficients:
        value = value * x + coefficient
    return value


# On a model


@dataclass
class Watch:
    """What a run is given and no saving sees: its sigmas, and what the call at hand is about to compute."""

    steps: int
    sigmas: tuple[float, ...] = ()
    ends: Ends | None = None

    @property
    def current(self) -> Ends:
        assert self.ends is not None, "no call of the network is under way"
        return self.ends

    def sample(self, executor, *args, **kwargs):
        """OUTER_SAMPLE: refuses a run of another number of steps."""
        sigmas = inspect.signature(executor.original).bind(*args, **kwargs).arguments["sigmas"]
        if len(sigmas) - 1 != self.steps:
            raise ValueError(f"this baseline was set up for {self.steps} steps, and the run has {len(sigmas) - 1}")
        self.sigmas = tuple(sigmas.tolist())
        try:
            return executor(*args, **kwargs)
        finally:
            self.sigmas, self.ends = (), None

    def call(self, executor, latent, timestep, context, y=None, guidance=None, *rest, **options) -> Tensor:
        """DIFFUSION_MODEL of FLUX.1."""
        self.ends = Ends(executor.class_obj, latent, timestep, y, guidance)
        return executor(latent, timestep, context, y, guidance, *rest, **options)


def watched(
    nodes: dict[str, type], model, steps: int, make: Callable[[Watch], Sequence[Saving]], ends: bool = False
) -> tuple:
    """The model with savings for runs of so many steps, and its trace; `ends`: they need FLUX.1's first block."""
    from comfy.model_sampling import CONST
    from comfy.patcher_extension import WrappersMP

    family = _family(nodes, model)
    if family.wrapper != WrappersMP.DIFFUSION_MODEL or not isinstance(model.get_model_object("model_sampling"), CONST):
        raise ValueError(f"a baseline of steps needs the velocity of a flow model, which {family.label} does not show")
    if ends and family.name != "flux1":
        raise ValueError(f"this baseline knows the first block of FLUX.1, and not that of {family.label}")
    watch, model = Watch(steps), model.clone()
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, watch.sample)  # around ToPi's, which comes second
    if ends:
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, watch.call)
    return attached(nodes, model, lambda *run: make(watch), anchors=ONE_ANCHOR)


def _family(nodes: dict[str, type], model):
    return module_of(nodes).family_of(model.get_model_object("diffusion_model"))


def _forecast(kind: type[Held], nodes, model, *, steps: int, computed: int) -> tuple:
    """`computed` of the steps run, as `every` has them."""
    chosen = every(steps, computed)
    return watched(nodes, model, steps, lambda watch: [kind(chosen)])


def teacache(nodes, model, *, steps: int, coefficients: Sequence[float], threshold: float) -> tuple:
    """TeaCache; the coefficients are this model's own, for so many steps (`fit.constants`)."""
    return watched(nodes, model, steps, lambda watch: [TeaCache(watch, threshold, coefficients)], ends=True)


def regione(
    nodes,
    model,
    *,
    steps: int,
    gammas: Sequence[float],
    delta: float,
    first: int | None = None,
    last: int = 2,
    symmetric: bool = False,
) -> tuple:
    """RegionE's step rule (`decay`); the gammas are this model's own, for so many steps (`fit.constants`).

    first, last: steps that are always computed, the published 6 and 2 of 28; the first ones shrink with the steps.
    """
    if len(gammas) != steps - 1:
        raise ValueError(f"RegionE's rule needs {steps - 1} gammas for {steps} steps, got {len(gammas)}")
    start = round(steps * 6 / 28) if first is None else first

    def make(watch: Watch) -> list[Saving]:
        return [Decayed(decay(watch.sigmas, gammas, delta, start, last, symmetric), steps)]

    return watched(nodes, model, steps, make)


def flux_kv_cache(nodes, model) -> tuple:
    """ComfyUI's FluxKVCache: ToPi's own Reuse with the first step as its only anchor.

    The references' keys and values are those of that step, without a forecast, and the text is computed. That node also
    changes the model's reference method to "index_timestep_zero"; here the method is the conditioning's.
    """
    key_heads = _family(nodes, model).key_heads

    def make(run, references, network, seed: int) -> list[Saving]:
        return [Reuse(run, references, run.settings.reuse, key_heads(network))]

    return attached(nodes, model, make, anchors=ONE_ANCHOR, reuse=ReuseSettings(forecast=False, reuse_text=False))


BASELINES: dict[str, Callable[..., tuple]] = {
    "held": partial(_forecast, Held),
    "linear": partial(_forecast, Linear),
    "quadratic": partial(_forecast, Quadratic),
    "teacache": teacache,
    "regione": regione,
    "flux_kv_cache": flux_kv_cache,
}
