"""The state of one sampling run: which references share a selection, what they scored, what they keep or reuse."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import get_args

import torch
from torch import Tensor

from ..topi_core.calibration import TOP_M, sensitivity, top_layers
from ..topi_core.cost import call_flops
from ..topi_core.influence import attention_received, fusible, influence, random_score, similarity
from ..topi_core.layout import Layout
from ..topi_core.reuse import TEXT_LEFT, ContextCache
from ..topi_core.schedule import Schedule
from ..topi_core.select import Selection, select
from ..topi_core.stopwatch import Stopwatch
from ..topi_core.trace import Anchor, Bits, Kind, Reference, Run, Sampled, Step
from .caches import Caches, Cond
from .compiled import Compiled
from .memory import Memory

log = logging.getLogger(__name__)


@dataclass
class Group:
    """Conds that look at the same references: one selection an image."""

    references: list[Tensor]  # one [images, channels, ...] a reference
    layout: Layout
    pictures: tuple[Reference, ...]
    scores: dict[int, Tensor] = field(default_factory=dict)  # layer -> [images, C], of the newest anchor step
    sensitivity: tuple[Tensor, int] | None = None  # the sum of S over rows [L], and their number; of a search
    scored: tuple[int, float] | None = None  # its step and sigma
    watches: list[Stopwatch] = field(default_factory=list)  # the time that these scores took
    selection: Selection | None = None

    def fits(self, layout: Layout) -> bool:
        """Prompts of other lengths, as those of cond and uncond often are, share a selection; regions do not."""
        mine = self.layout
        return (mine.target_grid, mine.reference_grids) == (layout.target_grid, layout.reference_grids)

    def same(self, references: list[Tensor], layout: Layout) -> bool:
        return self.fits(layout) and all(torch.equal(a, b) for a, b in zip(self.references, references, strict=True))

    def add(self, call: Call, rows: slice, watches: list[Stopwatch]) -> None:
        """Adds what one call scored in its rows; the first call of a new anchor step starts afresh."""
        if self.scored is None or self.scored[0] != call.step:
            self.scores, self.sensitivity, self.watches = {}, None, []
        known = self.scores or call.scores
        self.scores = {n: _sum(self.scores.get(n), call.scores[n][rows]) for n in known}
        if call.search:
            s = torch.stack([call.sensitivity[n][rows].sum() for n in call.layers])
            before, count = self.sensitivity or (None, 0)
            self.sensitivity = _sum(before, s), count + rows.stop - rows.start
        self.watches = self.watches + watches
        self.scored, self.selection = (call.step, call.sigma), None


def _sum(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b


@dataclass
class Call:
    """One call of the network: its rows are `chunks` x images, chunk by chunk.

    An anchor call scores `layers`, from their attention or, with `features`, from their inputs. In a `search` these are
    all layers, and their attention tells which of them are representative.
    """

    layout: Layout
    chunks: list[Group]
    kind: Kind
    step: int
    sigma: float
    layers: tuple[int, ...] = ()
    features: bool = False
    search: bool = False
    kept: Tensor | None = None  # [B, K] into the context, on pruned calls that drop anything; K = 0 on reused ones
    reuse_text: bool = False  # at an anchor the text is kept for it; in a reused call it leaves the sequence
    conds: tuple[Cond, ...] = ()  # one a chunk
    caches: list[ContextCache] = field(default_factory=list)  # one a chunk: to fill at an anchor, or to reuse
    scores: dict[int, Tensor] = field(default_factory=dict)  # layer -> [B, C]
    sensitivity: dict[int, Tensor] = field(default_factory=dict)  # layer -> [B], of a search
    watch: Stopwatch = field(default_factory=Stopwatch)
    positions: dict[tuple, Tensor] = field(default_factory=dict)  # realigned `pe` and masks by their source
    computed: bool = False

    @property
    def heard(self) -> dict[int, Tensor]:
        """By layer: that its attention, or in its place its input, was seen."""
        return self.sensitivity if self.search else self.scores

    def hear(self, layer: int, received: Tensor) -> None:
        """In a search, notes a layer's sensitivity from the attention its context receives [B, H, C]."""
        if self.search:
            self.sensitivity[layer] = sensitivity(received, self.layout)

    @property
    def missing(self) -> list[int]:
        """Layers that it had to score and did not see."""
        return [layer for layer in self.layers if layer not in self.heard]

    def leave_out(self, everything: bool) -> None:
        """Scores nothing for layers that guidance left out, where others were heard; with `everything` always."""
        if self.heard or everything:
            rows, c = sum(len(group.references[0]) for group in self.chunks), self.layout.context_tokens
            device = self.chunks[0].references[0].device
            for layer in self.missing:
                self.scores[layer] = torch.zeros(rows, c, device=device)
                if self.search:
                    self.sensitivity[layer] = torch.zeros(rows, device=device)

    def check(self) -> None:
        """RuntimeError where an anchor call ran and a layer that it had to score was not seen."""
        missing = self.missing
        if missing:
            raise RuntimeError(
                f"ToPi saw no attention over {self.layout.tokens} tokens in layer {missing[0]}; "
                "another patch replaces this block's attention: remove it, or choose other layers"
            )

    @property
    def text_tokens(self) -> int:
        """How much text stays in the sequence."""
        leaves = self.reuse_text and self.kind == "reused"
        return min(TEXT_LEFT, self.layout.text_tokens) if leaves else self.layout.text_tokens

    @property
    def tokens(self) -> int:
        context = self.layout.context_tokens if self.kept is None else self.kept.shape[1]
        return self.text_tokens + self.layout.target_tokens + context

    @property
    def keys(self) -> int | None:
        """What an attention sees, where that is not the sequence."""
        if self.kind != "reused":
            return None
        cache = self.caches[0]
        text = cache.text if self.reuse_text else self.layout.text_tokens
        return text + self.layout.target_tokens + cache.kept.shape[1]


