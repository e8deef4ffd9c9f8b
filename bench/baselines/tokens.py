"""Baselines that merge tokens: ToPi's ranking with merging (the paper's Table 4), ToMeSD, ToMA and SDTM.

All have one form. Before the first block that is shortened, tokens are merged; all blocks from there on compute the
merged sequence, where a merged token has the position embedding of its destination; and behind the last block tokens
are un-merged. So one pattern holds for a whole call, and the cost model counts all that is saved, but not the matching.
What un-merging gives back is the change that the blocks made, added to what each token was before: the noise of a
picture's tokens is their own, and copies of whole hidden states would leave it in. References are not un-merged, as
nothing behind the blocks looks at them.

The originals merge around each attention (ToMeSD, ToMA) or each attention and MLP (SDTM), and add what they un-merge to
each token's residual there. ComfyUI's ControlNets and the reference method `index_timestep_zero` count the picture's
rows: neither works where these are merged. A model that has this method by itself is refused; a node that asks for it
is not noticed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from topi_core.config import AnchorSettings, KeepSettings, LayerSettings
from topi_core.layout import Grid, Layout
from topi_core.plan import Call, Cut, OnOutput, Plan, Saving
from topi_core.savings.prune import Prune
from topi_core.savings.score import Score

from .attach import attached
from .merging import (
    Groups,
    Shares,
    bipartite,
    detail,
    dynamic_ratio,
    facilities,
    nearest,
    shared_out,
    staying,
    strided,
    structure,
    windows,
)

Images = Literal["target", "references", "images"]  # whose tokens are merged; "images": of all


class Pattern(Protocol):
    """Which of L tokens stay, what they become, and what all L get back (`merging.Groups`, `merging.Shares`)."""

    kept: Tensor  # [B, K]

    def merge(self, x: Tensor) -> Tensor: ...
    def unmerge(self, y: Tensor) -> Tensor: ...


def grids_of(layout: Layout, of: Images) -> tuple[Grid, ...]:
    """The grids of these images in the order of the sequence."""
    grids = {"text": (), "target": (layout.target_grid,), "references": layout.reference_grids}
    return tuple(grid for part in layout.order if of in (part, "images") for grid in grids[part])


@dataclass(eq=False)
class Merged:
    """What the first shortened block of a call got: the tokens before they were merged, and after."""

    pattern: Pattern
    before: Tensor  # [B, L, W]
    after: Tensor  # [B, K, W]


@dataclass(frozen=True, eq=False, kw_only=True)
class MergingCut(Cut):
    """The cut `base` in which, besides, `away` tokens of some images are merged into others, by what `find` finds.

    It serves one call: which rows stay is known when the first shortened block's hidden states [B, L, W] are.
    """

    base: Cut
    of: Images
    away: int
    find: Callable[[Tensor], Pattern]
    found: list[Merged] = field(default_factory=list)

    def tokens(self, layout: Layout) -> int:
        return self.base.tokens(layout) - self.away

    def key_tokens(self, layout: Layout) -> int:
        return self.base.key_tokens(layout) - self.away

    def rows(self, layout: Layout) -> Tensor:
        return self._thinned(self.base.rows(layout), span(self.base, self.of, layout))

    def keys(self, layout: Layout) -> Tensor:
        return self._thinned(self.base.keys(layout), span(self.base, self.of, layout, keys=True))

    def gather(self, x: Tensor, layout: Layout, dim: int = 1) -> Tensor:
        """Finds the pattern, and merges: hidden states [B, N, W] -> [B, n, W]."""
        short, at = self.base.gather(x, layout, dim), span(self.base, self.of, layout)
        before = short[:, at]
        pattern = self.find(before)
        self.found[:] = [Merged(pattern, before, pattern.merge(before))]
        return _replaced(short, at, self.found[0].after)

    def unmerge(self, hidden: Tensor, layout: Layout) -> Tensor:
        """The rows of `base` again, each with its own state of before and the change that its destination saw."""
        (merged,), at = self.found, span(self.base, self.of, layout)
        at = slice(at.start, at.stop - self.away)
        own = merged.before - merged.pattern.unmerge(merged.after)  # zero for what was merged with none
        return _replaced(hidden, at, merged.pattern.unmerge(hidden[:, at]) + own)

    def _thinned(self, index: Tensor, at: slice) -> Tensor:
        """Indices [1 or B, n] without those at the places `at` whose tokens went away."""
        kept = self.found[0].pattern.kept
        index = index.expand(len(kept), -1)
        return _replaced(index, at, index[:, at].gather(1, kept))


def span(cut: Cut, of: Images, layout: Layout, keys: bool = False) -> slice:
    """Where these images stand, one behind the other, among the rows or own keys that a cut leaves."""
    text = min(layout.text_tokens, layout.text_tokens if cut.text is None else cut.text)
    references = layout.reference_tokens if cut.kept is None else cut.kept.shape[1]
    lengths = {
        "text": 0 if keys and cut.stand_in_text else text,
        "target": layout.target_tokens,
        "references": references if cut.stand_in is None else 0,
    }
    parts = [part for part in layout.order if of == part or (of == "images" and part != "text")]
    if "text" in layout.order[layout.order.index(parts[0]) : layout.order.index(parts[-1])]:
        raise ValueError(f"images can be merged together where they stand together, got the order {layout.order}")
    start = sum(lengths[part] for part in layout.order[: layout.order.index(parts[0])])
    return slice(start, start + sum(lengths[part] for part in parts))


def _replaced(x: Tensor, at: slice, by: Tensor) -> Tensor:
    """x [B, n, ...] with other rows, of another number, in place of those at `at`."""
    return torch.cat([x[:, : at.start], by, x[:, at.stop :]], 1)


@dataclass(eq=False)
class Merging(Saving):
    """Merges the share `ratio` of the tokens of some images in every call, from `first_layer` on."""

    of: Images
    ratio: float
    first_layer: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio must be in [0, 1), got {self.ratio}")

    def away(self, call: Call) -> int:
        """How many tokens go away."""
        raise NotImplementedError

    def find(self, call: Call, x: Tensor) -> Pattern:
        """Which ones, by the hidden states of these images [B, L, W]."""
        raise NotImplementedError

    def observe(self, plan: Plan, call: Call) -> bool:
        """It needs no anchors, so what it does at every other step it does here."""
        return self.apply(plan, call)

    def apply(self, plan: Plan, call: Call) -> bool:
        plan.kind = "full"
        self.shorten(plan, call)
        return True

    def shorten(self, plan: Plan, call: Call) -> MergingCut | None:
        """Puts the merging on what the plan leaves of the sequence; None where nothing goes away."""
        away = self.away(call)
        if not away:
            return None
        if plan.cut is None:
            plan.kind, plan.first_layer = "pruned", self.first_layer
        elif plan.first_layer != self.first_layer:
            raise ValueError(f"first_layer must be {plan.first_layer}, as of the cut it merges, got {self.first_layer}")
        plan.cut = cut = merging(plan.cut or Cut(), self.of, away, partial(self.find, call))
        if self.of != "references":
            plan.output.append(self.behind(call, cut))
        return cut

    def behind(self, call: Call, cut: MergingCut) -> OnOutput:
        """What un-merges behind the last block."""
        return cut.unmerge


def merging(base: Cut, of: Images, away: int, find: Callable[[Tensor], Pattern]) -> MergingCut:
    """The cut `base` with `away` tokens merged besides; it says of text and stand-ins what its base says."""
    own = base.text, base.kept, base.stand_in, base.stand_in_text
    return MergingCut(*own, base=base, of=of, away=away, find=find)


class TokenMerge(Prune):
    """The paper's Table 4: what `Prune` drops goes into the nearest kept token by cosine, which becomes the mean.

    The paper does not say by which states a neighbour is near, nor in which layer tokens are merged: here by those of
    the first layer that is shortened, in this layer, and anew at each step.
    """

    def apply(self, plan: Plan, call: Call) -> bool:
        super().apply(plan, call)
        if plan.cut is not None:
            kept = plan.cut.kept
            away = call.layout.reference_tokens - kept.shape[1]
            plan.cut = merging(Cut(), "references", away, lambda x: nearest(x, kept))
        return True


class ToMeSD(Merging):
    """Token merging for Stable Diffusion (Bolya & Hoffman, arXiv 2303.17604): `merging.bipartite`, anew in every call.

    The original merges around self-attention only, in the blocks of highest resolution, and draws the destination of
    a window by chance; here it is the window's first token, and a token looks for its destination in its own image.
    """

    def away(self, call: Call) -> int:
        grids = grids_of(call.layout, self.of)
        tokens = sum(map(math.prod, grids))
        return min(int(self.ratio * tokens), tokens - sum(map(len, windows(grids, 2))))

    def find(self, call: Call, x: Tensor) -> Groups:
        return bipartite(x, *strided(x, grids_of(call.layout, self.of), 2), self.away(call))


@dataclass(eq=False)
class ToMA(Merging):
    """Token merging with attention (Lu et al., arXiv 2509.10918): `merging.facilities` and `merging.shared_out`.

    Destinations hold for `chosen_for` steps and the shares in them for `shared_for`. The original's attention over
    destinations is scaled like the model's; here cosines are divided by `temperature`.
    """

    side: int = 8
    temperature: float = 0.1
    chosen_for: int = 10
    shared_for: int = 5
    known: dict[tuple, tuple[int, list[Tensor]]] = field(default_factory=dict)  # by call: step and destinations
    shares: dict[tuple, tuple[int, Shares]] = field(default_factory=dict)  # and shares

    def away(self, call: Call) -> int:
        sizes = [tokens.shape for tokens in windows(grids_of(call.layout, self.of), self.side)]
        return sum(count * (tokens - staying(tokens, self.ratio)) for count, tokens in sizes)

    def find(self, call: Call, x: Tensor) -> Shares:
        grids, key = grids_of(call.layout, self.of), (call.conds, call.layout.target_grid, call.layout.reference_grids)
        step, chosen = self.known.get(key, (None, []))
        if step is None or not step <= call.step < step + self.chosen_for:
            chosen = facilities(x, grids, self.side, self.ratio)
            self.known[key] = call.step, chosen
            self.shares.pop(key, None)
        step, shares = self.shares.get(key, (None, None))
        if step is None or not step <= call.step < step + self.shared_for:
            shares = shared_out(x, grids, self.side, chosen, self.temperature)
            self.shares[key] = call.step, shares
        return shares

    def release(self) -> None:
        self.known.clear()
        self.shares.clear()


@dataclass(eq=False)
class Protected:
    """What a protected step tells: the target's rows before the blocks, and how the blocks changed them."""

    before: Tensor | None = None  # [B, T, W]
    change: Tensor | None = None  # [B, T, W]


