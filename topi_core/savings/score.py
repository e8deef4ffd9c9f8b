"""Scores: at an anchor, the influence of each reference token in the representative layers (Eq. 9).

It saves nothing by itself. What it tells decides what is kept, or is shown.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, reduce

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
    def known(self) -> dict[int, Tensor]:
        return self.sensitivity if self.search else self.scores

    @property
    def missing(self) -> list[int]:
        """Layers that it had to score, and whose attention or input it did not see."""
        return [layer for layer in self.layers if layer not in self.known]

    def hear(self, seen: Attention, score: Callable[..., Tensor] | None = None) -> None:
        """Listens to the attention over the whole sequence; some blocks have others."""
        layer, layout = seen.site[0], self.call.layout
        q, k, v = seen.heads_first()
        if layer in self.known or any(x.shape[2] != layout.tokens for x in (q, k, v)):
            return
        fusible(q)  # what it compiles when it is first asked is not the time of scoring
        with self.watch.on(q.device):
            received = attention_received(q, k, layout, seen.four_dims())
            if self.search:
                self.sensitivity[layer] = sensitivity(received, layout)
            if score is not None:
                self.scores[layer] = score(received, v, layout)

    def zero_missing(self) -> None:
        """Nothing is scored in layers that guidance left out."""
        none = torch.zeros(len(self.call.sets) * self.call.images, device=self.call.device)
        for layer in self.missing:
            self.scores[layer] = none[:, None].expand(-1, self.call.layout.reference_tokens)
            self.sensitivity[layer] = none


@dataclass
class Scores:
    """What the calls of one anchor step told about one set of references."""

    step: int
    by_layer: dict[int, Tensor] = field(default_factory=dict)  # [images, C]
    watches: list[Stopwatch] = field(default_factory=list)


class Score(Saving):
    """Without representative layers, the first anchor step finds them: Eq. 4 and 5 over all of its rows."""

    def __init__(self, run: Run, references: References, seed: int):
        self.run = run
        self.references = references
        references.choose = self.choose
        self.scorer: Scorer = run.settings.keep.metric
        self.score = self.scorer.begin(seed)
        self.scores: dict[ReferenceSet, Scores] = {}
        self.search = LayerSearch()
        if not run.layers and run.settings.keeps_all:  # scores are for the views alone, not worth a search
            run.found_layers = (run.model.depth // 2,)

    def observe(self, plan: Plan, call: Call) -> bool:
        search = not self.run.layers
        heard = Heard(call, self.run.layers or tuple(range(self.run.model.depth)), search)
        plan.notes[self] = heard
        if self.scorer.of_input:
            plan.on_input(partial(self._see, heard), heard.layers)
        if search or not self.scorer.of_input:
            score = None if self.scorer.of_input else self.score
            plan.on_attention(partial(heard.hear, score=score), heard.layers)
        return True

    def _see(self, heard: Heard, layer: int, hidden: Tensor, layout: Layout) -> None:
        with heard.watch.on(hidden.device):
            heard.scores[layer] = self.score(hidden, layout, len(heard.call.sets))

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
        if heard.search:
            self.search.add(call.step, torch.stack([heard.sensitivity[layer] for layer in heard.layers], 1))
        for prompt, each in enumerate(call.sets):
            if each not in self.scores or self.scores[each].step != call.step:
                self.scores[each] = Scores(call.step)  # the first call of a new anchor step starts afresh
            scores, rows = self.scores[each], call.rows(prompt)
            for layer, score in heard.scores.items():
                own = score[rows]
                scores.by_layer[layer] = scores.by_layer[layer] + own if layer in scores.by_layer else own
            if prompt == 0:  # the time of a call is counted once
                scores.watches.append(heard.watch)

    def choose(self, each: ReferenceSet) -> tuple[Selection | None, float]:
        scores = self.scores.get(each)
        if scores is None:
            return None, 0.0
        if not self.run.layers:
            self._find_layers()
        scores.by_layer = {layer: scores.by_layer[layer] for layer in self.run.layers}
        keep, total = self.run.settings.keep, reduce(torch.add, scores.by_layer.values())
        chosen = select(total.cpu(), self.run.settings.tau, keep.min_keep, keep.max_keep)
        return chosen, sum(watch.seconds() for watch in scores.watches)

    def _find_layers(self) -> None:
        run, model = self.run, self.run.model
        run.found_layers, run.found_at = self.search.result()
        log.info(
            "ToPi: no profile fits %s with %d layers of width %d, so step %d scored all of them, and the run goes on "
            "with the layers %s; ToPi Calibrate and ToPi Save Profile find out on more images, and keep it",
            model.family, model.depth, model.hidden, run.found_at, ",".join(map(str, run.found_layers)),
        )  # fmt: skip
