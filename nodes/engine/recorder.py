"""Writes a run down, step by step."""

import time
from typing import get_args

from ...topi_core.cost import call_flops
from ...topi_core.plan import Call, Kind, Plan
from ...topi_core.trace import Run, Step


class Recorder:
    def __init__(self, run: Run):
        self.run = run
        self.open: Step | None = None  # from its first call to the first call of another one
        self.started = 0.0
        self.full_flops = 0  # of all calls so far

    def begin(self, index: int, sigma: float) -> None:
        """A call of this step: a new one, or one that the sampler comes back to after it has looked ahead (heunpp2)."""
        if self.open is not None and self.open.index == index:
            return
        self.close()
        steps = self.run.steps
        self.open = next((step for step in steps[-2:] if step.index == index), None) or Step(index, sigma)
        self.run.steps = [*(step for step in steps if step is not self.open), self.open]
        self.started = time.perf_counter() - self.open.seconds

    def add(self, plan: Plan, call: Call) -> None:
        """Adds one call to the open step."""
        step, layout, model, rank = self.open, call.layout, self.run.model, get_args(Kind).index
        assert step is not None
        if call.computed or plan.answer is not None:
            step.flops += len(call.conds) * call_flops(model, plan, layout)
            full = len(call.conds) * call_flops(model, Plan(), layout)
            step.full_flops += full
            self.full_flops += full
            step.kind = plan.kind if rank(plan.kind) > rank(step.kind) else step.kind
        step.tokens = max(step.tokens, plan.cut.tokens(layout) if plan.cut else layout.tokens)
        if plan.cut is not None and plan.cut.stand_in is not None:
            step.keys = max(step.keys or 0, plan.cut.key_tokens(layout))

    def skip(self, full_flops: int) -> None:
        """The open step, or an evaluation of it, was extrapolated: what it would have taken."""
        assert self.open is not None
        self.open.full_flops += full_flops

    def close(self) -> None:
        if self.open is not None:
            self.open.seconds = time.perf_counter() - self.started
            self.open = None
