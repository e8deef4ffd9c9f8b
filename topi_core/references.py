"""Which prompts look at the same references: these share one selection, and their anchors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .layout import Layout
from .plan import Call, CondKey
from .select import Selection
from .trace import Anchor, Reference, Run


@dataclass(eq=False)
class ReferenceSet:
    """The references of one or several prompts. `anchor` is the step and sigma of their newest anchor.

    `selection` is None before it is asked for, and where every token is kept without a score.
    """

    latents: list[Tensor]  # one [images, channels, ...] per reference
    layout: Layout
    pictures: tuple[Reference, ...]
    anchor: tuple[int, float] | None = None
    settled: bool = False
    selection: Selection | None = None

    def fits(self, layout: Layout) -> bool:
        """Prompts of other lengths, as those of cond and uncond often are, share a selection; regions do not."""
        mine = self.layout
        return (mine.target_grid, mine.reference_grids) == (layout.target_grid, layout.reference_grids)

    def same(self, latents: list[Tensor], layout: Layout) -> bool:
        return self.fits(layout) and all(torch.equal(a, b) for a, b in zip(self.latents, latents, strict=True))


@dataclass(eq=False)
class References:
    """All sets of one run. `choose` turns what a set's anchor scored into its selection and the seconds it took."""

    run: Run
    picture: Callable[[Tensor], Tensor | None]
    """latent [images, ...] -> uint8 RGB [images, h, w, 3]"""
    on_anchor: Callable[[Run, Anchor], None] | None = None
    choose: Callable[[ReferenceSet], tuple[Selection | None, float]] = lambda of: (None, 0.0)
    sets: list[ReferenceSet] = field(default_factory=list)
    of_cond: dict[CondKey, ReferenceSet] = field(default_factory=dict)

    def find(self, conds: tuple[CondKey, ...], latents: list[Tensor], layout: Layout, images: int) -> list:
        """The set of each prompt of a call, whose references are `latents` [prompts x images, ...]."""
        found = []
        for i, cond in enumerate(conds):
            known = self.of_cond.get(cond)
            if known is None or not known.fits(layout):
                own = [latent[i * images : (i + 1) * images] for latent in latents]
                known = next((some for some in self.sets if some.same(own, layout)), None)
                if known is None:
                    pictures = tuple(Reference((x.shape[-2], x.shape[-1]), self.picture(x)) for x in own)
                    known = ReferenceSet(own, layout, pictures)
                    self.sets.append(known)
                self.of_cond[cond] = known
            found.append(known)
        return found

    def anchored(self, call: Call) -> None:
        """A call that counts as an anchor has run; each further one of its step is the newest in its turn."""
        for each in call.sets:
            each.anchor, each.settled, each.selection = (call.step, call.sigma), False, None

    def settle(self, sets: list[ReferenceSet] | None = None) -> None:
        """Chooses what these sets, or all, keep after their anchor: where influence is needed, the host waits for it.

        The choice goes into the record, in place of an earlier one of the same step: a sampler that looks ahead
        scores a step more than once.
        """
        for each in self.sets if sets is None else sets:
            if each.anchor is None or each.settled:
                continue
            each.selection, seconds = self.choose(each)
            each.settled = True
            shape = len(each.latents[0]), each.layout.reference_tokens
            kept = torch.ones(shape, dtype=torch.bool) if each.selection is None else each.selection.mask()
            ranks = None if each.selection is None else each.selection.ranks()
            anchor = Anchor(*each.anchor, each.layout, each.pictures, kept, seconds, ranks)
            others = [a for a in self.run.anchors if a.step != anchor.step or a.references is not each.pictures]
            self.run.anchors = [*others, anchor]
            if self.on_anchor is not None:
                self.on_anchor(self.run, anchor)

    def clear(self) -> None:
        self.sets.clear()
        self.of_cond.clear()