def note(step: Step, call: Call, run: Run) -> None:
    """Adds one call to the record of its step."""
    kind = call.kind if call.computed else "skipped"
    if call.computed:
        taken, full = call_flops(run, kind, call.layout.tokens, call.tokens, call.keys)
        step.taken += len(call.conds) * taken
        step.full += len(call.conds) * full
    step.kind = max(step.kind, kind, key=get_args(Kind).index)
    step.tokens = max(step.tokens, call.tokens)
    step.keys = max(filter(None, (step.keys, call.keys)), default=None)


class State(ABC):
    """Made when a sampling run of `images` latents starts, and gone when it ends: only the record outlives it."""

    record: Sampled
    images: int
    compiled: Compiled | None = None

    @abstractmethod
    def begin(self, options: dict, references: list[Tensor], layout: Layout, latent: Tensor, text_leaves: bool) -> Call:
        """Decides what a call of the network does.

        options: ComfyUI's transformer_options; latent and references [rows of the call, ...], of these maybe none.
        text_leaves: whether the network lets its text leave the sequence in such a call.
        """

    @abstractmethod
    def score(self, call: Call, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
        """Scores one layer from its attention's q, k, v [B, H, N, D] after RoPE; of these nothing is kept."""

    @abstractmethod
    def end(self, call: Call) -> None:
        """Takes over what a call scored, unless a cache kept the network from running."""

    @abstractmethod
    def finish(self, latent: Tensor) -> None:
        """Completes the record of a run that made this latent."""

    def give_up(self) -> bool:
        """Lets go of what takes memory, as the device has run out of it; False where that is nothing."""
        return False

    def release(self) -> None:  # noqa: B027 (most states hold nothing)
        """Lets go of what takes memory, also where an error keeps this object alive."""


class RunState(State):
    """A run that prunes or reuses."""

    def __init__(
        self,
        record: Run,
        window: tuple[float, float],
        seed: int,
        images: int,
        memory: Memory,
        caches: Caches,
        picture: Callable[[Tensor], Tensor | None],
        on_anchor: Callable[[Run, Anchor], None] | None = None,
    ):
        """For a run that samples a batch of `images` latents and prunes between the two sigmas of `window`.

        picture: latent [B, ...] -> uint8 RGB [B, h, w, 3].
        """
        self.settings = record.settings
        self.record = record
        self.window = window
        self.images = images
        self.memory = memory
        self.picture = picture
        self.on_anchor = on_anchor
        self.generator = torch.Generator().manual_seed(seed)
        if not record.layers and self.settings.keeps_all:  # scores are for the views alone, not worth a search
            record.found = (record.depth // 2,)
        self.schedule: Schedule | None = None
        self.groups: list[Group] = []
        self.group_of_cond: dict[Cond, Group] = {}
        self.kept: dict[tuple[int, ...], Tensor] = {}  # by the groups of a call's chunks, until the next anchor
        self.caches = caches  # of the mode "reuse"
        self.open: Step | None = None  # from its first call to the first call of another one
        self.started = 0.0

    def begin(self, options: dict, references: list[Tensor], layout: Layout, latent: Tensor, text_leaves: bool) -> Call:
        sigma = float(options["sigmas"][0])
        if self.schedule is None:
            s = self.settings
            sigmas = tuple(options["sample_sigmas"].tolist())
            self.schedule = Schedule(sigmas, s.update_interval, s.first_anchor, *self.window, s.anchor_spacing)
        step = self.schedule.step(sigma)
        if self.open is None or self.open.index != step:
            self._close_step()
            self._open_step(step, sigma)
        self.record.context_tokens = max(self.record.context_tokens, layout.context_tokens)
        conds = Cond.of(options)
        if not references:
            return Call(layout, [], "full", step, sigma, conds=conds)
        chunks = self._groups(conds, references, layout)
        call = Call(layout, chunks, self._kind(chunks, step, sigma), step, sigma, conds=conds)
        if self.settings.mode == "reuse":
            call.reuse_text = self.settings.reuse_text and text_leaves
            self._reuse(call, references, latent)
        elif call.kind == "pruned":
            call.kept = self._kept(chunks, latent.device)
        if call.kind == "anchor":
            known, searching = self.record.layers, any(g.sensitivity and g.scored[0] == step for g in chunks)
            call.search = not known or searching
            call.layers = tuple(range(self.record.depth)) if call.search else known
            call.features = self.settings.metric in ("similarity", "random")
        return call

    def _reuse(self, call: Call, references: list[Tensor], latent: Tensor) -> None:
        """Gives a call of the mode "reuse" the caches that it fills or reads.

        A cond that has none, or whose cache holds another number of tokens than those it shares the call with, gets
        a new one: its call is an anchor.
        """
        if call.kind == "pruned":
            for group in self.groups:
                self._settle(group)
            call.caches = [self._shrunk(*pair) for pair in zip(call.conds, call.chunks, strict=True)]
            sizes = {cache and cache.kept.shape[1] for cache in call.caches}
            call.kind = "reused" if len(sizes) == 1 and None not in sizes else "anchor"
        if call.kind == "reused":
            texts = {cache.text for cache in call.caches}
            call.reuse_text &= len(texts) == 1 and texts != {0}
            call.kept = torch.empty(1, 0, dtype=torch.long, device=latent.device)
        elif call.kind == "anchor":
            text = call.layout.text_tokens if call.reuse_text else 0
            size = self.memory.size(text + call.layout.context_tokens)
            room = self.memory.room(latent, references, len(call.conds))
            call.caches = self.caches.fresh(call.conds, call.step, call.sigma, self.images * size, room)
            self.record.offloaded = self.caches.offloaded
            if not call.caches:
                call.kind, self.record.no_room = "full", True

    def _shrunk(self, cond: Cond, group: Group) -> ContextCache | None:
        """The cond's cache with the kept tokens only; as many for all conds of its size, as they may share a call."""
        cache = self.caches.get(cond)
        if cache is not None and cache.kept is None:
            alike = [g.selection for g in self.groups if g.selection and g.fits(group.layout)]
            cache.shrink(group.selection.kept(max(count for selection in alike for count in selection.counts)))
        return cache

    def give_up(self) -> bool:
        given_up = self.caches.give_up()
        self.record.no_room |= given_up
        return given_up

    def release(self) -> None:
        self.caches.clear()
        self.groups.clear()
        self.group_of_cond.clear()

    def _groups(self, conds: tuple[Cond, ...], references: list[Tensor], layout: Layout) -> list[Group]:
        images, groups = self.images, []
        for i, cond in enumerate(conds):
            group = self.group_of_cond.get(cond)
            if group is None or not group.fits(layout):
                own = [reference[i * images : (i + 1) * images] for reference in references]
                group = next((g for g in self.groups if g.same(own, layout)), None)
                if group is None:
                    group = Group(own, layout, tuple(Reference(tuple(r.shape[-2:]), self.picture(r)) for r in own))
                    self.groups.append(group)
                self.group_of_cond[cond] = group
            groups.append(group)
        return groups

    def _kind(self, chunks: list[Group], step: int, sigma: float) -> Kind:
        if not self.schedule.active(sigma):
            return "full"
        last = [group.scored[0] if group.scored else None for group in chunks]
        anchor = any(at == step or self.schedule.due(step, at) for at in last)
        return "anchor" if anchor else "pruned"

    def _kept(self, chunks: list[Group], device: torch.device) -> Tensor | None:
        for group in chunks:
            self._settle(group)
        key = tuple(id(group) for group in chunks)
        if key not in self.kept:
            count = max(count for group in chunks for count in group.selection.counts)
            kept = torch.cat([group.selection.kept(count) for group in chunks])
            self.kept[key] = kept.to(device)
        kept = self.kept[key]
        return None if kept.shape[1] == chunks[0].layout.context_tokens else kept

    def _settle(self, group: Group) -> None:
        """Turns the scores of a group's anchor step into its selection; the run's one synchronisation an anchor."""
        if group.scored is None or group.selection is not None:
            return
        s = self.settings
        if not self.record.layers:
            self._find_layers()
        group.scores = {layer: group.scores[layer] for layer in self.record.layers}
        group.selection = select(sum(group.scores.values()).cpu(), s.tau, s.min_keep, s.max_keep)
        step, sigma = group.scored
        seconds = sum(watch.seconds() for watch in group.watches)
        chosen = group.selection
        bits, ranks = Bits.of(chosen.mask()), chosen.ranks()
        anchor = Anchor(step, sigma, group.layout, group.pictures, bits, seconds, ranks)
        others = [a for a in self.record.anchors if a.step != step or a.references is not group.pictures]
        self.record.anchors = [*others, anchor]  # a sampler that looks ahead scores a step more than once
        self.kept.clear()
        if self.on_anchor is not None:
            self.on_anchor(self.record, anchor)

    def _find_layers(self) -> None:
        """Eq. 4 and 5 on the first anchor step alone: every row that has references counts, as for the selection."""
        searched = [group for group in self.groups if group.sensitivity]
        first = min(group.scored[0] for group in searched)
        sums, rows = zip(*(group.sensitivity for group in searched if group.scored[0] == first), strict=True)
        mean = sum(s.cpu().double() for s in sums) / sum(rows)
        self.record.found, self.record.found_at = top_layers(mean, min(TOP_M, self.record.depth)), first
        log.info(
            "ToPi: no profile fits %s with %d layers of width %d, so step %d scored all of them, and the run goes on "
            "with the layers %s; ToPi Calibrate and ToPi Save Profile find out on more images, and keep it",
            self.record.family, self.record.depth, self.record.hidden, first, ",".join(map(str, self.record.found)),
        )  # fmt: skip

    def score(self, call: Call, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
        fusible(q)  # what it compiles when it is first asked is not the time of scoring
        with call.watch.on(q.device):
            received = attention_received(q, k, call.layout, mask)
            call.hear(layer, received)
            if self.settings.metric == "attention":
                call.scores[layer] = received.sum(1)
            elif self.settings.metric == "influence":
                call.scores[layer] = influence(received, v, call.layout)

    def score_features(self, call: Call, layer: int, hidden: Tensor, layout: Layout) -> None:
        """Scores one layer from its input [B, N, W], for the metrics that need no attention.

        layout: that of the input, which has no text where the text has a stream of its own.
        """
        with call.watch.on(hidden.device):
            if self.settings.metric == "similarity":
                call.scores[layer] = similarity(hidden, layout)
            else:
                score = random_score(hidden.shape[0] // len(call.chunks), call.layout.context_tokens, self.generator)
                call.scores[layer] = score.repeat(len(call.chunks), 1).to(hidden.device, torch.float32)

    def end(self, call: Call) -> None:
        note(self.open, call, self.record)
        if call.kind != "anchor" or not call.computed:
            return
        if call.caches:
            self.caches.keep(call.conds, call.caches)
            self.record.cache_bytes = max(self.record.cache_bytes, self.caches.nbytes)
            self.record.forecast |= self.caches.forecasting
        if call.missing and all(group.scored for group in call.chunks):
            return  # guidance left blocks out: what was scored without that still holds
        if any(other.replaced < cond.replaced for cond in call.conds for other in self.group_of_cond):
            call.leave_out(everything=self.settings.keeps_all)
        call.check()
        watches = [call.watch]  # counted once, for the first of the groups
        for i, group in enumerate(call.chunks):
            if group.scored and group.scored[0] != call.step:
                self._settle(group)
            group.add(call, slice(i * self.images, (i + 1) * self.images), watches)
            watches = []

    def _open_step(self, index: int, sigma: float) -> None:
        """A new step, or one that the sampler comes back to after it has looked ahead, as heunpp2 does."""
        steps = self.record.steps
        self.open = next((step for step in steps[-2:] if step.index == index), None) or Step(index, sigma)
        self.record.steps = [*(step for step in steps if step is not self.open), self.open]
        self.started = time.perf_counter() - self.open.seconds

    def _close_step(self) -> None:
        if self.open is not None:
            self.open.seconds = time.perf_counter() - self.started
            self.open = None

    def finish(self, latent: Tensor) -> None:
        self.record.finish(latent)  # waits for the device, which the last step's time is to hold
        self._close_step()
        for group in self.groups:
            self._settle(group)
