"""One sampling run: which plan each call of the network gets. Made when the run starts, and gone when it ends."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from ...topi_core.plan import Call, CondKey, Plan, Saving
from ...topi_core.references import References, ReferenceSet
from ...topi_core.savings.skip import Skip
from ...topi_core.schedule import Schedule
from ...topi_core.trace import Run, Sampled
from .compiled import Compiled
from .families.family import Arguments, Block, Family
from .memory import CallMemory
from .recorder import Recorder


@dataclass(eq=False)
class Engine:
    """Holds what the run's savings share. Only `record` outlives it: the run's own, or what a calibration tells."""

    family: Family
    network: nn.Module
    savings: Sequence[Saving]
    references: References
    window: tuple[float, float]  # of sigma, in which anchors stand and steps may be skipped
    images: int  # latents in the batch that is sampled
    memory: Callable[[Tensor, Sequence[Tensor], int], CallMemory]
    compiled: Compiled | None = None
    schedule: Schedule | None = None
    skip: Skip | None = None
    ran: int = 0  # calls in which the network was computed
    computed: set[int] = field(default_factory=set)  # steps of these
    full_flops: int = 0  # of a step's last evaluation that ran, had every call of it computed everything

    def __post_init__(self) -> None:
        self.blocks = self.family.blocks(self.network)
        self.run: Run = self.references.run
        self.record: Sampled = self.run
        self.recorder = Recorder(self.run)
        self._sigma: tuple[Tensor | None, float] = None, 0.0

    def takes(self, network: nn.Module) -> bool:
        """Whether it can follow this network as well: a guider may have a second model."""
        return self.family.matches(network) and len(self.blocks_of(network)) == len(self.blocks)

    def blocks_of(self, network: nn.Module) -> Sequence[Block]:
        return self.blocks if network is self.network else self.family.blocks(network)

    def planned(self, sigmas: Tensor) -> Schedule:
        if self.schedule is None:
            s, known = self.run.settings, tuple(sigmas.tolist())
            first = s.first_anchor(len(known) - 1)
            self.schedule = Schedule(known, s.update_interval, first, *self.window, s.spacing)
        return self.schedule

    def sigma(self, sigmas: Tensor) -> float:
        """The host waits once, however many calls of a step's prompts share the tensor."""
        if self._sigma[0] is not sigmas:
            self._sigma = sigmas, float(sigmas[0])
        return self._sigma[1]

    def predict(self, executor, x: Tensor, timestep: Tensor, options: dict, *rest) -> Tensor:
        """The guided model's picture: its own, or the one that `skip` extrapolates."""
        run = partial(executor, x, timestep, options, *rest)
        tolerance, planned = self.run.settings.tolerance, options.get("transformer_options", {}).get("sample_sigmas")
        if not tolerance or planned is None or not (sigma := self.sigma(timestep)):
            return run()
        schedule = self.planned(planned)
        if self.skip is None:
            self.skip = Skip(self.run, tolerance, schedule.sigmas)
        step = schedule.step(sigma)
        ahead = schedule.sigmas[step + 1]
        answer = self.skip.answer(x, sigma, ahead, schedule.inside(sigma))
        if self.run.noisy and self.run.interval:  # nothing will be skipped, so that reuse is all that is left
            self.run.interval = self.run.settings.update_interval
        if answer is not None:
            self.recorder.begin(step, sigma)
            self.recorder.skip(self.full_flops)
            return answer
        ran, counted = self.ran, self.recorder.full_flops
        denoised = run()
        if self.ran == ran:  # another cache answered
            self.skip.passed(x, sigma, denoised)
            return denoised
        self.full_flops = self.recorder.full_flops - counted
        return self.skip.saw(x, sigma, ahead, denoised)

    def _due(self, each: ReferenceSet, step: int, schedule: Schedule) -> bool:
        """Whether references need an anchor; where steps may be skipped, update_interval counts the others."""
        if each.anchor is None or not self.run.settings.tolerance:
            return schedule.due(step, each.anchor and each.anchor[0])
        last = each.anchor[0]
        since = sum(last < other for other in {*self.computed, step})
        return step < last - 1 or since >= self.run.interval

    def begin(self, given: Arguments) -> tuple[Plan, Call]:
        """Decides what a call of the network computes."""
        sigma, schedule = self.sigma(given.options["sigmas"]), self.planned(given.options["sample_sigmas"])
        step, layout = schedule.step(sigma), given.layout
        self.recorder.begin(step, sigma)
        self.run.reference_tokens = max(self.run.reference_tokens, layout.reference_tokens)
        conds = conds_of(given.options)
        sets = self.references.find(conds, given.references, layout, self.images) if given.references else []
        memory = self.memory(given.latent, given.references, len(conds))
        steps, device = len(schedule.sigmas) - 1, given.latent.device
        if sets and not self.run.interval:
            self.run.interval = self.run.settings.interval(steps)
        call = Call(step, sigma, layout, conds, self.images, device, sets, given.text_leaves, memory, steps=steps)
        return self._plan(call, schedule), call

    def _plan(self, call: Call, schedule: Schedule) -> Plan:
        if not schedule.active(call.sigma):
            return Plan()
        anchors = [each.anchor is not None and each.anchor[0] == call.step for each in call.sets]
        if not any(anchors) and not any(self._due(each, call.step, schedule) for each in call.sets):
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
        self.ran += 1
        self.computed.add(call.step)
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
        self.skip = None
        for saving in self.savings:
            saving.release()
        self.references.sets.clear()
        self.references.of_cond.clear()


def conds_of(options: dict) -> tuple[CondKey, ...]:
    """Who is in a call, by its transformer_options."""
    replaced = frozenset(options.get("patches_replace", {}).get("dit", {}))
    window = tuple(getattr(options.get("context_window"), "index_list", ()))
    pairs = zip(options["uuids"], options["cond_or_uncond"], strict=True)
    return tuple(CondKey(*pair, replaced, window) for pair in pairs)
