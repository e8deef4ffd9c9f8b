"""Skip: a step whose velocity can be extrapolated is not computed, and what that cost is put right at the next one.

Between two computed steps the velocity of a rectified flow is nearly a straight line in sigma. How far it is from one
is seen for nothing: at each computed step the line through the two before it is compared with the truth. A line
through sigmas a and b misses c (s - a) (s - b) at s, c being half the second derivative: one comparison tells c, and c
tells what the next steps would miss. As an adaptive solver of differential equations does, ToPi computes a step when
its error would exceed the tolerance. Then a parabola through the newest three computed steps tells what the skipped
ones should have been, and with a sampler that goes straight ahead (Euler's) the difference is given back at once.

The velocity is that of the guided model, (x - denoised) / sigma, so that prompts, areas and CFG are one thing. Axes: I
images; everything else of a latent is its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..trace import Run

SMOOTH = 0.5
"""Cosine between a latent's moves from call to call, below which its sampler adds noise of its own."""
STRAIGHT = 1e-3
"""How far a latent may be from where Euler's method takes it, as a share of its move."""


class Point(NamedTuple):
    sigma: float
    velocity: Tensor


class Skipped(NamedTuple):
    sigma: float
    span: float  # of sigma, that the sampler went by with it
    velocity: Tensor


@dataclass(eq=False)
class Skip:
    """Lives for one run, whose schedule goes through `sigmas`."""

    run: Run
    tolerance: float
    sigmas: tuple[float, ...]
    points: list[Point] = field(default_factory=list)  # the newest three that were computed
    bend: Tensor | None = None  # [I], c as a share of the velocity's norm, the larger of the last two comparisons'
    last: Tensor | None = None  # [I], that of the last one
    owed: list[Skipped] = field(default_factory=list)  # since the last computed step
    before: Point | None = None  # the last call's sigma and what its sampler was told
    latent: Tensor | None = None  # and its latent
    move: Tensor | None = None  # of the latent by sigma, between the last two calls
    straight: int = 0  # calls in a row to which Euler's method has led

    def answer(self, x: Tensor, sigma: float, ahead: float, inside: bool = True) -> Tensor | None:
        """The picture [I, ...] that the guided model would see in the latent x; None: the model has to be asked.

        ahead: the sigma that the sampler goes to from here. inside: whether this step may be skipped at all.
        """
        self._follow(x, sigma)
        error = self.error(sigma, ahead) if inside else None
        if error is None or error > self.tolerance or self.run.noisy:
            return None
        velocity = line(self.points[-2:], sigma)
        self.owed.append(Skipped(sigma, ahead - sigma, velocity))
        return self._told(x, sigma, velocity)

    def error(self, sigma: float, ahead: float) -> float | None:
        """What skipping this step would add to the worst image's error, as a share of what the picture holds by then.

        A latent at `ahead` holds 1 - ahead of the picture, the rest is noise: what goes wrong while that is little
        decides what is in the picture. None where too little is known, and for the last step, behind which nothing
        could be put right.
        """
        if self.bend is None or len(self.points) < 2 or ahead == self.sigmas[-1]:
            return None
        (a, _), (b, _) = self.points[-2:]
        if not (a - b) * (b - sigma) > 0:  # the sampler went back
            return None
        held = max(1 - ahead, abs(ahead - sigma))
        return float(self.bend.max()) * abs((sigma - a) * (sigma - b) * (ahead - sigma)) / held

    def saw(self, x: Tensor, sigma: float, ahead: float, denoised: Tensor) -> Tensor:
        """What the sampler is told of a step that ran: its picture, with what the skipped ones before it missed."""
        velocity = (x - denoised) / sigma
        self.points = [p for p in self.points if (p.sigma - sigma) * (sigma - ahead) > 0]
        if len(self.points) >= 2:
            (a, _), (b, _) = self.points[-2:]
            missed = norm(velocity - line(self.points[-2:], sigma)) / norm(velocity).clamp(min=1e-12)
            bend = missed / abs((sigma - a) * (sigma - b))
            self.bend, self.last = bend if self.last is None else torch.maximum(bend, self.last), bend
        self.points = [*self.points[-2:], Point(sigma, velocity)]
        told = velocity
        if self.owed and len(self.points) == 3 and self.straight > 1:
            missed = sum(s.span * (s.velocity - line(self.points, s.sigma)) for s in self.owed)
            told = velocity - missed / (ahead - sigma)
        self.owed = []
        answer = self._told(x, sigma, told)
        return denoised if told is velocity else answer

    def passed(self, x: Tensor, sigma: float, denoised: Tensor) -> None:
        """Something else answered in the model's place, or the step is none of ours."""
        self._told(x, sigma, (x - denoised) / sigma)

    def _told(self, x: Tensor, sigma: float, velocity: Tensor) -> Tensor:
        self.before, self.latent = Point(sigma, velocity), x
        return x - sigma * velocity

    def _follow(self, x: Tensor, sigma: float) -> None:
        """Looks how the sampler came here: straight ahead, smoothly, or with fresh noise."""
        if self.before is None or self.latent is None or self.before.sigma == sigma or x.shape != self.latent.shape:
            self.straight = 0
            return
        move = (x - self.latent) / (sigma - self.before.sigma)
        off = norm(move - self.before.velocity) / norm(self.before.velocity).clamp(min=1e-12)
        self.straight = self.straight + 1 if bool((off < STRAIGHT).all()) else 0
        if self.move is not None and not self.straight:
            cosine = torch.nn.functional.cosine_similarity(move.flatten(1), self.move.flatten(1))
            self.run.noisy |= bool((cosine < SMOOTH).any())
        self.move = move


def line(points: list[Point], sigma: float) -> Tensor:
    """The polynomial through these points, of the least degree, at sigma (Lagrange)."""
    total = torch.zeros_like(points[0].velocity)
    for p in points:
        weight = 1.0
        for q in points:
            if q is not p:
                weight *= (sigma - q.sigma) / (p.sigma - q.sigma)
        total = total.add_(p.velocity, alpha=weight)
    return total


def norm(x: Tensor) -> Tensor:
    """[I, ...] -> [I]"""
    return torch.linalg.vector_norm(x.float().flatten(1), dim=1)