@dataclass(eq=False)
class SDTM(Merging):
    """Structure-then-detail token merging (Fang et al., arXiv 2505.11707), on the picture's own tokens.

    Every `protect`-th step is computed fully, and the change that the blocks make to each token is kept. In others
    the share `merging.dynamic_ratio` of the tokens goes away, by `merging.structure` until the share `switch` of the
    steps, then by `merging.detail`. A merged token gets `mixed` of the computed change and the rest of the kept one.

    The original keeps and mixes the output of each attention and MLP, in its second stage merges around MLPs alone, and
    there lets age weigh in the similarity of sources as well, which is left out here. Its switch is step 20, which is
    taken to be one of 28. `beside` a saving with anchors, these are protected steps too, and what it leaves is merged.
    """

    deviation: float = 0.2
    switch: float = 20 / 28
    protect: int = 3
    mixed: float = 0.1
    weight: float = 0.05  # of age among what makes a window uniform
    beside: bool = False
    change: dict[tuple, Tensor] = field(default_factory=dict)  # by call: of the last protected step [B, T, W]
    age: dict[tuple, Tensor] = field(default_factory=dict)  # [B, T], in steps since a token stood for itself alone

    def progress(self, call: Call) -> float:
        return call.step / max(1, call.steps - 1)

    def away(self, call: Call) -> int:
        rows, columns = call.layout.target_grid
        wanted = int(dynamic_ratio(self.progress(call), self.ratio, self.deviation) * call.layout.target_tokens)
        whole = rows // 2 * (columns // 2)
        if self.in_structure(call):
            return 3 * min(wanted // 3, whole)
        return min(wanted, call.layout.target_tokens - sum(map(len, windows((call.layout.target_grid,), 2))))

    def in_structure(self, call: Call) -> bool:
        return call.step < self.switch * call.steps

    def find(self, call: Call, x: Tensor) -> Groups:
        grid, age, away = call.layout.target_grid, self.age[call.conds], self.away(call)
        if self.in_structure(call):
            return structure(x, grid, age, away // 3, self.weight)
        return detail(x, grid, age, away)

    def observe(self, plan: Plan, call: Call) -> bool:
        if not self.beside:
            return self.apply(plan, call)
        self.look(plan)
        return True

    def apply(self, plan: Plan, call: Call) -> bool:
        if not self.beside:
            plan.kind = "full"
        known = self.change.get(call.conds)
        if call.step % self.protect == 0 or known is None or known.shape[1] != call.layout.target_tokens:
            self.look(plan)
            return True
        cut = self.shorten(plan, call)
        if cut is not None:
            plan.notes[self] = cut
        return True

    def behind(self, call: Call, cut: MergingCut) -> OnOutput:
        return partial(self.mix, cut, self.change[call.conds])

    def look(self, plan: Plan) -> None:
        """Sees what the blocks change in a protected step."""
        told = plan.notes[self] = Protected()

        def before(layer: int, hidden: Tensor, layout: Layout) -> None:
            told.before = hidden[:, layout.target].clone()  # some blocks write their result into their input

        def behind(hidden: Tensor, layout: Layout) -> Tensor:
            told.change = hidden[:, span(plan.cut or Cut(), "target", layout)] - told.before
            return hidden

        plan.on_input(before, [self.first_layer])
        plan.output.append(behind)

    def mix(self, cut: MergingCut, kept: Tensor, hidden: Tensor, layout: Layout) -> Tensor:
        """Un-merges, and mixes the change of tokens that were merged with that of the last protected step."""
        whole, (merged,) = cut.unmerge(hidden, layout), cut.found
        at = span(cut.base, "target", layout)
        mixed = merged.before + self.mixed * (whole[:, at] - merged.before) + (1 - self.mixed) * kept
        return _replaced(whole, at, torch.where(alone(merged.pattern)[..., None], whole[:, at], mixed))

    def commit(self, plan: Plan, call: Call, output: Tensor) -> None:
        told: Any = plan.notes.get(self)
        if isinstance(told, MergingCut) and told.found:
            self.age[call.conds] = (self.age[call.conds] + 1) * ~alone(told.found[0].pattern)
        elif isinstance(told, Protected) and told.change is not None:
            self.change[call.conds] = told.change
            self.age[call.conds] = torch.zeros_like(told.change[..., 0], dtype=torch.float32)

    def free(self) -> bool:
        held = bool(self.change)
        self.release()
        return held

    def release(self) -> None:
        self.change.clear()
        self.age.clear()


def alone(groups: Groups) -> Tensor:
    """Which tokens were merged with no other: bool [B, L]."""
    sizes = torch.zeros_like(groups.kept).scatter_add(1, groups.into, torch.ones_like(groups.into))
    return sizes.gather(1, groups.into) == 1


def merge(
    nodes: dict[str, type],
    model,
    *,
    keep: KeepSettings = KeepSettings(),  # noqa: B008 (frozen)
    anchors: AnchorSettings = AnchorSettings(),  # noqa: B008
    layers: LayerSettings = LayerSettings(),  # noqa: B008
) -> tuple:
    """`TokenMerge`, with the settings of ToPi's prune."""

    def make(run, references, network, seed):
        return [Score(run, references, seed), TokenMerge(references, run.model.front_layers)]

    return attached(nodes, model, make, mode="prune", keep=keep, anchors=anchors, layers=layers)


def tomesd(nodes: dict[str, type], model, *, of: Images = "images", ratio: float = 0.5, **constants) -> tuple:
    """`ToMeSD` with its fields."""
    return _put(nodes, model, lambda: ToMeSD(of, ratio, **constants))


FROM_THE_START = AnchorSettings(update_interval=5)
"""Any interval will do, as these savings read no anchor; reuse's own schedule would leave the first steps alone."""


def toma(nodes: dict[str, type], model, *, of: Images = "images", ratio: float = 0.5, **constants) -> tuple:
    """`ToMA` with its fields."""
    return _put(nodes, model, lambda: ToMA(of, ratio, **constants))


def sdtm(nodes: dict[str, type], model, *, ratio: float = 0.3, beside: dict | None = None, **constants) -> tuple:
    """`SDTM` with its fields; `beside`: also what ToPi saves with these `topi_core.config.Settings`."""
    return _put(nodes, model, lambda: SDTM("target", ratio, beside=beside is not None, **constants), beside)


def _put(nodes: dict[str, type], model, saving: Callable[[], Merging], beside: dict | None = None) -> tuple:
    """A new saving for each run on the model, alone or beside ToPi's own."""
    network = model.get_model_object("diffusion_model")
    method = getattr(getattr(network, "params", network), "default_ref_method", None)
    if saving().of != "references" and method == "index_timestep_zero" and (beside or {}).get("mode") != "reuse":
        raise ValueError("this model modulates references by where they stand behind the picture, so of must be theirs")
    settings = {"anchors": FROM_THE_START} if beside is None else beside
    return attached(nodes, model, lambda *run: [saving()], beside is not None, **settings)


BASELINES: dict[str, Callable[..., tuple]] = {
    "merge": merge,
    "tomesd": tomesd,
    "tomesd_refs": partial(tomesd, of="references"),
    "toma": toma,
    "toma_refs": partial(toma, of="references"),
    "sdtm": sdtm,
    "sdtm_reuse": partial(sdtm, beside={"mode": "reuse"}),
}
