"""The mode "reuse" told a second time: nothing leaves the sequence, and it shares no code with the pack.

At an anchor the context's keys and values of every layer are written down, for each cond. Between anchors the model
still computes the whole sequence, but in every attention the context's keys and values are replaced by those that were
written down, and those of dropped tokens are hidden. What the context's own rows become is of no consequence then. With
`reuse_text` the same is done to the text's, where it has a stream of its own and no mask.
A forecast goes on along the straight line through what was written down at the last two anchors.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from oracle import FLOAT_ERROR, Oracle
from sampling import difference, kept_sets, kinds, layer_inputs, patch, sample
from small_models import Family
from torch import Tensor


@dataclass
class Page:
    """Keys and values that one anchor wrote down, in its first call and in its last, which is most often the same.

    `known` [images, C] are the tokens whose values of the anchor before were kept.
    """

    step: int
    sigma: float
    known: Tensor | None
    first_sigma: float
    first: tuple[Tensor, Tensor]
    last: tuple[Tensor, Tensor]


class ReuseOracle(Oracle):
    def __init__(
        self,
        family: Family,
        anchors: tuple[int, ...] | None = None,
        *,
        forecast: bool = True,
        reuse_text: bool = True,
        **settings,
    ):
        """anchors: where they are spaced by sigma. Every token that `max_keep` allows is kept."""
        super().__init__(family, tau=1.0, **settings)
        self.given = anchors
        self.forecast, self.reuse_text = forecast, reuse_text
        self.pages: dict[tuple[object, int, int], list[Page]] = {}  # by cond, layer and nth attention: one an anchor
        self.kept_by: dict[object, Tensor | None] = {}  # cond -> [images, C]; None until it is first used

    def due(self, last: int | None, step: int) -> bool:
        if self.given is None or last is None or step == last:
            return super().due(last, step)
        return any(last < anchor <= step for anchor in self.given)

    def call(self, executor, *args, **kwargs):
        options = next(a for a in (*args, *kwargs.values()) if isinstance(a, dict) and "cond_or_uncond" in a)
        self.conds = list(zip(options["uuids"], options["cond_or_uncond"], strict=True))
        self.met: dict[int, int] = {}
        names = inspect.signature(executor.original).parameters
        given = dict(zip(names, args, strict=False)) | kwargs
        self.with_text = self.reuse_text and self.family.replacements and given.get("attention_mask") is None
        out = super().call(executor, *args, **kwargs)
        if self.rows is not None and self.record:
            self.kept_by |= dict.fromkeys(self.conds)
        return out

    def kind(self, step: int, sigma: float) -> str:
        self.now = step, sigma
        kind = super().kind(step, sigma)
        if kind == "pruned" and any(cond not in self.kept_by for cond in self.conds):
            return "anchor"
        if kind == "pruned":
            images = len(self.rows) // len(self.conds)
            for number, cond in enumerate(self.conds):
                if self.kept_by[cond] is None:
                    mine = self.rows[number * images : (number + 1) * images]
                    self.kept_by[cond] = self.choose_for(mine)
            if len({int(self.kept_by[cond][0].sum()) for cond in self.conds}) > 1:
                return "anchor"
        return kind

    def choose_for(self, rows: list) -> Tensor:
        """As many tokens for every row of this size in the whole run."""
        alike = [i for s in self.selections if s.target == self.target and len(s.influence) for i in s.influence]
        longest = max(len(self.select(influence)) for influence in alike if len(influence) == self.context)
        kept = torch.zeros(len(rows), self.context, dtype=torch.bool)
        for row, (selection, image) in enumerate(rows):
            kept[row, self.select(selection.influence[image], longest)] = True
        return kept

    def choose(self) -> Tensor:
        return torch.cat([self.kept_by[cond] for cond in self.conds])

    def change(self, k: Tensor, v: Tensor, mask: Tensor | None, context: slice, dim: int) -> tuple:
        number = self.met[self.layer] = self.met.get(self.layer, -1) + 1
        images = k.shape[0] // len(self.conds)
        text = self.place("x", k.shape[dim]) if self.with_text else slice(0, 0)
        places = [*range(text.start, text.stop), *range(context.start, context.stop)]
        own = (slice(None),) * dim + (places,)
        if self.record:
            for i, cond in enumerate(self.conds):
                rows = slice(i * images, (i + 1) * images)
                pages = self.pages.setdefault((cond, self.layer, number), [])
                pair = tuple(x[rows][own].clone() for x in (k, v))
                if pages and pages[-1].step == self.now[0]:
                    pages[-1].sigma, pages[-1].last = self.now[1], pair
                else:
                    pages.append(Page(*self.now, self.kept_by.get(cond), self.now[1], pair, pair))
        if self.kept is None:
            return k, v, mask
        pairs = [self.told(self.pages[cond, self.layer, number], dim) for cond in self.conds]
        keys, values = zip(*pairs, strict=True)
        k, v = k.clone(), v.clone()
        k[own], v[own] = torch.cat(keys).to(k.dtype), torch.cat(values).to(v.dtype)
        return k, v, self.hide(k, mask, context, dim)

    def told(self, pages: list[Page], dim: int) -> tuple[Tensor, Tensor]:
        """One cond's keys and values of the context at the sigma of this call."""
        last = pages[-1]
        if len(pages) == 1 or not self.forecast:
            return last.last
        before = pages[-2]
        ahead = min((self.now[1] - last.sigma) / (last.first_sigma - before.sigma), 1)
        known = torch.ones(last.last[0].shape[0], self.context) if last.known is None else last.known.float()
        known = torch.nn.functional.pad(known, (last.last[0].shape[dim] - self.context, 0), value=1.0)  # the text
        known = (known[:, None, :, None] if dim == 2 else known[:, :, None]).to(last.last[0].device)
        three = zip(last.last, last.first, before.last, strict=True)
        return tuple(now + ahead * known * (first - earlier) for now, first, earlier in three)


def compare_reuse(
    family: Family,
    model,
    positive: list,
    negative: list | None = None,
    *,
    inputs: dict | None = None,
    rounding: float = FLOAT_ERROR,
    **sampling,
) -> tuple[Tensor, object]:
    """Samples in the mode "reuse" with ToPi Patch and with the oracle: the same tokens, and the same image."""
    inputs = {"max_keep": 0.6, "update_interval": 3, "reuse_text": True} | (inputs or {})
    patched, trace = patch(model, mode="reuse", spacing="steps", **layer_inputs(family) | inputs)
    image = sample(patched, positive, negative, **sampling)
    oracle = ReuseOracle(family, **inputs)
    expected = sample(oracle.attach(model), positive, negative, **sampling)
    assert kept_sets(trace) == oracle.anchors
    assert difference(image, expected) < rounding
    assert set(kinds(trace)) <= {"full", "anchor", "reused"} and "reused" in kinds(trace)
    return image, trace
