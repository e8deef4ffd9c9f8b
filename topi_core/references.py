"""Which prompts look at the same references: these share one selection, and their anchors."""

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
    """The references of one or several prompts."""

    latents: list[Tensor]  # one [images, channels, ...] per reference
    layout: Layout
    pictures: tuple[Reference, ...]
    anchor: tuple[int, float] | None = None  # step and sigma of the newest one
    settled: bool = False  # whether that anchor's selection has been made
    selection: Selection | None = None  # None: every token is kept, without a score

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
    picture: Callable[[Tensor], Tensor | None]  # latent [images, ...] -> uint8 RGB [images, h, w, 3]
    on_anchor: Callable[[Run, Anchor], None] | None = None
    choose: Callable[[ReferenceSet], tuple[Selection | None, float]] = lambda of: (None, 0.0)
    sets: list[ReferenceSet] = field(default_factory=list)
    of_cond: dict[CondKey, ReferenceSet] = field(default_factory=dict)

    def find(self, conds: tuple[CondKey, ...], latents: list[Tensor], layout: Layout, images: int) -> list:
        """The set of each prompt of a call, whose references are `latents` [prompts x images, ...]."""
        for i, cond in enumerate(conds):
            if cond not in self.of_cond or not self.of_cond[cond].fits(layout):
                own = [latent[i * images : (i + 1) * images] for latent in latents]
                known = next((some for some in self.sets if some.same(own, layout)), None)
                if known is None:
                    pictures = tuple(Reference((x.shape[-2], x.shape[-1]), self.picture(x)) for x in own)
                    known = ReferenceSet(own, layout, pictures)
                    self.sets.append(known)
                self.of_cond[cond] = known
        return [self.of_cond[cond] for cond in conds]

    def anchored(self, call: Call) -> None:
        """A call that counts as an anchor has run; each further one of its step is the newest in its turn."""
        for each in call.sets:
            each.anchor, each.settled, each.selection = (call.step, call.sigma), False, None

    def settle(self, sets: list[ReferenceSet] | None = None) -> None:
        """Chooses what these sets, or all, keep after their anchor: where influence is needed, the host waits for it.

        In the record the choice replaces an earlier one of its step, which a sampler that looks ahead scores twice.
        """
        for each in self.sets if sets is None else sets:
            if each.anchor is None or each.settled:
                continue
            each.selection, seconds = self.choose(each)
            each.settled = True
            kept, ranks = torch.ones(len(each.latents[0]), each.layout.reference_tokens, dtype=torch.bool), None
            if each.selection is not None:
                kept, ranks = each.selection.mask(), each.selection.ranks()
            anchor = Anchor(*each.anchor, each.layout, each.pictures, kept, seconds, ranks)
            others = [a for a in self.run.anchors if a.step != anchor.step or a.references is not each.pictures]
            self.run.anchors = [*others, anchor]
            if self.on_anchor is not None:
                self.on_anchor(self.run, anchor)
