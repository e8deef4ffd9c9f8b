"""Which step a model call belongs to, and which steps are anchors (Eq. 11)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Spacing = Literal["steps", "sigma"]


def step_of(sigma: float, sigmas: Sequence[float]) -> int:
    """Index i of the step from sigmas[i] to sigmas[i + 1] that a model call at `sigma` belongs to.

    Samplers that call the model inside a step, or at its end, are placed by their sigma, never by counting calls.
    """
    if sigmas[0] < sigmas[-1]:  # a reversed schedule adds noise
        return step_of(-sigma, [-s for s in sigmas])
    slack = 1e-6 * max(abs(sigmas[0]), abs(sigmas[-1]))
    reached = sum(s >= sigma - slack for s in sigmas)
    return min(max(reached - 1, 0), max(len(sigmas) - 2, 0))


@dataclass(frozen=True)
class Schedule:
    """The anchors of one run. `high` and `low` bound the sigmas at which tokens may be pruned and steps skipped."""

    sigmas: tuple[float, ...]
    update_interval: int
    first_anchor: int = 0
    high: float = float("inf")
    low: float = float("-inf")
    spacing: Spacing = "steps"

    @cached_property
    def anchors(self) -> tuple[int, ...]:
        """Steps that are anchors, ascending: every `update_interval` steps from `first_anchor` on (Eq. 11).

        With the spacing "sigma" they are as many, but sigma falls by the same from one to the next, as near as whole
        steps allow: references go out of date by how far the picture has moved, not by how often. From the last one to
        the end it falls by half of that, as no later step makes good what went wrong there.
        """
        even = range(self.first_anchor, len(self.sigmas) - 1, self.update_interval)
        if self.spacing == "steps" or not even:
            return tuple(even)
        start, end = self.sigmas[self.first_anchor], self.sigmas[-1]
        goals = [start + (end - start) * i / (len(even) - 0.5) for i in range(len(even))]
        anchors = [self.first_anchor]
        for i, goal in enumerate(goals[1:], 1):
            free = range(anchors[-1] + 1, len(self.sigmas) - 1 - (len(goals) - 1 - i))  # leaves room for the others
            anchors.append(min(free, key=lambda step: abs(self.sigmas[step] - goal)))
        return tuple(anchors)

    def step(self, sigma: float) -> int:
        return step_of(sigma, self.sigmas)

    def inside(self, sigma: float) -> bool:
        """Whether anything may be saved at this sigma."""
        return self.low < sigma <= self.high

    def active(self, sigma: float) -> bool:
        """Whether tokens are scored and pruned at all at this sigma."""
        return self.inside(sigma) and self.step(sigma) >= self.first_anchor

    def due(self, step: int, last: int | None) -> bool:
        """Whether an active step must score anew; `last` is the step that was scored last.

        An anchor that was missed, as an outer cache skipped its step, is due until it happens. A sampler that adds
        noise again and goes back has one where it goes on; one that has looked a step ahead does not.
        """
        if last is None or step < last - 1:
            return True
        return any(last < anchor <= step or anchor == step < last for anchor in self.anchors)
