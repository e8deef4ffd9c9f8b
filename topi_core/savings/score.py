"""Scores: at an anchor, the influence of each reference token in the representative layers (Eq. 9).

It saves nothing by itself. What it tells decides what is kept, or is shown.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..calibration import LayerSearch, sensitivity
from ..influence import Scorer, attention_received, fusible
from ..kv import not_reached
from ..layout import Layout
from ..plan import Attention, Call, Plan, Saving
from ..references import References, ReferenceSet
from ..select import Selection, select
from ..stopwatch import Stopwatch
from ..trace import Run

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Heard:
    """What one call tells: by layer the score [B, C], and in a search the sensitivity [B]."""

    call: Call
    layers: tuple[int, ...]
    search: bool
    scores: dict[int, Tensor] = field(default_factory=dict)
    sensitivity: dict[int, Tensor] = field(default_factory=dict)
    watch: Stopwatch = field(default_factory=Stopwatch)

    @property
    def missing(self) -> list[int]:
        """Layers that it had to score, and whose attention or input it did not see."""
        known = self.sensitivity if self.search else self.scores
        return [layer for layer in self.layers if layer not in known]

    def zero_missing(self) -> None:
        """Nothing is scored in layers that guidance left out."""
        call = self.call
        rows = len(call.sets) * call.images
        for layer in self.missing:
            self.scores[layer] = torch.zeros(rows, call.layout.reference_tokens, device=call.device)
            if self.search:
                self.sensitivity[layer] = torch.zeros(rows, device=call.device)


@dataclass
class Scores:
    """What the calls of one anchor step told about one set of references."""

    step: int
    by_layer: dict[int, Tensor] = field(default_factory=dict)  # [images, C]
    watches: list[Stopwatch] = field(default_factory=list)


class Score(Saving):
    """Without representative layers, the first anchor step finds them (`calibration.LayerSearch`)."""

    def __init__(self, run: Run, references: References, seed: int):
        self.run = run
        self.references = references
        references.choose = self.choose
        self.scorer: Scorer = run.settings.keep.metric
        self.score = self.scorer.begin(seed)
        self.search = LayerSearch(run.model.depth)
        self.scores: dict[ReferenceSet, Scores] = {}
        if not run.layers and run.settings.keeps_all:  # scores are for the views alone, not worth a search
            run.found_layers = (run.model.depth // 2,)

    def observe(self, plan: Plan, call: Call) -> bool:
        known, depth = self.run.layers, self.run.model.depth
        search = not known or any(self.search.knows(each, call.step) for each in call.sets)
        heard = plan.notes[self] = Heard(call, tuple(range(depth)) if search else known, search)
        if self.scorer.of_input:
            plan.on_input(lambda layer, hidden, layout: self._see(heard, layer, hidden, layout), heard.layers)
        if search or not self.scorer.of_input:
            plan.on_attention(lambda seen: self._listen(heard, seen), heard.layers)
        return True

    def _see(self, heard: Heard, layer: int, hidden: Tensor, layout: Layout) -> None:
        with heard.watch.on(hidden.device):
            heard.scores[layer] = self.score(hidden, layout, len(heard.call.sets))

    def _listen(self, heard: Heard, seen: Attention) -> None:
        """The attention over the whole sequence; some blocks have others."""
        layer, layout = seen.site[0], heard.call.layout
        q, k, v = seen.heads_first()
        if layer not in heard.missing or any(x.shape[2] != layout.tokens for x in (q, k, v)):
            return
        fusible(q)  # what it compiles when it is first asked is not the time of scoring
        with heard.watch.on(q.device):
            received = attention_received(q, k, layout, seen.four_dims())
            if heard.search:
                heard.sensitivity[layer] = sensitivity(received, layout)
            if not self.scorer.of_input:
                heard.scores[layer] = self.score(received, v, layout)

    def commit(self, plan: Plan, call: Call, output: Tensor) -> None:
        heard: Heard | None = plan.notes.get(self)
        if heard is None:
            return
        if heard.missing and all(each.anchor for each in call.sets):
            plan.counts = False  # guidance left blocks out: what was scored without that still holds
            return
        partly = any(other.replaced < cond.replaced for cond in call.conds for other in self.references.of_cond)
        if partly and (self.run.settings.keeps_all or len(heard.missing) < len(heard.layers)):
            heard.zero_missing()
        if heard.missing:
            raise RuntimeError(not_reached(heard.missing[0]))
        watches = [heard.watch]  # counted once, for the first of the sets
        for prompt, each in enumerate(call.sets):
            self._add(each, heard, call.rows(prompt), watches)
            watches = []

    def _add(self, each: ReferenceSet, heard: Heard, rows: slice, watches: list[Stopwatch]) -> None:
        """The first call of a new anchor step starts afresh."""
        scores = self.scores.get(each)
        if scores is None or scores.step != heard.call.step:
            scores = self.scores[each] = Scores(heard.call.step)
        for layer in scores.by_layer or heard.scores:
            own = heard.scores[layer][rows]
            scores.by_layer[layer] = scores.by_layer[layer] + own if layer in scores.by_layer else own
        scores.watches += watches
        if heard.search:
            s = torch.stack([heard.sensitivity[layer][rows].sum() for layer in heard.layers])
            self.search.add(each, heard.call.step, s, rows.stop - rows.start)

    def choose(self, each: ReferenceSet) -> tuple[Selection | None, float]:
        scores = self.scores.get(each)
        if scores is None:
            return None, 0.0
        if not self.run.layers:
            self._found()
        scores.by_layer = {layer: scores.by_layer[layer] for layer in self.run.layers}
        keep = self.run.settings.keep
        chosen = select(_sum(scores.by_layer.values()).cpu(), self.run.settings.tau, keep.min_keep, keep.max_keep)
        return chosen, sum(watch.seconds() for watch in scores.watches)

    def _found(self) -> None:
        model = self.run.model
        self.run.found_layers, self.run.found_at = self.search.result()
        log.info(
            "ToPi: no profile fits %s with %d layers of width %d, so step %d scored all of them, and the run goes on "
            "with the layers %s; ToPi Calibrate and ToPi Save Profile find out on more images, and keep it",
            model.family, model.depth, model.hidden, self.run.found_at, ",".join(map(str, self.run.found_layers)),
        )  # fmt: skip


def _sum(parts: Iterable[Tensor]) -> Tensor:
    first, *rest = parts
    for part in rest:
        first = first + part
    return first
