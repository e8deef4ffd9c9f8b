"""One sampling run: which plan each call of the network gets. Made when the run starts, and gone when it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ...topi_core.config import Settings
from ...topi_core.plan import Call, CondKey, Plan, Saving
from ...topi_core.references import References
from ...topi_core.schedule import Schedule
from ...topi_core.trace import Run, Sampled
from .compiled import Compiled
from .families.family import Arguments, Block, Family
from .memory import CallMemory
from .recorder import Recorder


class Engine:
    """Holds what the run's savings share. Only `record` outlives it: the run's own, or what a calibration tells."""

    def __init__(
        self,
        family: Family,
        network: nn.Module,
        savings: Sequence[Saving],
        references: References,
        window: tuple[float, float],
        images: int,
        memory: Callable[[Tensor, Sequence[Tensor], int], CallMemory],
        record: Sampled | None = None,
    ):
        """For a run that samples a batch of `images` latents, with anchors between the two sigmas of `window`."""
        self.family = family
        self.network = network
        self.blocks = family.blocks(network)
        self.savings = savings
        self.references = references
        self.run: Run = references.run
        self.record = record or self.run
        self.window = window
        self.images = images
        self.memory = memory
        self.recorder = Recorder(self.run)
        self.compiled: Compiled | None = None
        self.schedule: Schedule | None = None
        self._sigma: tuple[Tensor | None, float] = None, 0.0

    def takes(self, network: nn.Module) -> bool:
        """Whether it can follow this network as well: a guider may have a second model."""
        same = network is self.network or len(self.family.blocks(network)) == len(self.blocks)
        return same and self.family.matches(network)

    def blocks_of(self, network: nn.Module) -> Sequence[Block]:
        return self.blocks if network is self.network else self.family.blocks(network)

    def begin(self, given: Arguments) -> tuple[Plan, Call]:
        """Decides what a call of the network computes."""
        sigma = self._sigma_of(given.options["sigmas"])
        if self.schedule is None:
            self.schedule = _schedule(self.run.settings, given.options["sample_sigmas"].tolist(), self.window)
        step, layout = self.schedule.step(sigma), given.layout
        self.recorder.begin(step, sigma)
        self.run.reference_tokens = max(self.run.reference_tokens, layout.reference_tokens)
        conds = conds_of(given.options)
        sets = self.references.find(conds, given.references, layout, self.images) if given.references else []
        memory = self.memory(given.latent, given.references, len(conds))
        call = Call(
            step, sigma, layout, conds, self.images, given.latent.device, sets, given.text_leaves, memory
        )  # fmt: skip
        return self._plan(call, self.schedule), call

    def _plan(self, call: Call, schedule: Schedule) -> Plan:
        if not schedule.active(call.sigma):
            return Plan()
        last = [each.anchor[0] if each.anchor else None for each in call.sets]
        if not any(at == call.step or schedule.due(call.step, at) for at in last):
            plan = Plan()
            if all([saving.apply(plan, call) for saving in self.savings]):
                return plan
        plan = Plan("anchor")
        return plan if all(saving.observe(plan, call) for saving in self.savings) else Plan()

    def end(self, plan: Plan, call: Call, output: Tensor) -> None:
        """Takes over what a call told, unless a cache kept the network from running."""
        self.recorder.add(plan, call)
        if not call.computed:
            return
        if plan.kind == "anchor":
            self.references.settle([each for each in call.sets if each.anchor and each.anchor[0] != call.step])
        for saving in self.savings:
            saving.commit(plan, call, output)
        if plan.kind == "anchor" and plan.counts:
            self.references.anchored(call)

    def finish(self, latent: Tensor) -> None:
        """Completes the record of a run that made this latent."""
        self.record.finish(latent)  # waits for the device, which the last step's time is to hold
        self.recorder.close()
        self.references.settle()

    def free(self) -> bool:
        """Lets go of what takes memory, as the device has run out of it; False where that is nothing."""
        return any([saving.free() for saving in self.savings])

    def release(self) -> None:
        """Lets go of everything, also where an error keeps this object alive."""
        for saving in self.savings:
            saving.release()
        self.references.clear()

    def _sigma_of(self, sigmas: Tensor) -> float:
        """The host waits for it once, however many calls ComfyUI makes of a step's prompts: these share the tensor."""
        if self._sigma[0] is not sigmas:
            self._sigma = sigmas, float(sigmas[0])
        return self._sigma[1]


def _schedule(s: Settings, sigmas: list[float], window: tuple[float, float]) -> Schedule:
    return Schedule(tuple(sigmas), s.update_interval, s.anchors.first_anchor, *window, s.spacing)


def conds_of(options: dict) -> tuple[CondKey, ...]:
    """Who is in a call, by its transformer_options."""
    replaced = frozenset(options.get("patches_replace", {}).get("dit", {}))
    window = tuple(getattr(options.get("context_window"), "index_list", ()))
    pairs = zip(options["uuids"], options["cond_or_uncond"], strict=True)
    return tuple(CondKey(*pair, replaced, window) for pair in pairs)
